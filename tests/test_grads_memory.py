"""Values of Grads that are lazy conjugates or negative views, or share memory with each other or operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from grads_samples import BINARY, IN_PLACE, add_, close, mul_
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torchzygote import GradDict, Grads, Params, copy_, eager_update, gradient, jacobian
from torchzygote._overlap import AddressRanges, detached_from, writable

Step = Callable[[Grads], Any]

# ---- lazy conjugates and negative views --------------------------------------------------------------------

UPDATES: dict[str, Step] = {
    "*=": lambda g: mul_(g, 2),
    "+=": lambda g: add_(g, 1),
    "+= itself": lambda g: add_(g, g),
    "+= a copy": lambda g: add_(g, g.copy()),
    "-=": lambda g: IN_PLACE["-"](g, 1),
    "/=": lambda g: IN_PLACE["/"](g, 2),
    "**=": lambda g: IN_PLACE["**"](g, 2),
    "clip_norm_": lambda g: g.clip_norm_(0.5),
    "copy_": lambda g: copy_(g, torch.arange(2.0)),
    "map_": lambda g: g.map_(torch.square),
}


@pytest.fixture
def z() -> Tensor:
    return torch.tensor([1 + 2j, 3 - 1j])


def lazy(kind: str, z: Tensor) -> Tensor:
    """A conjugate view of ``z``, or a negative view of its imaginary part."""
    value = z.conj() if kind == "conjugate" else z.conj().imag
    assert value.is_conj() or value.is_neg()
    return value


@pytest.mark.parametrize("kind", ["conjugate", "negative"])
@pytest.mark.parametrize("update", UPDATES)
def test_lazy_values_can_be_updated(update: str, kind: str, z: Tensor) -> None:
    before = z.clone()
    value = lazy(kind, z)
    w, b = torch.zeros_like(value), torch.ones(())
    ps = Params([w] if update == "copy_" else [w, b])
    g = Grads(ps, [value, torch.tensor(3.0)][: len(ps)])
    plain = Grads(ps, [value.clone(), torch.tensor(3.0)][: len(ps)])
    UPDATES[update](g)
    UPDATES[update](plain)
    close(g, plain)
    assert torch.equal(z, before)


@pytest.mark.parametrize("kind", ["conjugate", "negative"])
def test_lazy_values_are_examined_clipped_and_assigned(kind: str, z: Tensor) -> None:
    value = lazy(kind, z)
    w = torch.zeros_like(value)
    g, plain = Grads(Params([w]), [value]), Grads(Params([w]), [value.clone()])
    assert g.nonfinite() == []
    assert torch.equal(g.norm(), plain.norm())
    close(g.clip_norm(1.0), plain.clip_norm(1.0))
    if kind == "negative":
        close(g.clip_value(0.5), plain.clip_value(0.5))
        close(g.copy().clip_value_(0.5), plain.clip_value(0.5))
    g.assign_()
    g.accumulate_(2.0)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 3 * value.clone())
    g.assign_(share=True)
    g.accumulate_()  # into a lazy gradient
    torch.testing.assert_close(w.grad, 2 * value.clone())


@pytest.mark.parametrize("symbol", BINARY)
def test_a_lazy_operand(symbol: str, z: Tensor) -> None:
    w = torch.zeros_like(z)
    g = GradDict({w: z.clone()})
    expected = BINARY[symbol](z, z.conj().resolve_conj())
    close(BINARY[symbol](g, {w: z.conj()}), {w: expected})
    close(IN_PLACE[symbol](g, g.map(torch.conj)), {w: expected})


def test_results_are_no_lazy_conjugates_nor_negative_views(z: Tensor) -> None:
    x = torch.tensor([1.0, 2.0])

    def loss() -> Tensor:
        return (z.conj() * torch.tensor([1j, 2.0])).real.sum()

    def negative() -> Tensor:
        return torch.complex(torch.zeros(2), x).conj().imag.sum()

    ps, px = Params([z]), Params([x])
    expected = torch.tensor([1j, 2.0])
    for result in (gradient(loss, ps)[z], jacobian(loss, ps)[z][0]):
        assert not result.is_conj()
        torch.testing.assert_close(result, expected)
    for result in (gradient(negative, px)[x], jacobian(negative, px)[x][0]):
        assert not result.is_neg()
        torch.testing.assert_close(result, -torch.ones(2))
    J = jacobian(lambda: (z.conj() * torch.tensor([1j, 2.0])).real, ps)
    J *= 2
    torch.testing.assert_close(J[z], 2 * torch.diag(expected))


def test_copy_writes_into_lazy_parameters_and_vectors(z: Tensor) -> None:
    memory = z.clone()
    ps = Params([memory.conj(), memory.imag * 1])
    copy_(ps, torch.tensor([1j, 2, 3, 4]).real)
    assert torch.equal(memory, torch.tensor([0j, 2]))
    negative = z.conj().imag
    copy_(Params([negative, torch.zeros(())]), torch.tensor([5.0, 6.0, 7.0]))
    assert torch.equal(z.imag, torch.tensor([-5.0, -6.0]))
    vector = torch.zeros(2, dtype=torch.complex64).conj()
    copy_(vector, Params([memory]))
    assert torch.equal(vector, memory)


# ---- values that overlap -----------------------------------------------------------------------------------


def test_an_operand_that_is_a_view_of_the_value_is_read_first() -> None:
    w = torch.zeros(2, 2)
    for symbol in "+-*/":
        g = GradDict({w: torch.tensor([[3.0, -4.0], [1.0, 2.0]])})
        expected = BINARY[symbol](g, g.map(lambda v: v.T))
        memory = g[w].data_ptr()
        close(IN_PLACE[symbol](g, g.map(lambda v: v.T)), expected)
        assert g[w].data_ptr() == memory


def test_an_operand_that_is_part_of_another_value_is_read_first() -> None:
    w, b = torch.zeros(2), torch.zeros(())
    v = torch.tensor([10.0, 20.0])
    g = GradDict({w: v, b: torch.tensor(1.0)})
    g += {w: torch.ones(2), b: v[0]}
    close(g, {w: torch.tensor([11.0, 21.0]), b: torch.tensor(11.0)})
    assert g[w] is v


def test_a_number_that_is_part_of_a_value_is_read_first() -> None:
    w, b, d = torch.zeros(2), torch.zeros(()), torch.zeros(2, dtype=torch.float64)
    v = torch.tensor([10.0, 20.0])
    g = GradDict({w: v, b: torch.tensor(1.0), d: torch.ones(2, dtype=torch.float64)})
    g *= v[0]
    close(g, {w: torch.tensor([100.0, 200.0]), b: torch.tensor(10.0), d: torch.full_like(d, 10.0)})


@pytest.mark.parametrize("operand", ["number", "mapping", "their own"])
def test_values_that_overlap_are_each_updated_once(operand: str) -> None:
    first, second, third = torch.zeros(3), torch.zeros(3), torch.zeros(2)
    u = torch.arange(6.0)
    g = GradDict({first: u[:3], second: u[1:4], third: u[4:]})
    factors: Any = 2
    if operand == "mapping":
        factors = {first: torch.full((3,), 2.0), second: torch.full((3,), 3.0), third: torch.ones(2)}
    elif operand == "their own":
        factors = dict(g.items())
    expected = g * factors
    g *= factors
    close(g, expected)
    assert g[first].data_ptr() == u.data_ptr()
    assert g[third].data_ptr() == u[4:].data_ptr()  # beside the others, not over them


@pytest.mark.parametrize("case", ["transposed", "rows", "interleaved", "same", "same, as double", "empty"])
def test_any_two_views_of_one_memory(case: str) -> None:
    u = torch.arange(12.0).reshape(3, 4)
    values: Mapping[str, tuple[Tensor, Tensor]] = {
        "transposed": (u, u.T),
        "rows": (u[:2], u[1:]),
        "interleaved": (u[:, :2], u[:, 2:]),
        "same": (u, u.view(3, 4)),
        "same, as double": (u, u.view(-1).view(torch.float64)),
        "empty": (u[:0], u[:, 4:]),
    }
    a, b = values[case]
    ka, kb = torch.zeros_like(a), torch.zeros_like(b)
    h = {ka: torch.full_like(a, 3.0), kb: torch.full_like(b, 5.0)}
    for symbol in "+-*/":
        g = GradDict({ka: a, kb: b})
        expected = BINARY[symbol](g, h)
        kept = u.clone()
        close(IN_PLACE[symbol](g, h), expected)
        u.copy_(kept)


def test_the_same_memory_on_both_sides_stays_in_place() -> None:
    w, b = torch.zeros(2, 3), torch.zeros(())
    v = torch.rand(3, 2).T
    g = Grads(Params([w, b]), [v, torch.tensor(2.0)])
    expected = g * g
    g *= {w: v.view(2, 3), b: g[b]}
    close(g, expected)
    assert g[w].data_ptr() == v.data_ptr()


def test_values_that_overlap_are_clipped_and_copied_to() -> None:
    first, second = torch.zeros(3), torch.zeros(3)

    def grads() -> Grads:
        u = torch.arange(6.0)
        return Grads(Params([first, second]), [u[:3], u[1:4]])

    g = grads()
    expected, bounded = g.clip_norm(1.0), g.clip_value(0.5, 2.0)
    g.clip_norm_(1.0)
    close(g, expected)
    close(grads().clip_value_(0.5, 2.0), bounded)
    g = copy_(grads(), torch.arange(6.0) * 5)
    assert torch.equal(g.to_vector(), torch.arange(6.0) * 5)


def test_accumulating_into_gradients_that_overlap() -> None:
    first, second = torch.zeros(3), torch.zeros(3)
    u = torch.arange(6.0)
    first.grad, second.grad = u[:3], u[1:4]
    g = Grads(Params([first, second]), [torch.ones(3), torch.ones(3)])
    g.accumulate_(10.0)
    torch.testing.assert_close(first.grad, torch.tensor([10.0, 11, 12]))
    torch.testing.assert_close(second.grad, torch.tensor([11.0, 12, 13]))
    v = torch.arange(4.0)
    first.grad, second.grad = v[1:], torch.zeros(3)
    g = Grads(Params([first, second]), [v[:3], v[:3]])
    g.accumulate_()  # p.grad lies over the values, which stay as they are
    torch.testing.assert_close(first.grad, torch.tensor([1.0, 3, 5]))
    torch.testing.assert_close(second.grad, torch.tensor([0.0, 1, 2]))
    assert v.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_operands_with_the_memory_of_a_value() -> None:
    w, b = torch.zeros(2), torch.zeros(2)
    v = torch.tensor([1.0, 2.0])
    g = GradDict({w: v, b: torch.ones(2)})
    swapped = torch.sparse_coo_tensor([[1, 0]], v, (2,), check_invariants=True)
    g += {w: torch.ones(2), b: swapped}
    close(g, {w: torch.tensor([2.0, 3.0]), b: torch.tensor([3.0, 2.0])})


def test_a_refused_operation_changes_nothing() -> None:
    a, b = torch.ones(2), torch.ones(2)
    g = GradDict({a: torch.full((2,), 2.0), b: torch.tensor([2, 4])})
    before = g.copy()
    with pytest.raises(RuntimeError, match="negative integer powers"):
        g **= -1
    assert g == before
    with pytest.raises(ValueError, match="one device"):
        g += {a: torch.ones(2), b: torch.ones((), dtype=torch.int64, device="meta")}
    assert g == before
    h = GradDict({a: torch.ones(2), b: torch.tensor([True, False])})
    unchanged = h.copy()
    with pytest.raises(TypeError, match="bool"):
        h -= h.copy()
    assert h == unchanged


@pytest.fixture
def every_warning() -> Iterator[None]:
    """Warnings that PyTorch gives once, each time."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.filterwarnings("error")
def test_memory_of_fake_tensors_is_told_apart_without_their_addresses() -> None:
    with FakeTensorMode():
        w, b = torch.zeros(3), torch.zeros(3)
        u, v = torch.arange(6.0), torch.ones(3)
        g = Grads(Params([w, b]), [u[:3], u[1:4]])
        h = Grads(Params([w, b]), [v, torch.ones(3)])
        g += h  # the second lies over the first: replaced
        assert (g[w].untyped_storage()._cdata == u.untyped_storage()._cdata, g[b]._is_view()) == (True, False)
        apart = h[w], h[b]
        h += h.copy()
        assert (h[w] is apart[0], h[b] is apart[1]) == (True, True)
        h *= 2
        assert h[w] is v
        w.grad = torch.zeros(3)
        h.accumulate_()
        h.clip_norm_(1.0)
        p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
        with eager_update(lambda p, grad: None, [p, q]):
            pass


def test_memory_of_meta_tensors_is_told_apart() -> None:
    u, v = torch.zeros(6, device="meta"), torch.zeros(6, device="meta")
    assert AddressRanges([u[:3]]).meets(u[2:4])
    assert AddressRanges([u[2:4], v]).meets(u[:3])
    assert not AddressRanges([u[:3]]).meets(u[3:])
    assert not AddressRanges([u]).meets(v[2:])
    assert not AddressRanges([u]).meets(u[:0])
    assert writable([u[:3], u[2:5], u[5:], v]) == ([0, 2, 3], [1])
    ys = [u[:3], u[1:4], v[1:4]]
    same, *moved = detached_from([u[:3], v[:3], v[3:]], [0, 1, 2], ys)
    assert same is ys[0]
    assert not any(map(AddressRanges([u, v]).meets, moved))


def test_memory_of_functional_tensors_is_that_of_the_whole() -> None:
    u, v = (torch._to_functional_tensor(torch.zeros(6)) for _ in range(2))
    assert AddressRanges([u[:3]]).meets(u[2:4])
    assert not AddressRanges([u]).meets(v[2:])
    assert writable([u[:3], v, u[2:5]]) == ([0, 1], [2])
    ys = [u[1:4], v]
    moved, same = detached_from([u[:3], v], [0, 1], ys)
    assert same is v
    assert not AddressRanges([u]).meets(moved)


def test_memory_of_fake_tensors_of_unknown_size_is_that_of_the_whole() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.zeros(7), symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC]))
    with mode:
        assert AddressRanges([x]).meets(x * 1) is False
        assert AddressRanges([x]).meets(x[2:])
