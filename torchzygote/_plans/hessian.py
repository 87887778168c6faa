"""The plan of a Hessian, as a callable. Made in ``plans``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _compressed, _cost_model, _engine, _state
from .._arguments import Prepared
from .._call_options import check_flags
from .._certificate import Comparison
from .._other_ways import another_may_do
from .._pulling import Options
from .._random import RandomState
from .._real_arguments import prepare_one
from .._torch_private import in_functorch_compiled, plain_tensors
from .._unfused import unfused, unfused_but_norms
from ..coloring.recovery import Recovery, symmetric_recovery
from ..hessians import diaghessian, hessian
from . import evaluation
from .base import Plan, is_nested, no_values, random_state
from .results import listing_all
from .signature import check_inputs

__all__ = ["HessianPlan"]


class HessianPlan(Plan):
    """Structure and coloring of the Hessian of one function, to be evaluated for new values.

    Made by :func:`plan_hessian`, or read from a file by :meth:`load`. Calling it gives what :func:`hessian`
    with ``sparse=True`` does, by one chunk of products with the colors' seeds.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import plan_hessian
    >>> plan = plan_hessian(lambda x: (x[1:] * x[:-1] ** 2).sum(), torch.rand(4))
    >>> plan(torch.tensor([1., 2., 3., 4.])).to_dense()
    tensor([[4., 2., 0., 0.],
            [2., 6., 4., 0.],
            [0., 4., 8., 6.],
            [0., 0., 6., 0.]])
    >>> plan.diagonal(torch.tensor([1., 2., 3., 4.]))
    tensor([4., 6., 8., 0.])

    References
    ----------
    Gebremedhin, Tarafdar, Pothen and Walther, "Efficient computation of sparse Hessians using coloring and
    automatic differentiation", INFORMS Journal on Computing 21 (2009).
    """

    _by_number = ()
    _diagonal: Recovery | None = None

    @property
    def sparsity(self) -> Tensor:
        """The structure, a ``torch.sparse_csr`` tensor of dtype bool."""
        return self.patterns[0].to_csr()

    @classmethod
    @_engine.entry_point
    def load(
        cls,
        path: str | os.PathLike[str],
        f: Callable[..., Any],
        *,
        mode: str = "auto",
        chunk_size: int | None = None,
        verify: bool = True,
    ) -> HessianPlan:
        """A plan that :meth:`save` wrote, for the same function.

        Parameters
        ----------
        path : path
            The file; nothing in it is executed.
        f : callable
            The function that the plan was made for.
        mode, chunk_size, verify
            As for :func:`plan_hessian`.

        Returns
        -------
        HessianPlan
            The plan, as :func:`plan_hessian` made it. ``f`` isn't run.

        Raises
        ------
        TypeError
            ``f`` is no function.
        ValueError
            The file is no such plan, or a damaged one; the message says why.
            ``mode`` is none of the words that :func:`plan_hessian` takes, or ``chunk_size`` is below 1.
        OSError
            The file can't be read.

        Examples
        --------
        >>> import os, tempfile, torch
        >>> from torchzygote import HessianPlan, plan_hessian
        >>> cubes = lambda x: (x**3).sum()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "cubes.npz")
        ...     plan_hessian(cubes, torch.rand(3)).save(path)
        ...     plan = HessianPlan.load(path, cubes)
        >>> plan(torch.ones(3)).values()
        tensor([6., 6., 6.])
        """
        _cost_model.check_mode(mode, _cost_model.HESSIAN_MODES)
        inputs, recovery, _ = cls._saved(path, f)
        return cls(f, inputs, recovery, mode=mode, chunk_size=chunk_size, verify=verify)

    def __call__(self, x: Any, *, dense: bool = False, create_graph: bool | None = None) -> Tensor:
        """The Hessian at ``x``.

        Parameters
        ----------
        x : number or array
            As the one that the plan was made for, with new values.
        dense : bool
            Give a dense matrix instead of a ``torch.sparse_csr`` one.
        create_graph : bool, optional
            As for :func:`gradient`.

        Returns
        -------
        torch.Tensor
            Shape ``(x.numel(), x.numel())``, of the dtype and device of ``x``. Sparse ones share their index
            arrays with other results of the plan: only read them, and copy what NumPy or SciPy is going to
            change (``csr_array(..., copy=True)``).

        Raises
        ------
        ValueError
            ``x`` has another shape, kind of dtype or device, or is complex; ``f(x)`` is no real scalar.
        TypeError
            ``x`` is a structure, a module or opaque; ``dense`` or ``create_graph`` is neither ``True`` nor
            ``False``.
        RuntimeError
            Inside a ``torch.func`` transform or ``torch.compile``, unless ``dense=True``.

        Warns
        -----
        UserWarning
            The check fails: the structure isn't that of ``f`` at ``x``. The answer is then the dense way's.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_hessian
        >>> plan = plan_hessian(lambda x: (x[1:] * x[:-1] ** 2).sum(), torch.rand(3))
        >>> plan(torch.tensor([1., 2., 3.]), dense=True)
        tensor([[4., 2., 0.],
                [2., 6., 4.],
                [0., 4., 0.]])
        """
        check_flags(dense=dense)
        if not dense:
            _compressed.refuse_nested(type(self).__name__)
        random = random_state()
        checked = self._checked((x,), create_graph)
        if checked.doubt is not None:
            self._give_up(checked.doubt, random)
            found = hessian(self._f, x, create_graph=create_graph)
            return found if dense else listing_all(found, create_graph)
        matrices = self._results.matrices(checked.values, checked.prepared.inputs, dense, create_graph)
        return checked.or_nan(matrices)[0]

    def values(self, x: Any, *, create_graph: bool | None = None) -> Tensor:
        """The values of the entries, row by row, as in ``.sparsity``.

        The part of a call that ``torch.compile`` and ``torch.func`` transforms can follow; where the check
        fails in there, the values and all their derivatives are NaN.

        Parameters
        ----------
        x : number or array
            As the one that the plan was made for, with new values.
        create_graph : bool, optional
            As for :func:`gradient`.

        Returns
        -------
        torch.Tensor
            Shape ``(nnz,)``, of the dtype and device of ``x``.

        Raises
        ------
        ValueError, TypeError
            As for a call of the plan.
        RuntimeError
            The check fails: the structure isn't that of ``f`` at ``x``. Or a derivative isn't finite, so
            that the check tells nothing, and the structure was given, loaded or ``is_local``.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_hessian
        >>> plan_hessian(lambda x: (x[1:] * x[:-1]).sum(), torch.rand(3)).values(torch.rand(3))
        tensor([1., 1., 1., 1.])
        """
        checked = self._checked((x,), create_graph)
        if checked.doubt is not None:
            raise no_values(self, checked.doubt)
        return checked.or_nan(checked.values)[0]

    def diagonal(self, x: Any, *, create_graph: bool | None = None) -> Tensor:
        """The diagonal of the Hessian; it needs fewer colors, as only neighbors must differ.

        Parameters
        ----------
        x : number or array
            As the one that the plan was made for, with new values.
        create_graph : bool, optional
            As for :func:`gradient`.

        Returns
        -------
        torch.Tensor
            ``h[i] = d²f/dx[i]²``, of the shape, dtype and device of ``x`` (0-dim for a number), as
            :func:`diaghessian` gives. Inside ``torch.func`` transforms and ``torch.compile``, NaN where the
            check fails.

        Raises
        ------
        ValueError
            ``x`` has another shape, kind of dtype or device, or is complex.
        TypeError
            ``x`` is a structure, a module or opaque.
        RuntimeError
            It is compiled before it was called once.

        Warns
        -----
        UserWarning
            The check fails: the structure isn't that of ``f`` at ``x``. The answer is then the dense way's.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_hessian
        >>> plan = plan_hessian(lambda x: (x[1:] * x[:-1] ** 2).sum(), torch.rand(4))
        >>> plan.diagonal(torch.tensor([1., 2., 3., 4.]))
        tensor([4., 6., 8., 0.])
        """
        return self._diagonal_at(x, create_graph)

    @_engine.entry_point
    def _diagonal_at(self, x: Any, create_graph: bool | None) -> Tensor:
        if 0 in self._inputs[0].shape:  # no column has a color, so that there is no product to be had
            (nothing,) = self._prepare((x,)).inputs
            return nothing.detach().clone()
        if self._diagonal is None and not _engine.compiling():
            with plain_tensors():
                self._diagonal = symmetric_recovery(self.patterns[0], diagonal=True)
        if self._diagonal is None:
            raise RuntimeError("HessianPlan: call diagonal once before it is compiled")
        random = random_state()
        # What isn't finite is an entry itself here: there are none beside it.
        checked = self._assessed(*self._run((x,), create_graph, self._diagonal), beside=False)
        if checked.doubt is not None:
            self._give_up(checked.doubt, random)
            found: Tensor = diaghessian(self._f, x, create_graph=create_graph)[0]
            return found
        return checked.or_nan(checked.values)[0].reshape(self._inputs[0].shape)

    def _prepare(self, args: tuple[Any, ...]) -> Prepared:
        name = type(self).__name__
        prepared = prepare_one(name, args[0])
        check_inputs(name, self._inputs, prepared.inputs)
        return prepared

    @_engine.entry_point
    def _run(
        self, args: tuple[Any, ...], create_graph: bool | None, recovery: Recovery | None = None
    ) -> tuple[Prepared, list[Tensor], list[Comparison]]:
        prepared = self._prepare(args)
        constants = self._constants_of(prepared, recovery)
        keep = _engine.keeps_graph(create_graph) or _engine.in_transform()
        options = Options(self._chunk_size, keep, False)
        ways = [self._mode]
        if _engine.compiling() and in_functorch_compiled():
            ways = ["reverse_over_reverse"]  # PyTorch's compiled derivatives of the other one fail, or crash
        elif self._mode == "auto":
            ways = ["reverse_over_reverse", "forward_over_reverse"]
            if is_nested():
                ways.reverse()
        with _state.differentiation(), unfused() if keep else unfused_but_norms():
            random = None if _engine.compiling() else RandomState()
            failed: Exception | None = None
            for way in ways:
                position = _state.mark()
                try:
                    values, comparisons = evaluation.hessian_values(
                        type(self).__name__, self._f, prepared, way, constants, options, random
                    )
                    failed = None
                    return prepared, [values], comparisons
                except Exception as error:  # an operation lacks a derivative that this way needs
                    if not another_may_do(error):
                        raise
                    failed = failed or error
                    _state.forget_since(position)
                    if random is not None:
                        random.restore()
        assert failed is not None
        try:
            raise failed
        finally:
            failed = None  # whose traceback holds this frame
