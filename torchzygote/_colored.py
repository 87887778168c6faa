"""Products of one color each, and the entries of a matrix found among them.

Seeds by color go through ``_products``; what comes out is read where a :class:`Recovery` says. It must not
know how the structure was found, nor what becomes of the values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _cost_model, _engine, _products, native
from ._certificate import all_finite
from ._cost_model import RowCost
from ._dtypes import promoted
from ._engine import Linearization
from ._first_order import FirstOrder
from ._other_ways import another_may_do
from ._products import Seeds
from ._pulling import Options
from ._random import RandomState, restored_after
from ._row_cost import is_linear
from ._second_order import SecondOrder, gradient_by
from ._torch_private import in_functorch_compiled, unchecked_select
from ._transposed import Transposed, or_else, transposed
from .coloring.recovery import Recovery

__all__ = [
    "Collected",
    "MakeSeeds",
    "Products",
    "are_linear",
    "chunk_of",
    "collect",
    "color_seeds",
    "gather",
    "given_seeds",
    "hessian_products",
    "jacobian_products",
    "plain_products",
]

_log = logging.getLogger("torchzygote")

# Seeds of one operation that a core's caches hold: 4 rows of 32768 doubles are best together, and rows of a
# million one at a time (6.6 gradients instead of 9 for three colors).
_CACHED = 4 << 20

# For a dtype and a device: seeds, and how many that are.
MakeSeeds = Callable[[torch.dtype, torch.device], tuple[Seeds, int]]

# lo, hi, and the products of these colors, shape (hi - lo, length) each; None where nothing depends on them
Products = Iterable["tuple[int, int, list[Tensor | None]]"]


def color_seeds(
    colors: Tensor, ncolors: int, probes: Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[Seeds, int]:
    """Seeds of each color, followed by the probes, and how many that are.

    ``probes``, shape ``(rows, numel)``, ride along in the last chunk.
    """
    colors = colors.to(device)
    extra = None if probes is None else probes.to(dtype=dtype, device=device)
    total = ncolors + (0 if extra is None else extra.shape[0])

    def seeds(lo: int, hi: int) -> Tensor:
        parts = []
        if lo < ncolors:
            top = min(hi, ncolors)
            parts.append(native.seed_rows(lo, top, colors.numel(), dtype=dtype, device=device, colors=colors))
        if extra is not None and hi > ncolors:
            probed = extra[max(0, lo - ncolors) : hi - ncolors]
            parts.append(probed if parts else probed.clone())  # hooks may write into cotangents
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return seeds, total


def given_seeds(rows: Tensor) -> MakeSeeds:
    """These seeds, in the way that :func:`jacobian_products` asks for them."""

    def make(dtype: torch.dtype, device: torch.device) -> tuple[Seeds, int]:
        moved = rows.to(device=device, dtype=dtype)
        return (lambda lo, hi: moved[lo:hi].clone()), rows.shape[0]  # hooks may write into cotangents

    return make


def jacobian_products(
    first: FirstOrder,
    recovery: Recovery,
    make_seeds: MakeSeeds,
    chunk: Callable[[int], int],
    options: Options,
) -> Products:
    """Pullbacks or pushforwards of the seeds, by all arguments at once."""
    lin, inputs = first.lin, first.prepared.inputs
    if recovery.mode == "reverse":
        seeds, total = make_seeds(first.y.dtype, first.y.device)
        return _pulled(lin, seeds, total, chunk(total), options)
    seeds, total = make_seeds(promoted([x.dtype for x in inputs]), inputs[0].device)
    if (found := transposed(first)) is not None:
        linear = lin.onward([_joined(inputs, found)], [found.cotangent])
        on_tape = _pulled(linear, seeds, total, chunk(total), options)
        if not all(first.prepared.owned):  # no dual number can replace them there
            return on_tape
        return _on_tape_or_pushed(on_tape, first, seeds, total, chunk(total), options)
    return _pushed(first, seeds, total, chunk(total), options)


def are_linear(first: FirstOrder, recovery: Recovery, products: Sequence[Tensor]) -> bool:
    """Whether products are linear in the seeds, and of one run of ``f``: none is by dual numbers."""
    if recovery.mode == "forward" and not all(all_finite(p) for p in products):
        return False
    return is_linear(first.lin) and (recovery.mode == "reverse" or transposed(first) is not None)


def _on_tape_or_pushed(
    on_tape: Products, first: FirstOrder, seeds: Seeds, total: int, chunk: int, options: Options
) -> Iterator[_products.Chunk]:
    """Products by the tape; by dual numbers where that fails or isn't finite, since theirs may be."""
    quiet = options._replace(progress=False)

    def pushed(lo: int, hi: int, options: Options = quiet) -> Iterator[_products.Chunk]:
        rest = _pushed(first, lambda a, b: seeds(lo + a, lo + b), hi - lo, chunk, options)
        for a, b, products in rest:
            yield lo + a, lo + b, products

    reached = 0
    try:
        for lo, hi, products in on_tape:
            if all(p is None or all_finite(p.detach()) for p in products):
                yield lo, hi, products
            else:
                yield from or_else(lambda lo=lo, hi=hi: list(pushed(lo, hi)), [(lo, hi, products)])  # type: ignore[misc]
            reached = hi
        return
    except Exception as error:
        if not another_may_do(error):
            raise
        _log.debug("forward mode on the tape: %s: %s", type(error).__name__, error)
    yield from pushed(reached, total, options)


def _pulled(
    lin: Linearization, seeds: Seeds, total: int, chunk: int, options: Options
) -> Iterator[_products.Chunk]:
    """Pullbacks from the only root."""
    return _products.vjps(lin, 0, seeds, total, chunk, create_graph=options.keep, progress=options.progress)


def _joined(inputs: Sequence[Tensor], found: Transposed) -> Tensor:
    """What has been pulled back, as one vector."""
    with torch.enable_grad():  # the caller may have switched autograd off
        flat = [
            torch.zeros_like(x).reshape(-1) if g is None else g.reshape(-1)
            for x, g in zip(inputs, found.pulled, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


def _pushed(
    first: FirstOrder, seeds: Seeds, total: int, chunk: int, options: Options
) -> Iterator[tuple[int, int, list[Tensor | None]]]:
    """Pushforwards by dual numbers; several arguments are pushed as one joined vector."""
    sources = first.prepared.inputs if options.keep else [x.detach() for x in first.prepared.inputs]
    inputs = [_engine.separate(x) for x in sources]

    def of_all(*tracked: Tensor) -> tuple[Tensor, ...]:
        return (_engine.call_exchanged(first.f, first.prepared, tracked),)

    def of_joined(vector: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(vector, [x.numel() for x in inputs])
        return of_all(*(part.view(x.shape).to(x.dtype) for part, x in zip(parts, inputs, strict=True)))

    one = len(inputs) == 1
    point = inputs[0] if one else torch.cat([x.reshape(-1) for x in inputs])
    yield from _dual_products(of_all if one else of_joined, point, seeds, total, chunk, options, first.random)


def _dual_products(
    f: Callable[..., tuple[Tensor, ...]],
    point: Tensor,
    seeds: Seeds,
    total: int,
    chunk: int,
    options: Options,
    random: RandomState | None,
) -> Iterator[tuple[int, int, list[Tensor | None]]]:
    with restored_after(random), _engine.recording_if(options.keep):
        for lo, hi, products in _products.jvps(
            f, [point], 0, seeds, total, chunk, random=random, progress=options.progress, keep=options.keep
        ):
            yield lo, hi, [products if options.keep else products.detach()]


def hessian_products(
    f: Callable[..., Any],
    second: SecondOrder,
    which: int,
    mode: str,
    make_seeds: MakeSeeds,
    chunk: Callable[[int], int],
    options: Options,
    random: RandomState | None,
) -> Products:
    """Hessian-vector products by input ``which``; its gradient is recorded for reverse over reverse."""
    x = second.prepared.inputs[which]
    if mode == "reverse_over_reverse":
        lin = second.by_input(which)
        assert lin is not None
        seeds, total = make_seeds(lin.roots[0].dtype, x.device)
        return _pulled(lin, seeds, total, chunk(total), options)
    seeds, total = make_seeds(x.dtype, x.device)
    point = _engine.separate(x if options.keep else x.detach())
    gradient = gradient_by(f, second.caller, second.prepared, which)
    return _dual_products(gradient, point, seeds, total, chunk(total), options, random)


class Collected(NamedTuple):
    """Values of each matrix's entries, what the probes gave, and all products where they are at hand."""

    values: list[Tensor]
    probed: list[Tensor]
    products: list[Tensor] | None


class _ColoredProducts:
    """All products of each kind, put together from chunks."""

    def __init__(self, recovery: Recovery, keep: bool) -> None:
        self._lengths = recovery.lengths()
        self._ncolors = recovery.ncolors
        self._keep = keep
        self._parts: list[list[Tensor]] = [[] for _ in self._lengths]

    def add(self, lo: int, hi: int, flats: Sequence[Tensor]) -> None:
        """Take the products of these colors."""
        for parts, flat in zip(self._parts, flats, strict=True):
            if self._keep or flat.shape[0] == self._ncolors:
                parts.append(flat)
                continue
            if not parts:
                parts.append(flat.new_empty(self._ncolors, flat.shape[1]))
            parts[0][lo:hi].copy_(flat)

    def joined(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The products of all colors, one after the other."""
        found = []
        for parts, length in zip(self._parts, self._lengths, strict=True):
            if not parts:
                found.append(torch.zeros(0, length, dtype=dtype, device=device))
            else:
                found.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return found


def collect(
    recovery: Recovery, products: Products, dtypes: Sequence[torch.dtype], device: torch.device, keep: bool
) -> Collected:
    """Read the entries, row by row, from chunks of products.

    The products of several chunks are put together where results must be differentiable (``keep``), and where
    they hold little else than entries; otherwise each chunk is read as it comes.
    """
    lengths, ncolors = recovery.lengths(), recovery.ncolors
    probed: list[list[Tensor]] = [[] for _ in lengths]
    blocks = _ColoredProducts(recovery, keep)
    values: list[Tensor] | None = None
    # Those of the probes, too, where there is one chunk: compiled code that reads from a part of a tensor
    # divides each position by its length.
    everything: list[Tensor] = []
    for lo, hi, chunk in products:
        flats = []
        for i, (product, length) in enumerate(zip(chunk, lengths, strict=True)):
            if product is None:
                flat = torch.zeros(hi - lo, length, dtype=dtypes[i], device=device)
            else:
                flat = product.reshape(hi - lo, length)
            if hi > ncolors:
                probed[i].append(flat[max(0, ncolors - lo) :])
            flats.append(flat[: max(0, ncolors - lo)])
            if lo == 0 and hi >= ncolors:
                everything.append(flat)
        if lo >= ncolors:
            continue
        if keep or (lo == 0 and hi >= ncolors) or recovery.is_compact():
            blocks.add(lo, min(hi, ncolors), flats)
            continue
        if values is None:
            values = [
                torch.zeros(recovery.entries(i), dtype=dtype, device=device) for i, dtype in enumerate(dtypes)
            ]
        _read_chunk(recovery, flats, lo, values)
    probes = [torch.cat(rows) if len(rows) != 1 else rows[0] for rows in probed if rows]
    if values is not None:
        return Collected(values, probes, None)
    joined = blocks.joined(dtypes[0], device)
    return Collected(read(recovery, everything or joined, dtypes), probes, joined)


def plain_products(products: Products, like: Sequence[Tensor]) -> list[Tensor]:
    """All products of each kind, shaped as those of ``like``."""
    chunks = [chunk for _, _, chunk in products]
    found = []
    for k, one in enumerate(like):
        parts = [chunk[k] for chunk in chunks]
        present = [part for part in parts if part is not None]
        found.append(torch.cat(present).reshape(one.shape) if present else torch.zeros_like(one))
    return found


def chunk_of(options: Options, cost: RowCost, recovery: Recovery, like: Tensor) -> Callable[[int], int]:
    """How many of a number of products are computed at a time; ``cost``: what one takes.

    Fewer than the budget allows where they are so long that batching saves no time and leaves the caches.
    """
    row = recovery.coloring.colors.numel() * like.element_size()

    def chunk(total: int) -> int:
        if _engine.compiling():
            return max(1, total)
        affordable = _cost_model.choose_chunk(options.chunk_size, total, cost, like.device)
        if options.chunk_size is not None or like.device.type != "cpu":
            return affordable
        return max(1, min(affordable, _CACHED // max(1, row)))

    return chunk


def _read_chunk(recovery: Recovery, chunk: Sequence[Tensor], lo: int, values: Sequence[Tensor]) -> None:
    """Write the entries whose color is in this chunk of products."""
    device = values[0].device
    for i, out in enumerate(values):
        product = chunk[recovery.product_of(i)]
        if product.shape[0] > 0:
            row, column = recovery.slots(i, device)
            native.decompress(product.to(dtype=out.dtype, device=device).contiguous(), lo, row, column, out)


def read(recovery: Recovery, products: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The values of each matrix from all of its products; differentiable."""
    values = []
    for i, dtype in enumerate(dtypes):
        product = products[recovery.product_of(i)]
        if recovery.is_full(i):  # copied: what is read may be a seed, or the same number everywhere
            lines = product.index_select(0, recovery.colors_of(i, product.device))
            found = (lines if recovery.mode == "reverse" else lines.t()).reshape(-1)
        else:
            found = gather(product.reshape(-1), recovery.flat_slots(i, product.device))
        values.append(found if found.dtype == dtype else found.to(dtype))
    return values


def gather(flat: Tensor, where: Tensor) -> Tensor:
    """``flat[where]``, for positions that are known to be right: compiled code need not check them again."""
    if _engine.compiling() and not in_functorch_compiled():
        found: Tensor = unchecked_select(flat, where)
        return found
    return flat.index_select(0, where)
