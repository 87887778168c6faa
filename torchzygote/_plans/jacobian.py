"""The plan of a Jacobian, as a callable. Made in ``plans``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from .. import _compressed, _engine, _state
from .._arguments import Prepared
from .._call_arguments import implicit, prepared_by
from .._call_options import check_flags
from .._certificate import Comparison
from .._first_order import FirstOrder, must_be_pulled, record
from .._flags import held
from .._other_ways import another_may_do
from .._pulling import Options
from .._random import RandomState
from .._torch_private import plain_tensors
from ..coloring.recovery import Recovery, jacobian_recovery
from ..grads import Grads
from ..jacobians import jacobian
from ..params import Params
from ..sparsity.pattern import Pattern
from . import evaluation
from .base import Plan, no_values, random_state
from .evaluation import Constants
from .results import listing_all
from .signature import check_count, check_inputs, numbers_beside_arrays

__all__ = ["JacobianPlan", "by_mode"]

# Elements of arguments and results together.
_FEW = 1 << 13


class JacobianPlan(Plan):
    """Structure and coloring of the Jacobian of one function, to be evaluated for new values.

    Made by :func:`plan_jacobian`, or read from a file by :meth:`load`. Calling it gives what :func:`jacobian`
    with ``sparse=True`` does, by one chunk of products with the colors' seeds.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import plan_jacobian
    >>> plan = plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(5))
    >>> plan.colors
    tensor([0, 1, 0, 1, 0])
    >>> plan(torch.tensor([1., 2., 3., 4., 5.]))[0].to_dense()
    tensor([[2., 1., 0., 0., 0.],
            [0., 3., 2., 0., 0.],
            [0., 0., 4., 3., 0.],
            [0., 0., 0., 5., 4.]])
    >>> plan(torch.rand(6))
    Traceback (most recent call last):
    ValueError: JacobianPlan: expected the arguments that it was made for, but they differ; ...:
      input 0, shape: expected (5,), got (6,)

    References
    ----------
    Gebremedhin, Manne and Pothen, "What color is your Jacobian?", SIAM Review 47 (2005).
    """

    _cause = (
        "f isn't the function that the plan was made for, or an argument outside argnums has changed that "
        "the structure depends on"
    )
    _made_for: int | None = None  # how many arguments; a file doesn't tell

    @property
    def sparsity(self) -> tuple[Tensor, ...]:
        """The structure of each matrix, ``torch.sparse_csr`` tensors of dtype bool."""
        return tuple(pattern.to_csr() for pattern in self.patterns)

    @classmethod
    @_engine.entry_point
    def load(
        cls,
        path: str | os.PathLike[str],
        f: Callable[..., Any],
        *,
        argnums: int | Sequence[int] | None = None,
        chunk_size: int | None = None,
        verify: bool = True,
    ) -> JacobianPlan:
        """A plan that :meth:`save` wrote, for the same function.

        Parameters
        ----------
        path : path
            The file; nothing in it is executed.
        f : callable
            The function that the plan was made for.
        argnums : int or sequence of int, optional
            As for :func:`plan_jacobian`; by default those that the plan was made with.
        chunk_size, verify
            As for :func:`plan_jacobian`.

        Returns
        -------
        JacobianPlan
            The plan, as :func:`plan_jacobian` made it. ``f`` isn't run.

        Raises
        ------
        TypeError
            ``f`` is no function.
        ValueError
            The file is no such plan, or a damaged one; the message says why. Or
            ``chunk_size`` is below 1.
        OSError
            The file can't be read.

        Examples
        --------
        >>> import os, tempfile, torch
        >>> from torchzygote import JacobianPlan, plan_jacobian
        >>> squares = lambda x: x**2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "squares.npz")
        ...     plan_jacobian(squares, torch.rand(3)).save(path)
        ...     plan = JacobianPlan.load(path, squares)
        >>> plan(torch.ones(3))[0].values()
        tensor([2., 2., 2.])
        """
        inputs, recovery, saved = cls._saved(path, f)
        # whether the mode was asked for isn't known any more
        return cls(
            f,
            inputs,
            recovery,
            argnums=saved if argnums is None else argnums,
            mode=recovery.mode,
            chunk_size=chunk_size,
            verify=verify,
        )

    # The first is for the argument of a lambda without annotations, which fits every type.
    @overload
    def __call__(self, x: NoReturn, /, *, dense: bool = False, create_graph: Any = None) -> Any: ...
    @overload
    def __call__(
        self, params: Params, /, *, dense: bool = False, create_graph: bool | None = None
    ) -> Grads: ...
    @overload
    def __call__(
        self, *args: Any, dense: bool = False, create_graph: bool | None = None
    ) -> tuple[Any, ...]: ...
    def __call__(self, *args: Any, dense: bool = False, create_graph: bool | None = None) -> Any:
        """The Jacobians at ``args``.

        Parameters
        ----------
        *args
            As those that the plan was made for, with new values.
        dense : bool
            Give dense matrices instead of ``torch.sparse_csr`` ones.
        create_graph : bool, optional
            As for :func:`gradient`.

        Returns
        -------
        tuple or Grads
            As :func:`jacobian` gives. Sparse matrices share their index arrays with other results of the
            plan: only read them, and copy what NumPy or SciPy is going to change
            (``csr_array(..., copy=True)``).

        Raises
        ------
        ValueError
            An argument has another shape, kind of dtype or device, there are more or fewer than the plan was
            made for, or ``f`` returns another number of elements.
        TypeError
            ``dense`` or ``create_graph`` is neither ``True`` nor ``False``.
        RuntimeError
            Inside a ``torch.func`` transform or ``torch.compile``, unless ``dense=True``.

        Warns
        -----
        UserWarning
            The check fails: the structure isn't that of ``f`` here. The answer is then the dense way's.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_jacobian
        >>> plan = plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(3))
        >>> plan(torch.tensor([1., 2., 3.]), dense=True)
        (tensor([[2., 1., 0.],
                [0., 3., 2.]]),)
        """
        check_flags(dense=dense)
        if not dense:
            _compressed.refuse_nested(type(self).__name__)
        random = random_state()
        checked = self._checked(args, create_graph)
        if checked.doubt is not None:
            self._give_up(checked.doubt, random)
            found = jacobian(self._f, *args, argnums=self._argnums, create_graph=create_graph)
            if implicit(args) is None:  # by numbers, beside the arrays here as well
                inputs = checked.prepared.results(checked.prepared.inputs)
                found = tuple(J if x is None else J.to(x.device) for J, x in zip(found, inputs, strict=True))
            return found if dense else _all_as_csr(found, create_graph)
        matrices = self._results.matrices(checked.values, checked.prepared.inputs, dense, create_graph)
        matrices = checked.or_nan(matrices)
        params = implicit(args)
        return checked.prepared.results(matrices) if params is None else Grads(params, matrices)

    def values(self, *args: Any, create_graph: bool | None = None) -> tuple[Tensor, ...]:
        """The values of each matrix's entries, row by row, as in ``.sparsity``.

        The part of a call that ``torch.compile`` and ``torch.func`` transforms can follow; where the check
        fails in there, the values and all their derivatives are NaN.

        Parameters
        ----------
        *args
            As those that the plan was made for, with new values.
        create_graph : bool, optional
            As for :func:`gradient`.

        Returns
        -------
        tuple of torch.Tensor
            For each array or number differentiated by a tensor of shape ``(nnz,)``, of the dtype that
            :func:`jacobian` gives, on the device of the argument.

        Raises
        ------
        ValueError
            As for a call of the plan.
        RuntimeError
            The check fails: the structure isn't that of ``f`` at these arguments. Or a derivative isn't
            finite, so that the check tells nothing, and the structure was given, loaded or ``is_local``.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_jacobian
        >>> plan_jacobian(lambda x: x[1:] - x[:-1], torch.rand(3)).values(torch.rand(3))
        (tensor([-1.,  1., -1.,  1.]),)
        """
        checked = self._checked(args, create_graph)
        if checked.doubt is not None:
            raise no_values(self, checked.doubt)
        return tuple(checked.or_nan(checked.values))

    def _agrees_with_reverse(self, args: tuple[Any, ...]) -> bool:
        """Whether forward mode gives at ``args`` what a plain pullback does; asked once, for a new plan."""
        random = RandomState()
        try:
            _, _, comparisons = self._run(args, False, True)
        finally:
            random.restore()
        return self.mode == "reverse" or all(bool(one.fine.all()) for one in comparisons)

    def _prepare(self, args: tuple[Any, ...]) -> Prepared:
        _, prepared = prepared_by(type(self).__name__, args, self._argnums, arrays_only=True)
        numbers_beside_arrays(prepared)
        name = type(self).__name__
        check_inputs(name, self._inputs, prepared.inputs, args, self._argnums)
        check_count(name, self._f, self._made_for, args)
        return prepared

    @_engine.entry_point
    def _run(
        self, args: tuple[Any, ...], create_graph: bool | None, crosscheck: bool = False
    ) -> tuple[Prepared, list[Tensor], list[Comparison]]:
        """``crosscheck``: against reverse mode, instead of one more product of the plan's own mode."""
        prepared = self._prepare(args)
        constants = self._constants_of(prepared)
        keep = _engine.keeps_graph(create_graph) or _engine.in_transform()
        options = Options(self._chunk_size, keep, False)
        name = type(self).__name__
        with held(implicit(args)), _state.differentiation():
            first = record(name, self._f, prepared, keep, self.mode == "forward")
            y = first.y
            if y.numel() != self._recovery.rows:
                raise ValueError(
                    f"{name}: expected f to return {self._recovery.rows} elements as when the plan was made, "
                    f"got {y.numel()} (shape {tuple(y.shape)})"
                )
            if not first.lin.roots:
                return prepared, _zeros(self.patterns, prepared), []
            return prepared, *self._values_of(first, constants, options, crosscheck)

    def _values_of(
        self, first: FirstOrder, constants: Constants, options: Options, crosscheck: bool
    ) -> tuple[list[Tensor], list[Comparison]]:
        """By the mode of the plan; one that chose forward mode itself goes over to reverse where it must."""
        choosing = self._mode == "auto" and not _engine.compiling()
        if constants.recovery.mode == "reverse":
            try:
                return evaluation.jacobian_values(first, constants, options)
            except NotImplementedError:  # a custom function may have a forward derivative alone
                if not choosing:
                    raise
                found = self._over_to("forward", first, constants, options)
                _state.forget_since(first.position, but_inner=True)
                return found
        if not (choosing and must_be_pulled(first)):
            position = _state.mark()
            try:
                found = evaluation.jacobian_values(first, constants, options, crosscheck)
            except Exception as error:  # an operation has no forward derivative
                if not (choosing and another_may_do(error)):
                    raise
                _state.forget_since(position)
            else:
                # nothing is pulled back: what hooks wait for never comes
                _state.forget_since(first.position, but_inner=True)
                return found
        return self._over_to("reverse", first, constants, options)

    def _over_to(
        self, mode: str, first: FirstOrder, constants: Constants, options: Options
    ) -> tuple[list[Tensor], list[Comparison]]:
        """By the other mode, from now on if that doesn't fail."""
        with plain_tensors():
            recovery = by_mode(self.patterns, mode)
        constants = self._constants_for(recovery, constants.dtype, constants.device)
        found = evaluation.jacobian_values(first, constants, options)
        self._recovery = recovery
        return found

    def _color_rows(self) -> None:
        """Go over to reverse mode."""
        self._recovery = by_mode(self.patterns, "reverse")


def by_mode(patterns: Sequence[Pattern], mode: str) -> Recovery:
    """What a plan colors in this mode: columns, unless rows take fewer colors.

    Compiled, a pushforward takes no more than a pullback (3/4 of it where memory is what it takes). Where
    calls are what counts, uncompiled ones add up: forward mode has a pullback more, so that rows of small
    square matrices are preferred where they take as many.
    """
    rows, columns = patterns[0].shape[0], sum(pattern.shape[1] for pattern in patterns)
    once = 0.5 if rows == columns and rows + columns <= _FEW else 0.0
    found = jacobian_recovery(patterns, mode, forward_cost=1.0, forward_once=once, refine=True)
    assert found is not None
    return found


def _zeros(patterns: Sequence[Pattern], prepared: Prepared) -> list[Tensor]:
    """The values of a constant's derivative."""
    return [
        torch.zeros(pattern.nnz, dtype=x.dtype, device=x.device)
        for pattern, x in zip(patterns, prepared.inputs, strict=True)
    ]


def _all_as_csr(found: Any, create_graph: bool | None) -> Any:
    """Dense results as CSR that list every entry; vectors and ``None`` as they are."""
    if isinstance(found, Grads):
        return Grads(found.params, [listing_all(found[x], create_graph) for x in found.params])
    return tuple(None if J is None else listing_all(J, create_graph) for J in found)
