"""Chunked products: batched pullbacks, pushforwards and Hessian-vector products for rows of seeds.

Takes seeds and gives products, chunk by chunk; it must not know what the seeds stand for (rows of an
identity, colors) nor where the products go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _engine, _state, native
from ._engine import Linearization
from ._other_ways import another_may_do
from ._random import RandomState
from ._stop_iteration import carried
from ._torch_private import memory_holders, node_name, under_hooks, version_of, vmap_flat
from ._warning import warn

__all__ = ["Chunk", "Seeds", "chunks", "identity_seeds", "jvps", "pulls", "vjps"]

# seeds(lo, hi): the flat seeds of rows lo to hi, shape (hi - lo, numel)
Seeds = Callable[[int, int], Tensor]
UNKNOWN = "unknown"
# lo, hi, and for each input the products of shape (hi - lo, *its shape), None where nothing depends on it
Chunk = tuple[int, int, "list[Tensor | None]"]


class identity_seeds:
    """Rows of the identity, made for one chunk at a time: a whole one would cost ``numel`` squared.

    From the second chunk on, the ones are moved in the memory of the last, if nobody else has kept it: to
    write all of it takes as long as a few operations of the product.
    """

    __slots__ = ("_block", "_device", "_dtype", "_lo", "_numel", "_version")

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._numel = numel
        self._dtype = dtype
        self._device = device
        self._block: Tensor | None = None
        self._lo = 0
        self._version = 0

    def __call__(self, lo: int, hi: int) -> Tensor:
        if lo == 0 and hi == self._numel:
            return native.seed_rows(lo, hi, hi, dtype=self._dtype, device=self._device)
        block, self._block = self._block, None
        if block is None or block.shape[0] < hi - lo or not self._is_untouched(block):
            block = native.seed_rows(lo, hi, self._numel, dtype=self._dtype, device=self._device)
        else:
            block.diagonal(self._lo).zero_()
            block.diagonal(lo).fill_(1)
        # A checkpoint around it keeps no seeds, and compares how often they were written when it runs again.
        plain = not (_engine.compiling() or _engine.in_transform() or block.is_inference() or under_hooks())
        if hi < self._numel and plain:
            self._block, self._lo, self._version = block, lo, version_of(block)
        return block[: hi - lo]

    def _is_untouched(self, block: Tensor) -> bool:
        """Whether nobody has kept it, or written into it as hooks and custom functions may."""
        return version_of(block) == self._version and memory_holders(block) == 1


def chunks(total: int, chunk: int, progress: bool, what: str) -> Iterator[tuple[int, int]]:
    """``lo``, ``hi`` of so many rows at a time, with a bar over all where ``progress`` is wanted."""
    if not progress:
        for lo in range(0, total, chunk):
            yield lo, min(lo + chunk, total)
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=what) as bar:
        for lo in range(0, total, chunk):
            hi = min(lo + chunk, total)
            yield lo, hi
            bar.update(hi - lo)


def vjps(
    lin: Linearization,
    root: int,
    seeds: Seeds,
    total: int,
    chunk: int,
    *,
    create_graph: bool = False,
    progress: bool = False,
    misbatched: str | None = UNKNOWN,
    looped: bool = False,
) -> Iterator[Chunk]:
    """Pull the seeds back from ``lin.roots[root]``, ``chunk`` rows at a time.

    ``misbatched``: an operation that PyTorch batches wrongly, where that is known; else the graph is walked.
    ``looped``: rows go one by one, as they would in PyTorch's loop, which warns.
    """
    shape = lin.roots[root].shape
    count = len(lin.roots)
    by_row = misbatched is not None and total > 1 and chunk > 1 and _must_not_be_batched(lin, misbatched)
    by_row = by_row or looped

    @carried
    def one(seed: Tensor) -> list[Tensor | None]:
        cotangents: list[Tensor | None] = [None] * count
        cotangents[root] = seed
        return lin.pull_dense(cotangents, create_graph=create_graph)

    if create_graph and total > 1 and not (_engine.compiling() or _engine.in_transform()):
        carried(_check_once)(lin, root)
    # Hooks and custom functions see the seeds, and may write into them unnoticed.
    shown = chunk < total and not _engine.compiling() and (lin.may_be_bent() or bool(lin.survey().custom))
    rows = None
    for lo, hi in chunks(total, chunk, progress, "row"):
        if not (shown or by_row or chunk == 1):
            rows = None  # whoever makes the seeds may take the last ones' memory
        rows = seeds(lo, hi)
        if len(shape) != 1:
            rows = rows.view(hi - lo, *shape)  # under vmap a view takes ten times as long
        if hi - lo == 1 and (chunk == 1 or total == 1):  # hooks see a last row as they saw those before
            yield lo, hi, [None if g is None else g.unsqueeze(0) for g in one(rows[0])]
            continue
        if not by_row:
            try:
                yield lo, hi, batched(one, rows)
                continue
            except Exception as error:
                if not another_may_do(error):
                    raise
                products = _row_by_row(one, rows)  # raises what f's own derivative raises, if it does
                by_row = True
                _warn_not_batched(lin.survey().custom, error)
        else:
            products = _row_by_row(one, rows)
        yield lo, hi, products


def pulls(
    lin: Linearization,
    cotangents: Sequence[Sequence[Tensor]],
    *,
    create_graph: bool = False,
    progress: bool = False,
) -> Iterator[list[Tensor | None]]:
    """Pull back a few cotangents of all roots, one at a time: batched, large products take no less."""
    pull = carried(lin.pull_dense)
    for lo, _ in chunks(len(cotangents), 1, progress, "row"):
        yield pull(cotangents[lo], create_graph=create_graph)


def _check_once(lin: Linearization, root: int) -> None:
    """Pull back one dense cotangent: ``vmap`` doesn't notice a custom backward that leaves autograd.

    Nor does it notice that sparse tensors do.
    """
    found = lin.told_of(lin.roots)
    if found.custom or found.sparse:
        like = lin.roots[root]
        dense = torch.linspace(0.5, 1.5, like.numel(), dtype=torch.float64, device=like.device)
        cotangents: list[Tensor | None] = [None] * len(lin.roots)
        cotangents[root] = dense.to(like.dtype).view(like.shape)
        lin.pull(cotangents, retain=True, create_graph=True)


def batched(one: Callable[[Tensor], list[Tensor | None]], rows: Tensor) -> list[Tensor | None]:
    """``one`` for all rows at once under ``vmap``."""
    present: list[bool] = []

    def present_only(row: Tensor) -> list[Tensor]:
        products = one(row)
        present[:] = [product is not None for product in products]
        return [product for product in products if product is not None]

    found = iter(vmap_rows(present_only, rows))
    return [next(found) if there else None for there in present]


def vmap_rows(f: Callable[[Tensor], Sequence[Tensor]], rows: Tensor) -> Sequence[Tensor]:
    """``f`` for each row; random numbers that it draws are the same in all rows."""
    if _engine.compiling():
        outputs = torch.func.vmap(lambda row: (row, *f(row)), randomness="same")(rows)
        return list(outputs[1:])
    return vmap_flat(f, rows)


def _row_by_row(
    one: Callable[[Tensor], list[Tensor | None]], rows: Tensor, random: RandomState | None = None
) -> list[Tensor | None]:
    singles = []
    for row in rows.unbind():
        if random is not None:
            random.restore()
        # What lies at an odd place in memory can't be viewed as complex numbers.
        singles.append(one(row.clone()))
    return [stack_products(column) for column in zip(*singles, strict=True)]


def stack_products(products: Sequence[Tensor | None]) -> Tensor | None:
    """Rows stacked; a row that is ``None`` among others is zero."""
    like = next((product for product in products if product is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if p is None else p for p in products])


def _must_not_be_batched(lin: Linearization, operation: str | None) -> bool:
    """Whether PyTorch would give wrong numbers for a batch of rows; a warning says so."""
    if _engine.compiling():
        return False
    if operation == UNKNOWN:
        operation = lin.survey().misbatched
    if operation is None:
        return False
    warn(
        f"rows are computed one at a time, which is slow: PyTorch gives wrong numbers for {operation} where "
        "its derivatives are batched",
    )
    return True


def _warn_not_batched(nodes: list[Any], error: Exception) -> None:
    custom = sorted({node_name(node).removesuffix("Backward") for node in nodes})
    culprit = f" (custom autograd functions in f: {', '.join(custom)})" if custom else ""
    text = str(error).strip().split("\n")[0]
    warn(
        f"rows are computed one at a time, which is slow: PyTorch could not batch an operation{culprit}: "
        f"{type(error).__name__}: {text}",
    )


def jvps(
    f: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    by: int,
    seeds: Seeds,
    total: int,
    chunk: int,
    *,
    keep: bool,
    random: RandomState | None = None,
    progress: bool = False,
    what: str = "column",
    values: list[Tensor] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Push the seeds forward through ``f``, by ``inputs[by]`` alone; the products are of its first result.

    ``keep``: they are going to be differentiated.
    ``random`` is restored before each run of ``f``, so that every chunk sees the same draw. ``values``, an
    empty list, gets what the first run of ``f`` returned; hooks report from that run, else from none.
    """
    x = inputs[by]
    first = values is not None

    def of_one(primal: Tensor) -> tuple[Tensor, ...]:
        return f(*inputs[:by], primal, *inputs[by + 1 :])

    @carried
    def one(seed: Tensor) -> list[Tensor | None]:
        nonlocal first
        position = _state.mark()
        ys, derivatives = _engine.jvp(of_one, (x,), (seed,), keep)
        if not first:
            _state.forget_since(position)  # hooks report from another run of f
        first = False
        return [derivatives[0], *(() if values is None or values else ys)]

    by_row = False

    for lo, hi in chunks(total, chunk, progress, what):
        rows = None  # whoever makes the seeds may take the last ones' memory
        rows = seeds(lo, hi).view(hi - lo, *x.shape)
        position = _state.mark()
        with _engine.forward_mode():
            if hi - lo > 1 and not by_row:
                if random is not None:
                    random.restore()
                try:
                    found = batched(one, rows)
                except Exception as error:
                    if not another_may_do(error):
                        raise
                    _state.forget_since(position)
                    first = values is not None and not values
                    found = _row_by_row(one, rows, random)
                    by_row = True
                    _warn_not_batched([], error)
            else:
                found = _row_by_row(one, rows, random)
        products, *ys = found
        if values is not None:
            values.extend(y[0] for y in ys if y is not None)  # the same in all rows
        assert products is not None
        yield lo, hi, products
