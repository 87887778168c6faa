"""What plans of Jacobians and of Hessians have in common.

Holds index structure and the function; it must not know how structure is detected or colored.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _cost_model, _engine
from .._arguments import Prepared, type_name
from .._call_arguments import is_implicit
from .._call_options import check_flags
from .._certificate import Comparison, warn_mismatch, warn_unchecked
from .._dtypes import promoted, real_dtype
from .._numbers import may_branch
from .._random import RandomState
from .._torch_private import plain_tensors
from ..coloring.recovery import Recovery
from ..pictures import draw
from ..sparsity.pattern import Pattern
from . import evaluation, files
from .results import PlanResults
from .signature import InputSpec

__all__ = ["Plan", "common_dtype", "is_nested", "no_values", "random_state"]

Self = TypeVar("Self", bound="Plan")


Doubt = Literal["contradicted", "unknown"]


class Checked(NamedTuple):
    """Values of each matrix's entries, and what is wrong with them; ``verdict``, to be traced: nothing is."""

    prepared: Prepared
    values: list[Tensor]
    doubt: Doubt | None
    verdict: Tensor | None

    def or_nan(self, results: Sequence[Tensor]) -> list[Tensor]:
        """What was made of the values, or NaN."""
        if self.verdict is None:
            return list(results)
        return evaluation.or_nan(results, self.verdict, self.prepared.inputs)


class Plan:
    """What both kinds of plan have in common."""

    _by_number: tuple[int, ...] = (-1,)  # the shape of a result by a number
    _cause = "f isn't the function that the plan was made for"  # one more that a mismatch may have

    def __init__(
        self,
        f: Callable[..., Any],
        inputs: Sequence[InputSpec],
        recovery: Recovery,
        *,
        argnums: int | Sequence[int] | None = None,
        mode: str = "auto",
        chunk_size: int | None = None,
        verify: bool = True,
        detected: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._f = f
        self._inputs = tuple(inputs)
        self._recovery = recovery
        self._argnums = argnums
        self._mode = mode
        self._chunk_size = _cost_model.check_chunk_size(chunk_size)
        check_flags(verify=verify)
        self._verify = verify
        self._results = PlanResults(recovery.patterns, self._by_number)
        # Where a product isn't finite the check tells nothing; this structure needs none.
        self._holds = detected and not any(pattern.is_local for pattern in recovery.patterns)
        self._constants: dict[tuple[str, torch.dtype, torch.device], evaluation.Constants] = {}
        self._compiled: Callable[..., Any] | None = None
        devices = {spec.device for spec in inputs}
        if len(devices) != 1:
            raise ValueError(
                f"{type(self).__name__}: expected all arrays on one device, got {sorted(devices)}; move them "
                "to one, or leave those of another device out of argnums"
            )
        dtypes = [getattr(torch, spec.dtype) for spec in inputs]
        if devices == {"cpu"} or torch.cuda.is_available():  # made now: a compiler can't make them
            # A file tells only what kind of device it was: then the current one of these.
            place = torch.empty(0, device=devices.pop()).device if device is None else device
            self._constants_for(self._recovery, common_dtype(dtypes), place)

    @property
    def colors(self) -> Tensor:
        """The color of each column or row, counted from 0: those of one color share a product.

        In mode ``"reverse"`` there is one for each row, otherwise one for each column, those of several
        arguments one after the other.
        """
        return self._recovery.coloring.colors

    @property
    def ncolors(self) -> int:
        """How many colors: an evaluation takes so many products, and one for the check."""
        return self._recovery.ncolors

    @property
    def mode(self) -> str:
        """What is colored: ``"forward"`` columns, ``"reverse"`` rows, ``"symmetric"`` both at once."""
        return self._recovery.mode

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The structure of each matrix as a :class:`~torchzygote.sparsity.pattern.Pattern`.

        They print as a picture, and know where they come from: ``is_local``, ``operators``, ``unknown``.
        """
        return self._recovery.patterns

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, without its function, to a file, which is an ``.npz`` file whatever its name.

        Parameters
        ----------
        path : path
            The file holds arrays only: structure, coloring and ``argnums``.

        Raises
        ------
        OSError
            The file can't be written.

        Examples
        --------
        >>> import os, tempfile, torch
        >>> from torchzygote import JacobianPlan, plan_jacobian
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "plan.npz")
        ...     plan_jacobian(lambda x: x[1:] - x[:-1], torch.rand(1000)).save(path)
        ...     JacobianPlan.load(path, lambda x: x[1:] - x[:-1]).ncolors
        2
        """
        contents = files.Contents(self._inputs, self._recovery, self._argnums)
        files.write(path, type(self).__name__, contents)

    @classmethod
    def _saved(cls, path: str | os.PathLike[str], f: object) -> files.Contents:
        """What the file holds, for a plan of ``f``."""
        if not callable(f):
            raise TypeError(
                f"{cls.__name__}.load: f: expected the function that the plan was made for, got "
                f"{type_name(f)}; a file holds no function"
            )
        return files.read(path, cls.__name__)

    def spy(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture of pattern and colors.

        Parameters
        ----------
        path : path, optional
            Where to write it; the ending says in which format.

        Returns
        -------
        matplotlib.figure.Figure
            Needs matplotlib: ``pip install "torchzygote[plot]"``.

        Raises
        ------
        ImportError
            matplotlib isn't there.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_jacobian
        >>> figure = plan_jacobian(lambda x: x[1:] - x[:-1], torch.rand(5)).spy()
        >>> len(figure.axes)
        1
        """
        return draw(self._recovery, repr(self).split("\n")[0], path)

    def compile(self: Self, **options: Any) -> Self:
        """Evaluate by ``torch.compile(..., fullgraph=True, **options)`` from now on.

        Parameters
        ----------
        **options
            For :func:`torch.compile`.

        Returns
        -------
        Plan
            Itself. Its next call compiles, and so does the first one with another dtype.

        Raises
        ------
        RuntimeError
            Not here but as the plan is called: by ``Params``, which a compiler can't follow.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import plan_jacobian
        >>> plan = plan_jacobian(lambda x: x**2, torch.rand(3)).compile(backend="eager")
        >>> plan(torch.ones(3))[0].values()
        tensor([2., 2., 2.])
        """
        from .._torch_private.compiled_plans import compiler_options

        options = compiler_options({"fullgraph": True, "dynamic": False, **options})
        self._compiled = torch.compile(_with_code_of_its_own(self._values_and_doubts), **options)
        return self

    def _prepare(self, args: tuple[Any, ...]) -> Prepared:
        """The arguments as tensors; those that don't fit are refused."""
        raise NotImplementedError

    def _values_and_doubts(self, *args: Any) -> tuple[list[Tensor], Tensor | None]:
        """Values, and whether they are contradicted, unknown or doubtful, as tensors alone."""
        _, values, comparisons = self._run(args, None)
        if not comparisons:
            return values, None
        doubts = [torch.stack([~c.fine.all(), c.unknown.any(), c.faint.any()]) for c in comparisons]
        return values, torch.stack(doubts).any(0)

    def _run(
        self, args: tuple[Any, ...], create_graph: bool | None
    ) -> tuple[Prepared, list[Tensor], list[Comparison]]:
        """Values of each matrix, and what the check compared."""
        raise NotImplementedError

    def _checked(self, args: tuple[Any, ...], create_graph: bool | None) -> Checked:
        """Values, and whether they are right."""
        if self._compiled is not None and not create_graph and not is_nested():
            prepared = self._prepare(args)  # what doesn't fit is refused here: a compiler hides the message
            if is_implicit(args):
                raise RuntimeError(
                    f"{type(self).__name__}: expected arguments, because it is compiled, got Params, whose "
                    "tensors f finds by itself, which a compiler can't follow; make a plan with the tensors "
                    "as arguments (torch.func.functional_call calls a module with them), or don't compile it"
                )
            self._constants_of(prepared)
            random = random_state()
            # tensors: a compiler can't follow how a NumPy array becomes one
            values, doubts = self._compiled(*prepared.arguments(prepared.inputs))
            wrong, unknown, faint = (False,) * 3 if doubts is None else doubts.tolist()
            if not (wrong or faint):  # else compiled code can't look again
                return Checked(prepared, list(values), self._doubt(False, unknown), None)
            if random is not None:
                random.restore()
        prepared, values, comparisons = self._run(args, create_graph)
        return self._assessed(prepared, values, comparisons)

    def _assessed(
        self, prepared: Prepared, values: list[Tensor], comparisons: Sequence[Comparison], beside: bool = True
    ) -> Checked:
        """``beside``: what isn't finite may hide other entries."""
        asked = beside and not self._holds
        if is_nested():
            right = [one.fine & ~one.unknown if asked else one.fine for one in comparisons]
            verdict = torch.stack([one.all() for one in right]).all() if right else None
            return Checked(prepared, values, None, verdict)
        wrong = not all(bool(one.fine.all()) for one in comparisons)
        unknown = asked and not wrong and any(bool(one.unknown.any()) for one in comparisons)
        return Checked(prepared, values, self._doubt(wrong, unknown), None)

    def _doubt(self, wrong: bool, unknown: bool) -> Doubt | None:
        if wrong:
            return "contradicted"
        return "unknown" if unknown and not self._holds else None

    def _give_up(self, doubt: Doubt, random: RandomState | None) -> None:
        """Say why the dense way is taken, which is to draw the random numbers of this call."""
        if doubt == "unknown":
            warn_unchecked(type(self).__name__)
        else:
            warn_mismatch(type(self).__name__, self._recovery, self._cause)
        if random is not None:
            random.restore()

    def _constants_of(self, prepared: Prepared, recovery: Recovery | None = None) -> evaluation.Constants:
        """Those for a call."""
        inputs = prepared.inputs
        dtype = common_dtype([x.dtype for x in inputs])
        return self._constants_for(recovery or self._recovery, dtype, inputs[0].device)

    def _constants_for(
        self, recovery: Recovery, dtype: torch.dtype, device: torch.device
    ) -> evaluation.Constants:
        """Seeds, check and positions as tensors of this dtype, made once."""
        key = (recovery.mode, dtype, device)
        found = self._constants.get(key)
        if found is None:
            if device.type == "meta":
                raise RuntimeError(
                    f"{type(self).__name__}: expected arguments with numbers, got tensors on the meta "
                    "device; make a plan of tensors elsewhere. plan_hessian, and plan_jacobian with "
                    "mode='reverse', tell the sparsity of such ones"
                )
            if _engine.compiling():
                raise RuntimeError(
                    f"{type(self).__name__}: was made for another dtype than {dtype} on {device}; call it "
                    "once with such arguments before it is compiled"
                )
            with plain_tensors():
                found = evaluation.Constants(recovery, dtype, device, self._verify)
            self._constants[key] = found
        return found

    def __repr__(self) -> str:
        shape = f"{self._recovery.rows}×{'|'.join(map(str, self._recovery.widths))}"
        entries = sum(pattern.nnz for pattern in self.patterns)
        cells = self._recovery.rows * sum(self._recovery.widths)
        head = (
            f"{type(self).__name__}: {shape}, {_counted(entries, 'nonzero')} "
            f"({entries / max(1, cells):.2g}), {_counted(self.ncolors, 'color')}, mode {self.mode!r}"
        )
        pictures = [line for pattern in self.patterns for line in pattern.picture()]
        return "\n".join([head, *pictures])


def _with_code_of_its_own(method: Any) -> Any:
    """A copy of a bound method: ``torch.compile`` counts by code object, and after eight it gives up."""
    f = method.__func__
    copied = types.FunctionType(
        f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__
    )
    return types.MethodType(copied, method.__self__)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def is_nested() -> bool:
    return not may_branch()


def random_state() -> RandomState | None:
    """The random state before a call that may have to begin again; nested ones never do."""
    return None if is_nested() else RandomState()


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The real dtype that seeds for arguments of these dtypes have."""
    return real_dtype(promoted(dtypes))


def no_values(plan: Plan, doubt: Doubt) -> RuntimeError:
    if doubt == "unknown":
        reason = "some derivatives aren't finite, so that entries beside them couldn't be checked"
    else:
        reason = (
            "a product with a random vector contradicts the values, so that the structure isn't that of f at "
            "these arguments"
        )
    return RuntimeError(
        f"{type(plan).__name__}: {reason}; call the plan itself for the dense answer, or make a new plan"
    )
