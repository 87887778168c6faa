"""Checking a compressed derivative against one plain product with a random vector.

Knows where entries are, not how they were computed.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._cached_draws import MOST_KEPT, generator_for, kept
from ._torch_private import is_missing_tangent, rounding_of_products
from ._warning import warn
from .coloring.recovery import Recovery

__all__ = [
    "Comparison",
    "agreement",
    "all_finite",
    "compared",
    "is_plain",
    "precision",
    "probe_parts",
    "probe_rows",
    "pulled_agreement",
    "random_vector",
    "row_times",
    "slack",
    "warn_mismatch",
    "warn_unchecked",
    "wide",
]


def random_vector(numel: int) -> Tensor:
    """Numbers between 1/2 and 3/2 with random signs, float64 on the CPU, the same for each length."""
    if torch.compiler.is_compiling():
        return _new_vector(numel)
    if numel > MOST_KEPT:
        return _long_vector(numel)
    return _kept_vector(numel).clone()  # hooks in f may write into what they are given


def _new_vector(numel: int) -> Tensor:
    generator = generator_for(numel)
    sizes, signs = torch.rand(2, numel, generator=generator, dtype=torch.float64, device="cpu")
    vector: Tensor = (sizes + 0.5) * torch.where(signs < 0.5, -1.0, 1.0)
    return vector


def _long_vector(numel: int) -> Tensor:
    """Products of two short ones, repeated; no two elements have the same pair of factors.

    To draw so many takes longer than a product with them (200 000: 3.7 ms, so 0.3).
    """
    first, second = (_kept_roots(n).repeat(-(-numel // n))[:numel] for n in _PERIODS)
    return first.mul_(second)


@kept
def _kept_roots(numel: int) -> Tensor:
    vector = _new_vector(numel)
    return vector.abs().sqrt_().copysign_(vector)


_kept_vector = kept(_new_vector)
_ELEMENTS_AT_A_TIME = 1 << 20
_SINGLE = torch.finfo(torch.float32).eps
_PERIODS = (65_521, 65_519)  # without a common factor


def probe_rows(recovery: Recovery) -> Tensor:
    """Random seeds, float64 on the CPU, that a plain product is taken with; no entry is near zero.

    One row, or for a diagonal one for each color: the other entries of a row are unknown there, so that only
    products with the columns of one color can be compared.
    """
    numel = recovery.rows if recovery.mode == "reverse" else sum(recovery.widths)
    probe = random_vector(numel)
    if recovery.mode != "diagonal":
        return probe.unsqueeze(0)
    colors = torch.arange(recovery.ncolors, device="cpu").unsqueeze(1)
    rows: Tensor = torch.where(recovery.coloring.colors == colors, probe, 0.0)
    return rows


def probe_parts(recovery: Recovery, probes: Tensor) -> Iterator[Tensor]:
    """The probe's elements of one color each; none for a diagonal, whose probes are such parts."""
    if recovery.mode != "diagonal":
        colors = recovery.coloring.colors.to(probes.device)
        for color in range(recovery.ncolors):
            yield torch.where(colors == color, probes, 0.0)


def precision(inputs: Sequence[Tensor], y: Tensor, recorded: float = 0.0) -> float:
    """Relative spacing of the coarsest numbers that the derivative is computed with.

    ``recorded``: of those in between, where they have been recorded.
    """
    coarsest = max(recorded, *(torch.finfo(x.dtype).eps for x in (*inputs, y)))
    device = y.device.type
    if torch.is_autocast_enabled(device):
        coarsest = max(coarsest, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if coarsest >= _SINGLE:
        coarsest = max(coarsest, rounding_of_products(device))
    return coarsest


class Comparison:
    """What plain products gave, element by element, beside what the values explain of it.

    ``got`` is a sum of terms whose sizes sum up to ``scale``; it may be the small remainder of large numbers
    of the same computation, listed in ``near`` (element by element) or ``beside`` (any of them).
    ``mirrored``: some terms were read from other rows, which can break down where the product with this one
    doesn't. ``branches``: the values may be looked at, which saves asking of each whether it is finite.
    """

    __slots__ = ("_breaks_down", "_eps", "_excused", "_for_the_largest", "_own", "_refuted", "difference")

    def __init__(
        self,
        got: Tensor,
        scale: Tensor,
        expected: Tensor,
        eps: float,
        *,
        near: Tensor | None = None,
        beside: Tensor | None = None,
        mirrored: bool = False,
        branches: bool = False,
    ) -> None:
        of_terms, of_largest = slack(eps)
        sound = branches and all_finite(scale.detach())
        finite = scale if sound else _finite(scale)
        self._own = of_terms * finite
        largest = finite.amax() if finite.numel() > 0 else finite.sum()
        if near is not None:
            self._own = self._own + of_largest * _finite(near)
        for others in (near, beside):
            if others is not None and others.numel() > 0:
                largest = torch.maximum(largest, _finite(others).amax())
        self.difference = (got - expected).abs()
        self._eps = eps
        self._for_the_largest = of_largest * largest
        if sound:  # and so is `got`
            self._breaks_down = torch.zeros_like(got, dtype=torch.bool)
        elif mirrored:
            self._breaks_down = ~torch.isfinite(got)
        else:
            self._breaks_down = ~torch.isfinite(got) & ~torch.isfinite(expected)
        self._refuted: Tensor | None = None
        self._excused: Tensor | None = None

    @property
    def fine(self) -> Tensor:
        """Where they agree up to rounding, or break down."""
        agree = self.difference <= self._own + self._for_the_largest
        if self._refuted is not None:
            agree = agree & ~self._refuted
        if self._excused is not None:
            agree = agree | self._excused
        return agree | self._breaks_down

    @property
    def faint(self) -> Tensor:
        """Where they agree only because the largest element is so large; nowhere in half precision."""
        if self._eps >= _HALF:
            return torch.zeros_like(self._breaks_down)
        return (self.difference > self._own) & (self.difference <= self._own + self._for_the_largest)

    @property
    def unknown(self) -> Tensor:
        """Where they break down, so that nothing is known of the entries."""
        return self._breaks_down

    def beyond(self, noise: Tensor) -> Tensor:
        """What is faint, and far larger than ``noise``, the rounding of these elements."""
        return self.faint & (slack(self._eps)[0] * self.difference > noise)

    def refute(self, wrong: Tensor) -> None:
        """These elements are not fine after all."""
        self._refuted = wrong

    @property
    def doubted(self) -> Tensor | None:
        """What was refuted, if all else is fine."""
        nothing = torch.zeros_like(self._breaks_down)
        refuted = nothing if self._refuted is None else self._refuted
        return refuted if bool((self.fine | refuted).all()) else None

    def acquit(self) -> None:
        """What was refuted is fine after all."""
        self._refuted = None

    def excuse(self, allowed: Tensor) -> None:
        """Elements that differ by no more are fine; in half precision that could be anything."""
        if self._eps < _HALF:
            self._excused = self.difference <= allowed


def _finite(sizes: Tensor) -> Tensor:
    return torch.where(torch.isfinite(sizes), sizes, 0.0)


def agreement(
    recovery: Recovery,
    values: Sequence[Tensor],
    probes: Tensor,
    probed: Sequence[Tensor],
    eps: float,
    branches: bool,
) -> list[Comparison]:
    """Whether the values explain each element of what the plain products gave.

    ``probed``: the products with ``probes``, as :func:`torchzygote._colored.collect` returns them.
    ``branches``: the program may look at values; nothing is compared any further then where all is plain.
    """
    if recovery.mode == "diagonal":
        return _diagonal_agreement(recovery, values[0], probes, probed[0], eps, branches)
    probe = probes[0]
    if branches and _are_plainly_full(recovery, values, probe, probed, eps):
        return []
    if recovery.mode == "reverse":
        return pulled_agreement(recovery, values, probe, probed, eps)
    total: Tensor | None = None
    scales: Tensor | None = None
    parts = torch.split(probe, recovery.widths)
    for i, part in enumerate(parts):
        device = values[i].device
        got, scale = _summed(recovery, i, values[i], part.to(device), by_rows=False)
        total = got if total is None else total + got.to(total)
        scales = scale if scales is None else scales + scale.to(scales)
    assert total is not None
    assert scales is not None
    wanted = probed[0].reshape(-1).to(total)
    mirrored = recovery.mode == "symmetric"
    return [Comparison(total, scales, wanted, eps, mirrored=mirrored, branches=branches)]


@torch.no_grad()
def _are_plainly_full(
    recovery: Recovery, values: Sequence[Tensor], probe: Tensor, probed: Sequence[Tensor], eps: float
) -> bool:
    """Whether all matrices are full, and plainly give the products: the sizes of terms take as long again."""
    if not all(recovery.is_full(i) for i in range(len(values))):
        return False
    whole = [v.reshape(pattern.shape) for v, pattern in zip(values, recovery.patterns, strict=True)]
    if recovery.mode == "reverse":
        got = [row_times(probe.to(J.device), J) for J in whole]
    else:
        parts = torch.split(probe, recovery.widths)
        products = [row_times(part.to(J.device), J.t()) for part, J in zip(parts, whole, strict=True)]
        got = [sum((one.to(products[0]) for one in products[1:]), products[0])]
    return all(
        is_plain(one, wanted.reshape(-1).to(one), eps) for one, wanted in zip(got, probed, strict=True)
    )


def pulled_agreement(
    recovery: Recovery, values: Sequence[Tensor], probe: Tensor, pulled: Sequence[Tensor | None], eps: float
) -> list[Comparison]:
    """:func:`agreement` with the pullback of ``probe``, whatever the mode that the values came from."""
    found = []
    for i, expected in enumerate(pulled):
        got, scale = _summed(recovery, i, values[i], probe.to(values[i].device), by_rows=True)
        wanted = torch.zeros_like(got) if expected is None else expected.reshape(-1).to(got)
        found.append(Comparison(got, scale, wanted, eps))
    return found


def compared(recovery: Recovery, products: Tensor) -> Tensor:
    """The elements of products with :func:`probe_rows` that are compared with something."""
    if recovery.mode == "diagonal":
        return products.gather(0, recovery.coloring.colors.to(products.device).unsqueeze(0))[0]
    return products[0]


def _summed(
    recovery: Recovery, matrix: int, values: Tensor, factors: Tensor, *, by_rows: bool
) -> tuple[Tensor, Tensor]:
    """A matrix times a column of factors (``by_rows``: a row times it), and sums of the terms' sizes."""
    shape = recovery.patterns[matrix].shape
    if recovery.is_full(matrix):
        whole = values.reshape(shape) if by_rows else values.reshape(shape).t()
        return row_times(factors, whole), row_times(factors, whole, sizes=True)
    of, into = recovery.rows_of(matrix, values.device), recovery.columns_of(matrix, values.device)
    if not by_rows:
        of, into = into, of
    length = shape[1] if by_rows else shape[0]
    summed = wide(values)
    terms = summed * factors[of].to(summed.real.dtype)
    sizes = terms.abs()
    total, size = terms.new_zeros(length), sizes.new_zeros(length)
    return total.scatter_add(0, into, terms), size.scatter_add(0, into, sizes)


def row_times(row: Tensor, matrix: Tensor, rows: Tensor | None = None, *, sizes: bool = False) -> Tensor:
    """``row @ matrix``, or the ``sizes`` of its terms; a part of the matrix, or its ``rows``, at a time."""
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, matrix.shape[1]))
    at_once = matrix.shape[0] <= step
    total: Tensor | None = None
    for lo in range(0, matrix.shape[0], step):
        part = wide(matrix if at_once else matrix[lo : lo + step])
        factors = (row if at_once else row[lo : lo + step]).to(part)
        if rows is not None:
            chosen = rows[lo : lo + step].to(part.device)
            part, factors = part[chosen], factors[chosen]
        product = factors.abs() @ part.abs() if sizes else factors @ part
        total = product if total is None else total + product
    assert total is not None
    return total


def wide(values: Tensor) -> Tensor:
    """``values`` in a dtype that can be summed in."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _diagonal_agreement(
    recovery: Recovery, values: Tensor, probes: Tensor, probed: Tensor, eps: float, branches: bool
) -> list[Comparison]:
    """Column i by itself and together with the others of its color, weighted: H[i, i] must be the same."""
    factors = probes.sum(0).to(values)  # each column is in one probe
    got = wide(values * factors)
    expected = compared(recovery, probed).to(got)
    if branches and is_plain(got.detach(), expected.detach(), eps):
        return []
    # A diagonal entry may be what is left of terms as large as the entries beside it, and be zero.
    near = _finite(wide(probed).abs()).amax(0)
    return [Comparison(got, got.abs(), expected, eps, near=near, branches=branches)]


def slack(eps: float) -> tuple[float, float]:
    """What may be rounding: relative to the terms of a sum, and to the largest sum of all.

    Half of the digits may go where terms cancel inside ``f``. In half precision that would be a third of the
    number, so that it is allowed some roundings only.
    """
    return (4 * eps**0.5, 64 * eps) if eps < _HALF else (12 * eps, 4 * eps)


def is_plain(got: Tensor, wanted: Tensor, eps: float) -> bool:
    """Whether each element agrees up to rounding in itself, as most do: :class:`Comparison` asks for less.

    NaN and infinity don't agree with anything.
    """
    allowed, few = slack(eps)[0], got.numel() <= _FEW and got.is_cpu and not got.is_complex()
    if few and not (is_missing_tangent(got) or is_missing_tangent(wanted)):
        pairs = zip(got.reshape(-1).tolist(), wanted.reshape(-1).tolist(), strict=True)
        return all(abs(a - b) - abs(a) * allowed <= 0 for a, b in pairs)
    if got.device.type == "cpu" and got.numel() > _CACHED:
        parts = zip(*(torch.split(one.reshape(-1), _CACHED) for one in (got, wanted)), strict=True)
        return all(is_plain(a, b, eps) for a, b in parts)
    excess = (got - wanted).abs().sub_(got.abs(), alpha=allowed)
    return excess.max().item() <= 0  # inf - inf is NaN


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass, where ``isfinite`` takes five and memory."""
    return cmath.isfinite(x.sum().item()) or bool(x.isfinite().all())  # a sum may overflow


_HALF = 1e-5
_FEW = 64  # numbers that Python compares in less time than an operation takes, of which there would be six
# Elements that are compared without leaving the caches, in memory that need not be asked for.
_CACHED = 1 << 15


def warn_mismatch(caller: str, recovery: Recovery, cause: str = "") -> None:
    """Say that the dense way is taken, and ask for a report; ``cause``: one more that there may be."""
    head = (
        f"{caller}: the sparse derivative differs from plain automatic differentiation in a product with a "
        "random vector, so that the dense one is computed instead."
    )
    if cause and any(pattern.is_local for pattern in recovery.patterns):
        warn(
            f"{head} The structure was found where values decide it (is_local): most likely f takes another "
            "way here. Make a plan at arguments like these, or give a sparsity that holds for all"
        )
        return
    also = f"{cause}, or " if cause else ""
    operators = sorted({name for pattern in recovery.patterns for name in pattern.operators})
    listed = f" and its operators, {', '.join(operators)}" if operators else ""
    warn(
        f"{head} Either f differs from call to call, or {also}a sparsity that was given lacks entries, or "
        "PyTorch's forward derivative of an operator is wrong, or torchzygote's rule for one: please report "
        f"that, with f{listed}",
    )


def warn_unchecked(caller: str) -> None:
    """Say that the dense way is taken as nothing is known of some entries."""
    warn(
        f"{caller}: where derivatives aren't finite, a row or column couldn't be checked, and the structure "
        "was given, loaded, or found where values decide it, so that the dense derivative is computed "
        "instead; sparse=True, which finds the structure at these arguments, or verify=False spares that",
    )
