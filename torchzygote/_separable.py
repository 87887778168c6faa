"""Block-diagonal derivatives: few products where a batch axis runs through unmixed.

If axis ``p`` of ``y`` runs along with axis ``q`` of ``x`` (``_recorded.alignment``), the rows of all batch
elements can share their seeds: as many products as one element has rows. Each result is checked against one
product with a random cotangent. Knows products and shapes; it must not know what is being differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import _cost_model
from ._block_layout import Blocks, BlockSeeds, Layout, by_block, of_itself
from ._certificate import Comparison, all_finite, is_plain, precision, random_vector, wide
from ._cost_model import RowCost
from ._engine import Linearization
from ._numbers import show_numbers
from ._pulling import Options, pulled_rows
from ._recorded.alignment import Separation, aligned_axes, separation, shared_axes, summed_axes
from ._repetition import Repetition
from ._row_cost import is_linear
from ._torch_private import node_names
from ._warning import warn

__all__ = [
    "block_products",
    "find_hessian_layouts",
    "find_layout",
    "find_sum",
    "warn_mismatch",
]

# Below this many rows the dense way takes no longer than finding out.
LEAST_ROWS = 32
LEAST_SAVING = 4
_FEW_ROWS = 4  # of a block


def find_layout(root: Tensor, x: Tensor, cost: RowCost) -> Layout | None:
    """The layout of the Jacobian of ``root`` by ``x`` where it pays, ``None`` elsewhere.

    ``cost``: what one row of the Jacobian takes while it is pulled back.
    """
    rows = root.numel()
    if (
        min(rows, x.numel()) < LEAST_ROWS
        or rows * cost.nbytes < _cost_model.LEAST_BYTES
        or root.device != x.device
    ):
        return None
    if not show_numbers([root]):
        return None
    pairs = aligned_axes(root, x)
    if not pairs:
        return None
    layout = Layout(tuple(root.shape), tuple(x.shape), tuple(pairs))
    return layout if (layout.block_rows + 1) * LEAST_SAVING <= rows else None


def find_hessian_layouts(
    lin: Linearization, cost: RowCost, scalar: Callable[[], Tensor | None] | None = None
) -> list[list[Layout]] | None:
    """Layouts of gradients by their inputs, where all are block diagonal along the same leading axes.

    ``lin.roots[i]`` is the gradient by ``lin.inputs[i]``. Together they need one product to check, apart one
    each. ``scalar()``: what they are the gradient of, if it is pulled back as its recorded graph says.
    """
    if not _may_pay(lin.inputs, sum(root.numel() for root in lin.roots), cost):
        return None
    common = _common_axes(lin.inputs)
    if common == 0:
        return None
    y = None if scalar is None else scalar()
    batch = set() if y is None else set(summed_axes(y, lin.inputs, common))
    rows, shape = sum(root.numel() for root in lin.roots), lin.inputs[0].shape
    if rows > _FEW_ROWS * math.prod(shape[p] for p in batch):  # worth the longer walk
        batch.update(shared_axes(lin.roots, lin.inputs, common))
    layouts = _layouts_along(sorted(batch), lin.inputs)
    return layouts if layouts and _saves([row[0] for row in layouts], rows) else None


def find_sum(y: Tensor, inputs: Sequence[Tensor], cost: RowCost) -> tuple[Separation, list[Layout]] | None:
    """Along which axes the scalar ``y`` is a sum, and the layout of its Hessian by each of the inputs.

    The gradient need not have been recorded.
    """
    rows = sum(x.numel() for x in inputs)
    common = _common_axes(inputs) if _may_pay(inputs, rows, cost) else 0
    if common == 0:
        return None
    found = separation(y, inputs, common)
    shapes = [tuple(x.shape) for x in inputs]
    pairs = tuple((p, p) for p in found.axes)
    of_shape = {shape: Layout(shape, shape, pairs) for shape in dict.fromkeys(shapes)}
    layouts = [of_shape[shape] for shape in shapes]
    return (found, layouts) if pairs and _saves(layouts, rows) else None


def _may_pay(inputs: Sequence[Tensor], rows: int, cost: RowCost) -> bool:
    """Whether a Hessian of so many rows takes longer than finding out."""
    large = rows >= LEAST_ROWS and rows * cost.nbytes >= _cost_model.LEAST_BYTES
    return large and show_numbers(inputs)


def _common_axes(inputs: Sequence[Tensor]) -> int:
    """How many of the first axes are alike in all shapes."""
    shapes = [x.shape for x in inputs]
    common = 0
    while all(len(s) > common and s[common] == shapes[0][common] for s in shapes):
        common += 1
    return common


def _layouts_along(batch: Sequence[int], inputs: Sequence[Tensor]) -> list[list[Layout]]:
    """Of the gradient by each input, by each of them; empty without axes. Equal shapes share their row."""
    if not batch:
        return []
    shapes = [tuple(x.shape) for x in inputs]
    pairs = tuple((p, p) for p in batch)
    rows: dict[tuple[int, ...], list[Layout]] = {}
    for mine in dict.fromkeys(shapes):
        by = {other: Layout(mine, other, pairs) for other in dict.fromkeys(shapes)}
        rows[mine] = [by[other] for other in shapes]
    return [rows[mine] for mine in shapes]


def _saves(of_roots: Sequence[Layout], rows: int) -> bool:
    """Whether there are many fewer products than rows; ``of_roots``: one layout of each gradient."""
    return (sum(layout.block_rows for layout in of_roots) + 1) * LEAST_SAVING <= rows


def block_products(
    lin: Linearization,
    layouts: Sequence[Sequence[Layout]],
    cost: RowCost,
    options: Options,
) -> list[list[Blocks]] | None:
    """The blocks of the Jacobian of each of ``lin.roots`` by each of ``lin.inputs``, one list per root.

    ``layouts[i][j]`` pairs the axes of root ``i`` and input ``j``, the same batch axes for all. ``None`` if
    the check fails.
    """
    found: list[list[Tensor]] = []
    for i, (root, row) in enumerate(zip(lin.roots, layouts, strict=True)):
        rows = row[0].block_rows
        parts: list[list[Tensor]] = [[] for _ in row]
        seeds = BlockSeeds(row[0], root)
        for lo, hi, products in pulled_rows(lin, seeds, rows, cost, options, root=i):
            for j, product in enumerate(products):
                x = lin.inputs[j]
                parts[j].append(x.new_zeros(hi - lo, *x.shape) if product is None else product)
        joined = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        found.append([by_block(layout, products) for layout, products in zip(row, joined, strict=True)])
    if not _are_confirmed(lin, layouts, found):
        return None
    return [
        [Blocks(layout, values.transpose(0, 1)) for layout, values in zip(row, of_root, strict=True)]
        for row, of_root in zip(layouts, found, strict=True)
    ]


def _are_confirmed(
    lin: Linearization, layouts: Sequence[Sequence[Layout]], found: Sequence[Sequence[Tensor]]
) -> bool:
    """Whether the blocks explain a product with a random cotangent, taken without any structure."""
    vector = random_vector(sum(root.numel() for root in lin.roots))
    plain = _pulled(lin, layouts, vector)
    # (block rows, blocks, 1) each
    weights = [
        by_block(of_itself(row[0]), v.unsqueeze(0))[0].t().unsqueeze(2)
        for v, row in zip(_cotangents(lin, vector), layouts, strict=True)
    ]
    coarsest = lin.coarsest()
    eps = [precision([x], lin.roots[0], coarsest) for x in lin.inputs]
    doubtful: dict[int, Comparison] = {}
    for j, wanted in enumerate(plain):
        terms = torch.cat([wide(of_root[j].detach()) * w for of_root, w in zip(found, weights, strict=True)])
        got = terms.sum(0)
        wanted = wanted.to(got.dtype)
        if is_plain(got, wanted, eps[j]):
            continue
        if not all_finite(wanted):  # zeros outside the blocks would be wrong
            return False
        doubtful[j] = Comparison(got, terms.abs().sum(0), wanted, eps[j])

    def again(vector: Tensor) -> list[Tensor]:
        repeated = _pulled(lin, layouts, vector)
        return [repeated[j] for j in doubtful]

    elements = [plain[j] for j in doubtful]
    repetition = Repetition(vector, lambda: _parts(layouts, vector), elements, again)
    repetition.refute(list(doubtful.values()))
    if all(bool(one.fine.all()) for one in doubtful.values()):
        return True
    # else products differ for another reason
    if is_linear(lin) and repetition.are_rounding([one.difference for one in doubtful.values()]):
        return True
    warn_mismatch(lin)
    return False


def _parts(layouts: Sequence[Sequence[Layout]], vector: Tensor) -> Iterator[Tensor]:
    """A vector's elements at one row of each block."""
    offset = 0
    for row in layouts:
        numbers = row[0].y_numbers(vector.device) + offset
        for k in range(row[0].block_rows):
            part = torch.zeros_like(vector)
            part[numbers[:, k]] = vector[numbers[:, k]]
            yield part
        offset += numbers.numel()


def _cotangents(lin: Linearization, vector: Tensor) -> list[Tensor]:
    """A vector, flat, as cotangents of all roots; copies, as hooks may write into them."""
    parts = torch.split(vector, [root.numel() for root in lin.roots])
    return [v.to(r.device, r.dtype, copy=True).view(r.shape) for v, r in zip(parts, lin.roots, strict=True)]


def _pulled(lin: Linearization, layouts: Sequence[Sequence[Layout]], vector: Tensor) -> list[Tensor]:
    """The plain pullback of a vector, by block."""
    pulled = lin.pull_dense(_cotangents(lin, vector))
    return [
        by_block(layout, (torch.zeros_like(x) if g is None else g).detach().unsqueeze(0))[0]
        for x, g, layout in zip(lin.inputs, pulled, layouts[0], strict=True)
    ]


def warn_mismatch(lin: Linearization) -> None:
    """Say that the dense way is taken, and ask for a report."""
    operations = sorted({name for root in lin.roots for name in node_names(root)})
    warn(
        "a batch axis seemed to run through f unmixed, which a product with a random vector contradicts, so "
        "that the derivative is computed the dense way. Either a hook on a tensor changes the derivative, or "
        "torchzygote's rule for an operation is wrong: please report that, with the operations of f: "
        f"{', '.join(operations)}",
    )
