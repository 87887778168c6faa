"""Norms and clipping of a GradDict: the part of Grads that asks for no Params."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ._entries import TENSOR_TYPES, as_tensor
from .clipping import clip_norm, clip_value, total_norm, value_bounds
from .graddict import GradDict

__all__ = ["GradNorms"]

Self = TypeVar("Self", bound="GradNorms")


class GradNorms(GradDict):
    """A :class:`GradDict` with norms and clipping; ``None`` counts as zeros there, too."""

    def _present(self) -> dict[int, Tensor]:
        """What isn't ``None``, as tensors; not to be changed."""
        if TENSOR_TYPES.issuperset(map(type, self._values.values())):
            return self._values
        return {
            key: value if type(value) is Tensor else as_tensor(value, self._keys[key], "Grads")
            for key, value in self._values.items()
            if value is not None
        }

    def norm(self, norm_type: float = 2.0) -> Tensor:
        """The norm of all elements together, without waiting for the device.

        Parameters
        ----------
        norm_type : float
            The exponent; ``inf`` for the largest modulus. As in ``torch.nn.utils.clip_grad_norm_`` it is the
            norm of the tensors' norms.

        Returns
        -------
        Tensor
            A 0-dim tensor; float32 for half precision.

        Raises
        ------
        TypeError
            ``norm_type`` is no number, or a value no tensor, number or ``None``.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([3., -4.])
        >>> g = gradient(lambda: (w**2).sum() / 2, Params([w]))
        >>> g.norm(), g.norm(float("inf"))
        (tensor(5.), tensor(4.))
        """
        return total_norm(list(self._present().values()), norm_type)

    def clip_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the values down, in place, such that their norm is at most ``max_norm``.

        Parameters
        ----------
        max_norm : float
            The bound, at least 0.
        norm_type : float
            As for :meth:`norm`.
        error_if_nonfinite : bool
            Refuse a norm that isn't finite; this waits for the device.

        Returns
        -------
        Tensor
            The norm before.

        Raises
        ------
        ValueError
            ``max_norm`` is below zero, which would turn the gradients around, or NaN.
        RuntimeError
            The norm isn't finite and ``error_if_nonfinite`` is set; nothing is changed.

        Notes
        -----
        The results are those of ``torch.nn.utils.clip_grad_norm_``, to the bit in float32 and float64. Half
        precision is normed in float32.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([3., -4.])
        >>> g = gradient(lambda: (w**2).sum() / 2, Params([w]))
        >>> g.clip_norm_(1.0)
        tensor(5.)
        >>> g[w]
        tensor([ 0.6000, -0.8000])

        References
        ----------
        R. Pascanu, T. Mikolov, Y. Bengio: "On the difficulty of training recurrent neural networks",
        ICML 2013.
        """
        present = self._present()
        values, total = clip_norm(list(present.values()), max_norm, norm_type, error_if_nonfinite, True)
        self._values.update(zip(list(present), values, strict=True))
        return total

    def clip_norm(
        self: Self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Self:
        """A copy that is scaled down as :meth:`clip_norm_` does.

        Parameters
        ----------
        max_norm, norm_type, error_if_nonfinite
            As for :meth:`clip_norm_`.

        Returns
        -------
        Grads
            New ones, with the same ``params``; ``None`` stays ``None``.

        Raises
        ------
        ValueError, RuntimeError
            As for :meth:`clip_norm_`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([3., -4.])
        >>> g = gradient(lambda: (w**2).sum() / 2, Params([w]))
        >>> g.clip_norm(1.0)[w], g[w]
        (tensor([ 0.6000, -0.8000]), tensor([ 3., -4.]))
        """
        present = self._present()
        values, _ = clip_norm(list(present.values()), max_norm, norm_type, error_if_nonfinite, False)
        return self._like((self._values | dict(zip(present, values, strict=True))).values())

    def clip_value_(self: Self, lo: float, hi: float | None = None) -> Self:
        """Move each element into an interval, in place.

        Parameters
        ----------
        lo, hi : float
            The interval's ends; one bound ``v`` alone means from ``-v`` to ``v``.

        Returns
        -------
        Grads
            Itself. ``None`` stays ``None``, unless zero isn't within the interval.

        Raises
        ------
        ValueError
            ``lo > hi``, or a single bound below zero.
        TypeError
            A value is complex, or a bound no number.
        RuntimeError
            Values of an integer dtype can't hold a bound; nothing is changed.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([3., -4.])
        >>> gradient(lambda: (w**2).sum() / 2, Params([w])).clip_value_(1.0)[w]
        tensor([ 1., -1.])
        """
        self._values.update(self._clipped_value(lo, hi, in_place=True))
        return self

    def clip_value(self: Self, lo: float, hi: float | None = None) -> Self:
        """A copy whose elements are in an interval, as :meth:`clip_value_` moves them.

        Parameters
        ----------
        lo, hi : float
            As for :meth:`clip_value_`.

        Returns
        -------
        Grads
            New ones, with the same ``params``.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`clip_value_`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params, gradient
        >>> w = torch.tensor([3., -4.])
        >>> g = gradient(lambda: (w**2).sum() / 2, Params([w]))
        >>> g.clip_value(-1.0, 2.0)[w], g[w]
        (tensor([ 2., -1.]), tensor([ 3., -4.]))
        """
        return self._like((self._values | self._clipped_value(lo, hi, in_place=False)).values())

    def _clipped_value(self, lo: float, hi: float | None, in_place: bool) -> dict[int, Tensor]:
        bounds = value_bounds(lo, hi, in_place)
        if bounds[0] <= 0 <= bounds[1]:
            present = self._present()
        else:  # zeros don't stay zeros
            present = dict(zip(self._keys, self._left("clip_value"), strict=True))
        return dict(zip(present, clip_value(list(present.values()), bounds, in_place), strict=True))
