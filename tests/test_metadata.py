"""Many tensors are recognized as those seen before: what differs is noticed, and little is asked of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grads_samples import BINARY, IN_PLACE, add_, close, mul_
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchzygote import GradDict, Grads, Params, copy_
from torchzygote._metadata import metadata_of
from torchzygote._overlap import all_apart


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.tensor([3.0, 4.0])


ODD: dict[str, Callable[[], Tensor]] = {
    "another shape": lambda: torch.tensor([[3.0], [4.0]]),
    "another dtype": lambda: torch.tensor([3.0, 4.0], dtype=torch.float64),
    "half": lambda: torch.tensor([3.0, 4.0], dtype=torch.bfloat16),
    "integers": lambda: torch.tensor([3, 4]),
    "complex": lambda: torch.tensor([3.0, 4.0j]),
    "strided": lambda: torch.tensor([3.0, 0.0, 4.0])[::2],
    "expanded": lambda: torch.tensor([3.0]).expand(2),
    "a conjugate": lambda: torch.tensor([3.0, 4.0j]).conj(),
    "a negative view": lambda: torch.tensor([3.0j, 4.0j]).conj().imag,
    "of inference": inference,
    "recorded": lambda: torch.tensor([3.0, 4.0], requires_grad=True) * 1,
    "sparse": lambda: torch.tensor([3.0, 4.0]).to_sparse(),
    "compressed": lambda: torch.tensor([[3.0, 4.0]]).to_sparse_csr(),
    "a parameter": lambda: nn.Parameter(torch.tensor([3.0, 4.0]), requires_grad=False),
    "empty": lambda: torch.zeros(0),
    "0-dim": lambda: torch.tensor(3.0),
}


def plain() -> list[Tensor]:
    return [torch.tensor([float(i), 2.0]) for i in range(3)]


def dense(x: Tensor) -> Tensor:
    return (x if x.layout is torch.strided else x.to_dense()).detach().resolve_conj().resolve_neg()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("first", ["plain", "odd"])
@pytest.mark.parametrize("odd", ODD)
def test_one_that_is_not_like_before_is_noticed(odd: str, first: str) -> None:
    def values(kind: str) -> list[Tensor]:
        xs = plain()
        return xs if kind == "plain" else [xs[0], ODD[odd](), xs[2]]

    for kind in (first, "odd" if first == "plain" else "plain", first):
        keys = [torch.zeros(x.shape, dtype=x.dtype) for x in values(kind)]
        for operand in (2, torch.tensor(2.0), "others"):
            if operand == "others" and any(x.layout is torch.sparse_csr for x in values(kind)):
                continue  # PyTorch doesn't add these to themselves in place
            g = GradDict(zip(keys, values(kind), strict=True))
            right: Any = g.copy() if operand == "others" else operand
            expected = {k: dense(x) + (dense(x) if operand == "others" else right) for k, x in g.items()}
            close(GradDict((k, dense(x)) for k, x in (g + right).items()), expected)
            if all(e.dtype is g[k].dtype for k, e in expected.items()):
                g += right
                close(GradDict((k, dense(x)) for k, x in g.items()), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_no_end_of_the_process() -> None:
    keys = [torch.zeros(2) for _ in range(3)]
    GradDict(zip(keys, plain(), strict=True)) * 2  # seen before, as many as there are now
    for put in (0, 1, 2):
        values = plain()
        values[put] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        assert metadata_of(values) is None
        with pytest.raises(NotImplementedError):  # PyTorch has no multi-tensor calls for them
            GradDict(zip(keys, values, strict=True)) * 2


def test_what_data_assignment_changes_is_seen() -> None:
    a, b, c = (torch.zeros(2) for _ in range(3))
    g = GradDict(zip((a, b, c), plain(), strict=True))
    g *= 2
    g[b].data = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    g *= 2
    assert g[b].tolist() == [2, 4, 6]
    assert (g[b].dtype, g[a].tolist(), g[c].tolist()) == (torch.float64, [0, 8], [8, 8])
    g[b].data = g[a]  # over another value
    g *= 2
    assert [g[k].tolist() for k in (a, b, c)] == [[0, 16], [0, 16], [16, 16]]
    g[b].data = g[c][:1].expand(2)
    g += g
    assert [g[k].tolist() for k in (a, b, c)] == [[0, 32], [32, 32], [32, 32]]


@pytest.mark.parametrize("count", [3, 100])
def test_memory_that_moves_after_it_was_found_apart_is_seen(count: int) -> None:
    keys = [torch.zeros(2) for _ in range(count)]
    g = GradDict(zip(keys, (torch.tensor([float(i), 1.0]) for i in range(count)), strict=True))
    h = GradDict((k, torch.ones(2)) for k in keys)
    for _ in range(3):
        g += h
    assert [v.tolist() for v in g.values()] == [[i + 3.0, 4.0] for i in range(count)]
    h[keys[1]].data = g[keys[0]]  # which is written to before it is read
    g += h
    assert g[keys[0]].tolist() == [4, 5]
    assert g[keys[1]].tolist() == [4 + 3, 4 + 4]
    h[keys[1]].data = torch.ones(2)
    g += h
    g += GradDict(zip(keys, [g[keys[-1]], *list(g.values())[:-1]], strict=True))
    first = [5.0, 8.0, *[i + 5.0 for i in range(2, count)]]
    assert [v[0].item() for v in g.values()] == [first[i] + first[i - 1] for i in range(count)]


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.parametrize("kind", ["one dtype", "two dtypes", "strides"])
def test_many_small_ones_as_one_by_one(symbol: str, kind: str) -> None:
    dtypes = [torch.float64, torch.float32] if kind == "two dtypes" else [torch.float64]
    keys = [torch.zeros(i % 3 + 1, 2, dtype=dtypes[i % len(dtypes)]) for i in range(40)]
    xs, ys = ([torch.rand_like(k) + 0.5 for k in keys] for _ in range(2))
    if kind == "strides":
        ys = [y.T.contiguous().T for y in ys]
    for right in (ys, [torch.tensor(1.5)] * 40):
        operand: Any = dict(zip(keys, ys, strict=True)) if right is ys else right[0]
        expected = {k: BINARY[symbol](x, y) for k, x, y in zip(keys, xs, right, strict=True)}
        g = GradDict((k, x.clone()) for k, x in zip(keys, xs, strict=True))
        memory = [x.data_ptr() for x in g.values()]
        close(BINARY[symbol](g, operand), expected)
        close(IN_PLACE[symbol](g, operand), expected)
        assert [x.data_ptr() for x in g.values()] == memory


@given(
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4), st.integers(1, 3)), max_size=6),
    count=st.integers(0, 6),
)
def test_spans_of_memory(spans: list[tuple[int, int, int]], count: int) -> None:
    base = torch.zeros(24)
    views = [base[start : start + size * step : step] for start, size, step in spans]
    written, read = views[:count], views[count:]
    bytes_of = []
    for v in views:
        reach = 4 * (v.shape[0] - 1) * v.stride(0) + 4 if len(v) else 0
        bytes_of.append(set(range(v.data_ptr(), v.data_ptr() + reach)))
    meet = any(bytes_of[i] & bytes_of[j] for i in range(len(views)) for j in range(min(i, len(written))))
    overlaps = any(a & b for i, a in enumerate(bytes_of) for b in bytes_of[:i])
    assert not (all_apart(written, read) and meet)
    if not overlaps:
        assert all_apart(written, read)


class Asked(TorchFunctionMode):
    """Counts what is asked of tensors, and calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


WORK: dict[str, tuple[Callable[[Grads, Grads], Any], int]] = {
    "+": (lambda g, h: g + h, 2),
    "*": (lambda g, h: g * 2.0, 1),
    "+=": (add_, 4),
    "*=": (lambda g, h: mul_(g, 2.0), 2),
    "*= tensor": (lambda g, h: mul_(g, torch.tensor(2.0)), 2),
    "copy": (lambda g, h: g.copy(), 1 if hasattr(torch, "_foreach_clone") else 2),  # 2.12
    "norm": (lambda g, h: g.norm(), 1),
    "clip_norm_": (lambda g, h: g.clip_norm_(1.0), 3),
    "clip_value_": (lambda g, h: g.clip_value_(1.0), 3),
    "to_vector": (lambda g, h: g.to_vector(), 1),
    "merge_": (lambda g, h: g.merge_(h), 0),
    "accumulate_": (lambda g, h: g.accumulate_(0.5), 6),
    "copy_": (lambda g, h: copy_(torch.zeros(300), g), 5),
}


@pytest.mark.parametrize("work", WORK)
def test_little_is_asked_of_each_tensor(work: str) -> None:
    keys = [torch.zeros(3) for _ in range(100)]
    ps = Params(keys)
    g, h = (Grads(ps, [torch.rand(3) for _ in keys]) for _ in range(2))
    h.assign_()
    run, each = WORK[work]
    with Asked() as once:
        run(g, h)
    with Asked() as again:
        run(g, h)
    assert again.count <= once.count
    assert again.count <= 100 * each + 40


# ---- what only looks alike ---------------------------------------------------------------------------------


def test_what_inference_mode_has_made_is_not_taken_for_what_was_seen_there() -> None:
    keys = [torch.zeros(2), torch.zeros(2)]
    g = GradDict(zip(keys, [torch.ones(2), torch.ones(2)], strict=True))
    with torch.inference_mode():
        g *= 2
        h = g * 1
    h *= 10
    assert [x.tolist() for x in h.values()] == [[20, 20], [20, 20]]
    vector = torch.arange(4.0)
    with torch.inference_mode():
        copy_(Params(keys), vector)
        made = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"inference_mode\(\); nothing was written"):
        copy_(Params(made), vector)
    assert [x.tolist() for x in made] == [[0, 0], [0, 0]]


def test_copies_inside_a_program_that_is_compiled_in_parts() -> None:
    g = Grads(Params([torch.zeros(3), torch.zeros(2)]), [torch.ones(3), torch.ones(2)])
    torch.compile(lambda: copy_(g, torch.arange(5.0)), backend="eager")()
    assert g.to_vector().tolist() == [0, 1, 2, 3, 4]


def test_sums_of_half_precision_in_vectors_under_autocast() -> None:
    g = Grads(Params([torch.zeros(2), torch.zeros(1)]), [torch.ones(2).half(), torch.ones(1).half()])
    with torch.autocast("cpu"):
        assert copy_(torch.zeros(3), g).tolist() == [1, 1, 1]


def test_traces_are_the_same_each_time() -> None:
    ps = Params([torch.ones(3), torch.ones(2)])

    def f(a: Tensor, b: Tensor) -> Tensor:
        return (Grads(ps, [a * 1, b * 1]) * 2).to_vector()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(f, (torch.ones(3), torch.ones(2)))  # compares two runs
    assert traced(torch.arange(3.0), torch.ones(2)).tolist() == [0, 2, 4, 2, 2]


def test_many_lists_of_one_length_are_all_remembered() -> None:
    kinds = [[torch.zeros(n), torch.zeros(n)] for n in range(2, 14)]
    found = [metadata_of(xs) for xs in kinds]
    for _ in range(3):
        assert all(metadata_of(xs) is one for xs, one in zip(kinds, found, strict=True))
