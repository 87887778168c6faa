"""Operator × transform: the right derivative or a clear refusal, never zeros.

The functions of ``torchzygote.native`` must be right everywhere. The registered operators below them have no
derivatives: they are right where nothing is differentiated, and refuse otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_samples import needs_library, raw
from torch import Tensor

from torchzygote import native
from torchzygote.native.elementwise import push_elementwise
from torchzygote.native.mirrored import mirrored_blocks

pytestmark = needs_library

COLORS = torch.tensor([1, 0, 2, 1])
ROWS = torch.tensor([0, 2, 1, 1, 0])
COLUMNS = torch.tensor([3, 0, 1, 1, 2])
CSR = (torch.tensor([0, 2, 3, 4]), torch.tensor([0, 3, 1, 2]))


def scattered(x: Tensor) -> Tensor:
    blocks = [x.new_zeros(4, 4), x.new_zeros(5, 2)]
    native.scatter_rows_(blocks, [x * x, x[:, 1:3].sin()], 1)
    return torch.cat([block.reshape(-1) for block in blocks])


def scattered_raw(x: Tensor) -> Tensor:
    blocks = [x.new_zeros(4, 4), x.new_zeros(5, 2)]
    raw("scatter_rows_")(blocks, [x * x, x[:, 1:3].sin()], 1)
    return torch.cat([block.reshape(-1) for block in blocks])


def scattered_plainly(x: Tensor) -> Tensor:
    first = torch.cat([torch.zeros(1, 4, dtype=x.dtype), x * x])
    second = torch.cat([torch.zeros(1, 2, dtype=x.dtype), x[:, 1:3].sin(), torch.zeros(1, 2, dtype=x.dtype)])
    return torch.cat([first.reshape(-1), second.reshape(-1)])


def diagonal(x: Tensor) -> Tensor:
    return native.gather_diagonal(x.exp(), 1)


def diagonal_raw(x: Tensor) -> Tensor:
    out = x.new_zeros(3)
    raw("gather_diagonal_")(out, x.exp(), 1, None)
    return out


def colored(x: Tensor) -> Tensor:
    return native.gather_diagonal(x.exp(), 0, out=x.new_zeros(4), colors=COLORS)


def colored_raw(x: Tensor) -> Tensor:
    out = x.new_zeros(4)
    raw("gather_diagonal_")(out, x.exp(), 0, COLORS)
    return out


def values(x: Tensor) -> Tensor:
    out = x.new_zeros(5)
    native.decompress(x**3, 0, ROWS, COLUMNS, out)
    return out


def values_raw(x: Tensor) -> Tensor:
    out = x.new_zeros(5)
    raw("decompress_")(out, x**3, 0, ROWS, COLUMNS)
    return out


PLACE = (torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 3, 0]))


def dense(x: Tensor) -> Tensor:
    out = x.new_zeros(3, 4)
    native.decompress_dense(x**3, 0, ROWS, COLUMNS, *PLACE, out)
    return out


def dense_raw(x: Tensor) -> Tensor:
    out = x.new_zeros(3, 4)
    raw("decompress_dense_")(out, x**3, 0, ROWS, COLUMNS, *PLACE)
    return out


def dense_plainly(x: Tensor) -> Tensor:
    return torch.zeros(3, 4, dtype=x.dtype).index_put(PLACE, (x**3)[ROWS, COLUMNS])


def summed(x: Tensor) -> Tensor:
    return native.compress(x.cos(), COLORS, 3)


def summed_raw(x: Tensor) -> Tensor:
    out = x.new_zeros(3, 3)
    raw("compress_")(out, *CSR, x.cos()[0], COLORS)
    return out


def summed_plainly(x: Tensor) -> Tensor:
    seeds = (torch.arange(3).unsqueeze(1) == COLORS).to(x.dtype)
    return seeds @ x.cos().t()


def summed_values_plainly(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 0, 1, 2])
    zeros = torch.zeros(3, 3, dtype=x.dtype)
    return zeros.index_put((COLORS[CSR[1]], rows), x.cos()[0], accumulate=True)


def seeds_added(x: Tensor) -> Tensor:
    return x * native.seed_rows(0, 3, 4, dtype=x.dtype, device="cpu", colors=COLORS)


def seeds_raw(x: Tensor) -> Tensor:
    out = x.sin()
    raw("seed_rows_")(out, 0, COLORS)
    return out


def seeds_plainly(x: Tensor) -> Tensor:
    return x * (torch.arange(3).unsqueeze(1) == COLORS).to(x.dtype)


def seeds_alone(x: Tensor) -> Tensor:
    return (torch.arange(3).unsqueeze(1) == COLORS).to(x.dtype) + 0 * x


# blocks of two inputs, with one column each
MIRRORED = (
    torch.tensor([0, 1, 1], dtype=torch.uint8),
    torch.tensor([[1.0, 2.0, 0.5], [4.0, 1.0, 2.0]], dtype=torch.float64),
    [1, 1],
    1e-3,
)


def products_of(x: Tensor) -> list[Tensor]:
    first, second, third, fourth = x.t().contiguous()
    return [first.exp(), second.exp(), third.exp(), fourth**2]


def mirrored(x: Tensor) -> Tensor:
    diagonals, agree = mirrored_blocks(products_of(x), *MIRRORED)
    return torch.cat([*diagonals, agree.to(x.dtype).reshape(1)])


def mirrored_raw(x: Tensor) -> Tensor:
    diagonals, agree = raw("mirrored_blocks")(products_of(x), *MIRRORED)
    return torch.cat([*diagonals, agree.to(x.dtype).reshape(1)])


def mirrored_in_pytorch(x: Tensor) -> Tensor:
    first, second, third, fourth = products_of(x)
    swapped = MIRRORED[0] > 0
    one = torch.where(swapped, third * MIRRORED[1][1], first * MIRRORED[1][0])
    two = torch.where(swapped, second * MIRRORED[1][0], fourth * MIRRORED[1][1])
    return torch.cat([one, two, x.new_zeros(1)])  # 0: they aren't symmetric


def pushed_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.stack([x, x.exp()]), x.cos(), x**2


def pushed(x: Tensor) -> Tensor:
    found, terms = push_elementwise(*pushed_of(x), squared=False, overwrite=True)
    return torch.cat([found.reshape(-1), terms.reshape(-1)])


def pushed_raw(x: Tensor) -> Tensor:
    tangents, slope, weight = pushed_of(x)
    terms = raw("push_elementwise_")(tangents, slope, weight, False, "")
    return torch.cat([tangents.reshape(-1), terms.reshape(-1)])


def pushed_in_pytorch(x: Tensor) -> Tensor:
    tangents, slope, weight = pushed_of(x)
    terms = torch.einsum("dij,ij,ij->di", tangents**2, slope, weight)
    return torch.cat([(tangents * slope).reshape(-1), terms.reshape(-1)])


# a function of torchzygote.native, the same in plain PyTorch; the registered operator, and that plainly
TABLE: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "seed_rows": (seeds_added, seeds_plainly, seeds_raw, seeds_alone),
    "scatter_rows_": (scattered, scattered_plainly, scattered_raw, scattered_plainly),
    "gather_diagonal": (
        diagonal,
        lambda x: x.exp().diagonal(1),
        diagonal_raw,
        lambda x: x.exp().diagonal(1),
    ),
    "gather_diagonal colors": (
        colored,
        lambda x: x.exp()[COLORS, torch.arange(4)],
        colored_raw,
        lambda x: x.exp()[COLORS, torch.arange(4)],
    ),
    "decompress": (values, lambda x: (x**3)[ROWS, COLUMNS], values_raw, lambda x: (x**3)[ROWS, COLUMNS]),
    "decompress_dense": (dense, dense_plainly, dense_raw, dense_plainly),
    "compress": (summed, summed_plainly, summed_raw, summed_values_plainly),
    "mirrored_blocks": (mirrored, mirrored_in_pytorch, mirrored_raw, mirrored_in_pytorch),
    "push_elementwise": (pushed, pushed_in_pytorch, pushed_raw, pushed_in_pytorch),
}


def weighted(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        y = f(x).reshape(-1)
        return (y * torch.arange(1, y.numel() + 1)).sum()

    return total


def on_the_tape(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(weighted(f)(x), x)
    return found


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, x.cos()))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    return torch.zeros_like(y) if tangent is None else tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "no derivative": lambda f, x: f(x),
    "autograd": on_the_tape,
    "forward AD": dual,
    "grad": lambda f, x: torch.func.grad(weighted(f))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin()])),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(weighted(f))(x),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
}

X = torch.linspace(-1.5, 1.7, 12, dtype=torch.float64).view(3, 4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", TABLE)
def test_functions_are_right_under_every_transform(operator: str, transform: str) -> None:
    function, plain, _, _ = TABLE[operator]
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(function, X), apply(plain, X))


@pytest.mark.parametrize("operator", TABLE)
def test_functions_compile_without_a_break(operator: str) -> None:
    function, plain, _, _ = TABLE[operator]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), plain(X))
    torch.testing.assert_close(on_the_tape(compiled, X), on_the_tape(plain, X))


REFUSALS = (
    "expected tensors that are not being differentiated",
    "Batching rule not implemented",
    "fallback doesn't work",
    "vmap: ",
)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", TABLE)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_operators_refuse_what_they_have_no_derivative_for(operator: str, transform: str) -> None:
    _, _, function, plain = TABLE[operator]
    apply = TRANSFORMS[transform]
    if transform in ("no derivative", "inference"):
        torch.testing.assert_close(apply(function, X), apply(plain, X))
        return
    with pytest.raises(RuntimeError, match="|".join(REFUSALS)):
        apply(function, X)


def samples() -> dict[str, tuple]:
    products, out = torch.randn(3, 4), torch.zeros(5)
    sets = (torch.tensor([0, 1, 2]), torch.tensor([3, 5]))
    return {
        "seed_rows_": (torch.zeros(3, 4), 1, None),
        "scatter_rows_": ([torch.zeros(5, 4), torch.zeros(5, 4).double()], [products, products], 1),
        "gather_diagonal_": (torch.zeros(3), products, 1, None),
        "decompress_": (out, products, 0, ROWS, COLUMNS),
        "decompress_dense_": (torch.zeros(3, 4), products, 0, ROWS, COLUMNS, *PLACE),
        "compress_": (torch.zeros(3, 3), *CSR, torch.randn(4), COLORS),
        "mirrored_blocks": ([torch.randn(3) for _ in range(4)], MIRRORED[0], torch.ones(2, 3), *MIRRORED[2:]),
        "push_elementwise_": (torch.randn(2, 3, 4), products, products.cos(), True, ""),
        "unite_sets": (*sets, torch.tensor([0, 2]), torch.tensor([0, 1]), 100),
        "unite_pairs": (*sets, torch.tensor([0]), torch.tensor([1]), 100),
        "color_graph": (torch.tensor([0, 1, 2]), torch.tensor([1, 0]), 2, "star", "natural"),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck_finds_nothing(name: str) -> None:
    torch.library.opcheck(raw(name), samples()[name])


def test_what_an_operator_wrote_to_is_known_to_be_changed() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    factor = torch.ones(3, 4)
    y = (x * factor).sum()
    raw("seed_rows_")(factor, 0, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_a_function_wrote_to_is_known_to_be_changed() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    factor = torch.ones(3, 4)
    y = (x * factor).sum()
    native.scatter_rows_([factor], [torch.zeros(3, 4)], 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
