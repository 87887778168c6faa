"""Matrices that forward mode gave, against one plain pullback.

PyTorch's forward formulas, and its derivatives of backward formulas by the cotangent, are not always right,
and code under ``torch.no_grad`` counts in forward mode. Knows matrices, not how they were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._certificate import (
    Comparison,
    all_finite,
    is_plain,
    precision,
    pulled_agreement,
    random_vector,
    row_times,
)
from ._engine import Linearization
from ._other_ways import another_may_do
from ._repetition import may_be_lost
from ._row_cost import is_linear
from ._warning import warn
from .coloring.recovery import Recovery

__all__ = [
    "Probe",
    "explains_pullback",
    "is_confirmed",
    "is_plainly_confirmed",
    "pushes_what_is_pulled",
    "refuse_unpushable",
    "unpushable",
    "warn_disagreement",
]


def refuse_unpushable(caller: str, lin: Linearization) -> None:
    """Refuse forward mode through operators that it gives zeros for."""
    names = lin.survey().unpushable
    if names:
        raise unpushable(caller, names)


def unpushable(caller: str, names: Sequence[str]) -> RuntimeError:
    """The error that says so."""
    return RuntimeError(
        f"{caller}: mode 'forward' can't be had for operators made with torch.library, for which PyTorch "
        f"gives zeros there, found {', '.join(sorted(set(names)))}; use mode 'reverse'"
    )


def _precision(lin: Linearization, y: Tensor) -> float:
    return precision(lin.inputs, y, lin.coarsest())


# A cotangent, flat, and what it gives by each input.
Probe = tuple[Tensor, "list[Tensor | None]"]


def _pulled_probe(lin: Linearization, y: Tensor, rows: Tensor | None = None) -> Probe | None:
    """A random cotangent, flat, and what it gives by a plain pullback; zero but in ``rows``.

    ``None`` where ``f`` can't be pulled back: an operation has a forward derivative alone, or one that has
    been recorded was spoiled by writing in place.
    """
    cotangent = random_vector(y.numel()).to(y.device, y.dtype)
    if rows is not None:
        cotangent = torch.where(rows, cotangent, 0.0)
    # A copy: hooks may write into it.
    try:
        pulled = lin.pull_dense([cotangent.clone().view(y.shape)])
    except Exception as error:
        if not another_may_do(error):
            raise
        return None
    return cotangent, [None if g is None else g.detach() for g in pulled]


# Compares what matrices give for a cotangent with what was pulled back, in some rows only if these are given;
# ``None`` for a matrix that plainly agrees.
_Compare = Callable[[Tensor, "list[Tensor | None]", "Tensor | None"], "Sequence[Comparison | None]"]


def _is_explained(
    lin: Linearization, y: Tensor, compare: _Compare, finite_rows: Callable[[], Tensor]
) -> bool | None:
    """Whether the Jacobian agrees with one pullback; ``None`` if ``f`` can't be pulled back.

    Rows that aren't finite are left out: reverse mode spreads NaN over whole columns.
    """
    probe = _pulled_probe(lin, y)
    if probe is None:
        return None
    cotangent, pulled = probe
    comparisons = compare(cotangent, pulled, None)
    if _agree(comparisons, pulled):
        return True
    if all(g is None or all_finite(g) for g in pulled):
        return is_linear(lin) and _are_rounding(lin, y, comparisons, cotangent, pulled)
    rows = finite_rows()
    if bool(rows.all()):
        return False
    probe = _pulled_probe(lin, y, rows)
    return None if probe is None else _agree(compare(probe[0], probe[1], rows), probe[1])


def _are_rounding(
    lin: Linearization,
    y: Tensor,
    comparisons: Sequence[Comparison | None],
    cotangent: Tensor,
    pulled: Sequence[Tensor | None],
) -> bool:
    """Whether the differences are no larger than what rounding takes from these elements of a pullback."""
    which = [i for i, g in enumerate(pulled) if g is not None]

    def again(vector: Tensor) -> list[Tensor]:
        found = lin.pull_dense([vector.view(y.shape)])
        return [torch.zeros(()) if (g := found[i]) is None else g.detach() for i in which]

    with torch.no_grad():
        allowed = may_be_lost([g for g in pulled if g is not None], again, cotangent)
        for i, lost in zip(which, allowed, strict=True):
            if (one := comparisons[i]) is not None:
                one.excuse(lost.reshape(-1))
    return _agree(comparisons, pulled)


@torch.no_grad()
def _agree(comparisons: Sequence[Comparison | None], pulled: Sequence[Tensor | None]) -> bool:
    return all(
        one is None or bool((one.fine if g is None else one.fine | ~g.reshape(-1).isfinite()).all())
        for one, g in zip(comparisons, pulled, strict=True)
    )


def explains_pullback(
    lin: Linearization, y: Tensor, recovery: Recovery, values: Sequence[Tensor]
) -> bool | None:
    """Whether compressed values agree with one pullback; ``None`` if ``f`` can't be pulled back."""
    eps = _precision(lin, y)
    found = [v.detach() for v in values]

    def compare(cotangent: Tensor, pulled: list[Tensor | None], rows: Tensor | None) -> list[Comparison]:
        terms = found if rows is None else [torch.where(v.isfinite(), v, 0.0) for v in found]
        return pulled_agreement(recovery, terms, cotangent, pulled, eps)

    def finite_rows() -> Tensor:
        wrong = torch.zeros(recovery.rows, dtype=torch.bool, device=y.device)
        for i, v in enumerate(found):
            where = recovery.rows_of(i, v.device)[~v.isfinite()]
            wrong[where.to(y.device)] = True
        return ~wrong

    return _is_explained(lin, y, compare, finite_rows)


def pushes_what_is_pulled(lin: Linearization, y: Tensor, tangent: Tensor, pushed: Tensor) -> list[Comparison]:
    """Whether ``<v, J t>`` is ``<J' v, t>``; ``pushed`` is the product ``J t`` that forward mode gave.

    Whatever the structure is: a defect that reaches few elements only can pass.
    """
    probe = _pulled_probe(lin, y)
    if probe is None:
        return []
    cotangent, pulled = probe
    eps = _precision(lin, y)
    flat = [
        torch.zeros(x.numel(), device=x.device) if g is None else g
        for x, g in zip(lin.inputs, pulled, strict=True)
    ]
    columns = torch.cat([g.reshape(-1).double().to(y.device) for g in flat])
    left = cotangent.double() * pushed.detach().reshape(-1).double()
    right = columns * tangent.reshape(-1).to(columns)
    scale = torch.maximum(left.abs().sum(), right.abs().sum()).unsqueeze(0)
    if not all_finite(right):  # tells nothing
        return []
    return [Comparison(left.sum().unsqueeze(0), scale, right.sum().unsqueeze(0), eps)]


def is_plainly_confirmed(
    lin: Linearization, y: Tensor, matrices: Sequence[Tensor], probe: Probe | None = None
) -> bool:
    """Whether dense matrices, one per input, explain a pullback up to rounding in each element of it.

    Those that do are finite. ``probe``: a random cotangent, pulled back, if there is one.
    """
    probe = probe or _pulled_probe(lin, y)
    return probe is not None and all(
        one is None for one in _dense_comparisons(lin, y, matrices, *probe, None)
    )


def is_confirmed(lin: Linearization, y: Tensor, matrices: Sequence[Tensor]) -> bool:
    """Whether dense matrices, one per input, do; also where nothing can be pulled back to compare with."""

    def compare(
        cotangent: Tensor, pulled: list[Tensor | None], rows: Tensor | None
    ) -> list[Comparison | None]:
        return _dense_comparisons(lin, y, matrices, cotangent, pulled, rows)

    def finite_rows() -> Tensor:
        return torch.stack([J.detach().isfinite().all(1).to(y.device) for J in matrices]).all(0)

    return _is_explained(lin, y, compare, finite_rows) is not False


def _dense_comparisons(
    lin: Linearization,
    y: Tensor,
    matrices: Sequence[Tensor],
    cotangent: Tensor,
    pulled: Sequence[Tensor | None],
    rows: Tensor | None,
) -> list[Comparison | None]:
    """Of each matrix with what was pulled back by its input; ``None`` where they plainly agree."""
    finest, eps = max(torch.finfo(x.dtype).eps for x in (*lin.inputs, y)), None
    comparisons: list[Comparison | None] = []
    for matrix, expected in zip((J.detach() for J in matrices), pulled, strict=True):
        got = row_times(cotangent, matrix, rows)
        wanted = torch.zeros_like(got) if expected is None else expected.reshape(-1).to(got)
        if is_plain(got, wanted, finest):
            comparisons.append(None)
            continue
        eps = eps or _precision(lin, y)  # it takes a walk to tell
        if eps > finest and is_plain(got, wanted, eps):
            comparisons.append(None)
            continue
        scale = row_times(cotangent, matrix, rows, sizes=True)
        comparisons.append(Comparison(got, scale, wanted, eps, branches=True))
    return comparisons


def warn_disagreement(caller: str) -> None:
    """Say that reverse mode's answer is given."""
    warn(
        f"{caller}: forward mode gave another derivative of f than a plain pullback, so that reverse mode's "
        "is returned. Either f differs from call to call, or a part of it that runs under torch.no_grad "
        "depends on its arguments (use ignore_derivatives), or PyTorch's forward derivative of one of its "
        "operations is wrong; mode='reverse' spares the attempt",
    )
