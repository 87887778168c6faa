"""Grads: what an implicit call returns, and the way from there to optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ._arguments import type_name
from ._call_options import check_flags
from ._grad_fields import accumulated, assign, factor_of, fitting, widened
from ._grad_norms import GradNorms
from ._members import checked
from ._multi_tensor import clone_all, flatten
from .clipping import finite
from .params import Params

__all__ = ["Grads"]

Self = TypeVar("Self", bound="Grads")


class Grads(GradNorms):
    """Gradients by the tensors of a :class:`Params`, in its order: what an implicit call returns.

    Parameters
    ----------
    params : Params
        The keys.
    values : sequence or mapping
        A value per key: in the order of ``params``, or by identity.

    Raises
    ------
    TypeError
        ``values`` is neither; a single tensor isn't taken for the sequence of its rows.
    ValueError
        There are more or fewer values than keys.

    Attributes
    ----------
    params : Params
        The keys. Changing the ``Params`` of the call later doesn't change the ``Grads``, whose ``params`` are
        then another object.

    Notes
    -----
    Besides what a :class:`GradDict` does, a ``Grads`` has norms, clipping and the way to optimizers.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, gradient
    >>> w, b = torch.tensor([1., 2.]), torch.tensor(3.)
    >>> ps = Params([w, b])
    >>> g1 = gradient(lambda: (w**2).sum() * b, ps)
    >>> g2 = gradient(lambda: w[0], ps)
    >>> g2[b] is None
    True
    >>> total = g1 + 10 * g2
    >>> total[w], total[b]
    (tensor([16., 12.]), tensor(5.))
    >>> total.clip_norm_(1.0)
    tensor(20.6155)
    >>> total.norm()
    tensor(1.0000)

    References
    ----------
    ``Grads`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """

    _params: Params
    _names: dict[int, str]

    def __init__(self, params: Params, values: Mapping[Tensor, Any] | Iterable[Any] = ()) -> None:
        if not isinstance(params, Params):
            raise TypeError(
                f"Grads: expected a Params as first argument, got {type_name(params)}; write "
                "Grads(Params(tensors), values), or GradDict(mapping)"
            )
        params = params._as_given()
        params._shared = True
        self._params = params
        self._names = params._names
        self._keys = params._members
        self._keys_shared = True
        if type(values) is not list:
            if isinstance(values, Mapping):
                values = self._matching(values, "Grads")
            elif isinstance(values, (Tensor, np.ndarray)) or not isinstance(values, Iterable):
                raise TypeError(
                    "Grads: values: expected a sequence with a value for each parameter, or a mapping, got "
                    f"{type_name(values)}; [value] for a single one"
                )
            else:
                values = list(values)
        if len(values) != len(self._keys):
            raise ValueError(
                f"Grads: expected a value for each of {len(self._keys)} parameters, got {len(values)}"
            )
        self._values = dict(zip(self._keys, values))  # noqa: B905 - the lengths are equal

    @property
    def params(self) -> Params:
        """The keys, as a :class:`Params`."""
        if self._params._members is not self._keys:
            self._params = Params._of(self._keys, self._names)
            self._params._shared = self._keys_shared = True
        return self._params

    def _label(self, key: int) -> str:
        return self._names.get(key) or super()._label(key)

    def _check_new(self, key: Any) -> None:
        super()._check_new(key)
        checked(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.params.copy(), list(self._values.values()))

    def merge_(self: Self, *others: Mapping[Tensor, Any]) -> Self:
        """Take over the entries of other mappings, with their names, as :meth:`GradDict.merge_` does.

        Parameters
        ----------
        *others : mapping
            From tensors to values: a :class:`Grads`, a :class:`GradDict`, a dict, or (tensor, value) pairs.

        Returns
        -------
        Grads
            Itself. Its ``params`` are new ones where keys were added.

        Raises
        ------
        TypeError
            One is neither a mapping nor pairs, or a new key is no tensor of floating or complex dtype;
            nothing is changed.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w, b = torch.tensor([1., 2.]), torch.tensor(3.)
        >>> grads = gradient(lambda: (w**2).sum(), Params([w]))
        >>> _ = grads.merge_(gradient(lambda: b**2, Params([b])))
        >>> grads[w], grads[b]
        (tensor([2., 4.]), tensor(6.))
        """
        count = len(self._keys)
        super().merge_(*others)
        if len(self._keys) > count:
            before = Params._of(dict(islice(self._keys.items(), count)), self._names)
            self._names = before._union(other.params for other in others if isinstance(other, Grads))._names
        return self

    def named(self) -> dict[str, Any]:
        """The values by the qualified names of their parameters.

        Returns
        -------
        dict
            The values themselves, in the order of ``params``.

        Raises
        ------
        ValueError
            A parameter has no name, as it didn't come from a module.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> layer = torch.nn.Linear(2, 1)
        >>> gradient(lambda: layer(torch.tensor([1., 2.])).sum(), Params(layer)).named()
        {'weight': tensor([[1., 2.]]), 'bias': tensor([1.])}
        """
        nameless = sum(key not in self._names for key in self._keys)
        if nameless:
            raise ValueError(
                f"named: expected parameters that came from a module, got {nameless} of {len(self)} without "
                "a name; Params(module), or Params of a dict, gives names"
            )
        return {self._names[key]: value for key, value in self._values.items()}

    # -- optimizers and vectors ---------------------------------------------------------------------------

    def nonfinite(self) -> list[Any]:
        """The parameters whose gradient has a NaN or infinity; this waits for the device.

        Returns
        -------
        list
            The qualified name of each, or the tensor itself where it has none. ``None`` counts as finite.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> layer = torch.nn.Linear(2, 1)
        >>> gradient(lambda: layer.weight.sum() / 0.0 + layer.bias.sum(), Params(layer)).nonfinite()
        ['weight']
        """
        present = self._present()
        found = zip(present, finite(list(present.values())), strict=True)
        return [self._names.get(key, self._keys[key]) for key, is_finite in found if not is_finite]

    def assign_(self, *, share: bool = False) -> None:
        """Set ``p.grad`` of each parameter, so that any ``torch.optim`` optimizer can step.

        Parameters
        ----------
        share : bool
            Hand over the values themselves. By default ``p.grad`` is a copy, so that neither what is later
            accumulated into it, nor later arithmetic on the ``Grads``, changes the other.

        Raises
        ------
        ValueError, TypeError
            A value doesn't fit its parameter in shape, device or dtype, or ``share`` is neither ``True`` nor
            ``False``; nothing is assigned then.

        Notes
        -----
        A parameter whose value is ``None`` is left alone, ``p.grad`` included. A value that carries a graph
        still does in ``p.grad``. The dtype is ``p.grad_dtype``, mostly that of ``p``; where ``None``, the
        value's own.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([1., 2.], requires_grad=True)
        >>> gradient(lambda: (w**2).sum(), Params([w])).assign_()
        >>> torch.optim.SGD([w], lr=0.25).step()
        >>> w.grad, w
        (tensor([2., 4.]), tensor([0.5000, 1.0000], requires_grad=True))
        """
        params, values, known = fitting("assign_", self._keys, self._present(), self._label)
        check_flags(share=share)
        if not share:
            values = clone_all(values, known)
        assign(params, values)

    def accumulate_(self, weight: float = 1.0) -> None:
        """Add ``weight`` times each value into ``p.grad``, which is set where there is none.

        Parameters
        ----------
        weight : number or 0-dim tensor
            The factor.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`assign_`, or ``weight`` is neither a number nor a 0-dim tensor.

        Notes
        -----
        The values themselves are never written into. ``None`` leaves ``p.grad`` alone.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([1., 2.], requires_grad=True)
        >>> for scale in (1, 10):
        ...     gradient(lambda: scale * w.sum(), Params([w])).accumulate_(0.5)
        >>> w.grad
        tensor([5.5000, 5.5000])
        """
        present = self._present()
        params, values, known = fitting("accumulate_", self._keys, present, self._label)
        grads = [p.grad for p in params]
        others = (p.grad for key, p in self._keys.items() if key not in present)
        kept = [*present.values(), *(grad for grad in others if grad is not None)]
        label = lambda i: self._label(list(present)[i])
        factor = factor_of(weight, params)
        if not (isinstance(factor, (int, float)) and factor == 1) and any(grad is None for grad in grads):
            values = widened(params, values, grads)
        totals = accumulated(grads, values, factor, known, label, kept)
        if totals is not grads:
            new = [i for i, total in enumerate(totals) if total is not grads[i]]
            assign([params[i] for i in new], [totals[i] for i in new])

    def to_vector(self) -> Tensor:
        """All values in one new vector, in the order of ``params``, each in row-major order.

        Returns
        -------
        Tensor
            One-dimensional, of the dtype that all values promote to, on the device of the first. ``None``
            gives as many zeros as its key has elements.

        Raises
        ------
        TypeError
            A value is no tensor, number or ``None``.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w, b = torch.tensor([1., 2.]), torch.tensor(3.)
        >>> gradient(lambda: (w**2).sum(), Params([w, b])).to_vector()
        tensor([2., 4., 0.])
        """
        return flatten(self._left("to_vector"))
