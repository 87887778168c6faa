"""GradDict and Grads as mappings: keys by identity, bound to their Params, merged, copied, shown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from grads_samples import two
from noted_calls import noted_calls
from torch import Tensor, nn

from torchzygote import (
    GradDict,
    Grads,
    Params,
    _entries,
    diaghessian,
    gradient,
    jacobian,
    pullback,
    withgradient,
)


def test_equal_tensors_are_two_keys() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    g = GradDict({a: 1.0})
    g[b] = 2.0
    assert (g[a], g[b], len(g)) == (1.0, 2.0, 2)
    assert a in g
    assert a.clone() not in g
    assert 0 not in g
    assert [k is p for k, p in zip(g, [a, b], strict=True)] == [True, True]
    assert [k is p for k, p in zip(reversed(g), [b, a], strict=True)] == [True, True]
    assert g.get(a.clone(), "none") == "none"
    del g[a]
    assert a not in g
    assert g.pop(b) == 2.0
    with pytest.raises(KeyError, match="identity"):
        g[a]
    with pytest.raises(KeyError, match="identity"):
        del g[a]
    with pytest.raises(KeyError, match="got a int"):
        g[0]
    with pytest.raises(TypeError, match="expected a tensor as key, got a str"):
        g["w"] = 1


def test_lookups_never_compare_tensors_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("compared elementwise")

    w, b, g, h = two()
    plain = {w: h[w], b: h[b]}
    monkeypatch.setattr(Tensor, "__eq__", refuse)
    g += plain
    g + h
    assert w in g
    g.merge_(plain)


def test_grads_need_a_value_per_parameter() -> None:
    w, b = torch.ones(2), torch.ones(())
    assert list(Grads(Params([w, b]), {b: 1.0, w: None}).values()) == [None, 1.0]
    with pytest.raises(ValueError, match="a value for each of 2 parameters, got 1"):
        Grads(Params([w, b]), [None])
    with pytest.raises(ValueError, match="the right lacks 1"):
        Grads(Params([w, b]), {w: None})
    with pytest.raises(TypeError, match="expected a Params"):
        Grads([w], [None])
    for single in (torch.ones(1, 3), np.ones((1, 3)), 3):  # not taken for its rows
        with pytest.raises(TypeError, match="values: expected a sequence with a value for each parameter"):
            Grads(Params([w]), single)


def test_from_pairs_and_mappings() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    assert list(GradDict([(a, 1), (b, None)]).values()) == [1, None]
    assert list(GradDict(GradDict({a: 1})).values()) == [1]


def test_what_is_no_mapping_is_refused_by_name() -> None:
    w = torch.ones(2)
    with pytest.raises(TypeError, match="GradDict: source: expected a mapping.*got a int"):
        GradDict(3)
    with pytest.raises(TypeError, match="GradDict: source: .*got a Tensor of a Tensor"):
        GradDict(torch.ones(2, 2))
    for g in (GradDict({w: 1}), Grads(Params([w]), [1])):
        with pytest.raises(TypeError, match="merge_: argument 1: expected a mapping.*got a int"):
            g.merge_({w: 2}, 3)
        with pytest.raises(TypeError, match="expected a tensor as key, got a str"):
            g.merge_({w: 2}, {w: 3, "w": 4})
        assert g[w] == 1


def test_gradients_are_bound_to_their_params() -> None:
    w, b = torch.ones(2), torch.ones(())
    ps = Params([b, w])
    g = gradient(lambda: (w * b).sum(), ps)
    assert isinstance(g, Grads)
    assert g.params is ps
    assert [k is p for k, p in zip(g, [b, w], strict=True)] == [True, True]
    assert isinstance(withgradient(lambda: w.sum(), ps).grad, Grads)
    assert isinstance(jacobian(lambda: w * b, ps), Grads)
    assert isinstance(diaghessian(lambda: (w * b).sum(), ps), Grads)


def test_changing_the_params_later_leaves_the_grads_alone() -> None:
    w, b, c = torch.ones(2), torch.ones(()), torch.ones(1)
    ps = Params([w, b])
    g = gradient(lambda: (w * b).sum(), ps)
    ps.add(c)
    ps.discard(w)
    assert g.params == Params([w, b])
    assert w in g
    assert c not in g
    g.params.discard(b)
    assert g.params == Params([w, b])
    g[c] = torch.zeros(1)
    assert g.params == Params([w, b, c])
    assert ps == Params([b, c])


def test_each_pullback_gives_fresh_grads() -> None:
    w = torch.ones(2)
    ps = Params([w])
    _, back = pullback(lambda: (w**2).sum(), ps)
    first, second = back(1.0), back(1.0)
    first *= 3
    assert torch.equal(second[w], 2 * w)
    assert back(None)[w] is None


def test_merging_takes_over_entries_and_leaves_params_alone() -> None:
    w, b = torch.ones(2), torch.ones(())
    layer = nn.Linear(1, 1)
    pw, pb = Params([w]), Params([b])
    g, h = gradient(lambda: w.sum() * b, pw), gradient(lambda: w.sum() * b, pb)
    k = gradient(lambda: layer(torch.ones(1)).sum(), Params(layer))
    assert g.merge_(h, k) is g
    assert [p is q for p, q in zip(g, [w, b, layer.weight, layer.bias], strict=True)] == [True] * 4
    assert g.params == Params([w, b, layer])
    assert (pw, pb) == (Params([w]), Params([b]))
    assert h.params == pb
    assert repr(g.params) == "Params([float32 (2,), float32 (), weight: float32 (1, 1), bias: float32 (1,)])"
    g.merge_({w: None})
    assert g[w] is None


def test_equality_is_of_keys_and_values() -> None:
    w, _b, g, h = two()
    assert g == g.copy()
    assert g == dict(g.items())
    assert g != h
    assert g != GradDict({w: g[w]})
    assert g != 3
    assert GradDict({w: None}) == GradDict({w: None})
    assert GradDict({w: None}) != GradDict({w: torch.zeros(2)})
    with pytest.raises(TypeError, match="unhashable"):
        hash(g)


# A pair of values, and whether they are equal.
PAIRS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], bool]] = {
    "the same numbers": (lambda: (torch.ones(2, 3), torch.ones(2, 3)), True),
    "other strides": (lambda: (torch.ones(2, 3), torch.ones(3, 2).T), True),
    "expanded": (lambda: (torch.ones(2, 3), torch.ones(1).expand(2, 3)), True),
    "a leaf": (lambda: (torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)), True),
    "another number": (
        lambda: (torch.ones(2, 3), torch.ones(2, 3).index_fill(1, torch.tensor([2]), 0)),
        False,
    ),
    "another shape": (lambda: (torch.ones(2, 3), torch.ones(3, 2)), False),
    "another dtype": (lambda: (torch.ones(2, 3), torch.ones(2, 3).double()), False),
    "not a number": (lambda: (torch.full((2, 3), torch.nan),) * 2, False),
    "sparse": (lambda: (torch.eye(3), torch.eye(3).to_sparse()), True),
    "compressed": (lambda: (torch.eye(3).to_sparse_csr(), torch.eye(3)), True),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_values_are_compared_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = PAIRS[kind]
    keys = [torch.zeros(1) for _ in range(12)]
    left, right = make()
    others = [torch.zeros(())] * 10
    g = GradDict(zip(keys, [torch.ones(2), left, *others], strict=True))
    h = GradDict(zip(keys, [torch.ones(2), right, *others], strict=True))
    calls = noted_calls(monkeypatch, _entries, "equal")
    assert (g == h) is (h == g) is expected
    one_by_one = len(calls) > 2  # the first pair is, each time
    assert one_by_one is ("sparse" in kind or kind == "compressed")
    later = GradDict(zip(keys[::-1], reversed(list(h.values())), strict=True))
    assert (g == later) is expected


def test_a_copy_has_memory_of_its_own() -> None:
    w, b, g, _ = two()
    g[b] = None
    for twin in (g.copy(), copy.copy(g)):
        assert type(twin) is Grads
        assert twin == g
        twin *= 2
        assert twin[b] is not None
        assert g[b] is None
        assert not torch.equal(twin[w], g[w])


def test_deep_copies_and_pickles_stay_with_their_model() -> None:
    model = nn.Linear(2, 1)
    g = gradient(lambda: model(torch.ones(2)).sum(), Params(model))
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin, h = again((model, g))
        assert torch.equal(h[twin.weight], g[model.weight])
        assert list(h.named()) == ["weight", "bias"]
        assert model.weight not in h
    d = copy.deepcopy(GradDict({model.weight: 1}))
    assert list(d.values()) == [1]


def test_named_needs_names() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    g = gradient(lambda: model(torch.ones(2)).sum(), Params(model))
    assert list(g.named()) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="1 of 1 without a name"):
        gradient(lambda: model[0].weight.sum(), Params([model[0].weight])).named()


def test_repr_shows_names_and_shapes() -> None:
    model = nn.Linear(2, 1)
    g = gradient(lambda: model.weight.sum(), Params(model))
    assert repr(g) == "Grads({weight: float32 (1, 2), bias: None})"
    many = GradDict({torch.zeros(1): None for _ in range(40)})
    assert repr(many).endswith("... 30 more})")


# ---- entries that are set ----------------------------------------------------------------------------------


def test_what_cannot_be_a_parameter_is_not_merged_into_grads() -> None:
    w, n = torch.ones(2), torch.tensor([1, 2])
    g = Grads(Params([w]), [torch.ones(2)])
    with pytest.raises(TypeError, match="floating or complex dtype"):
        g.merge_({w: None, n: torch.ones(2)})
    with pytest.raises(TypeError, match="floating or complex dtype"):
        g[n] = torch.ones(2)
    assert g[w].tolist() == [1, 1]
    assert len(g) == 1
    assert GradDict({w: 1}).merge_({n: 2})[n] == 2


def test_merging_again_and_again_keeps_order_and_names() -> None:
    a, b, c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(2, 1)
    model = nn.ModuleDict({"a": a, "b": b, "c": c})
    parts = [Grads(Params({name: part}), [None, torch.ones(1)]) for name, part in model.items()]
    g = parts[0].copy()
    for _ in range(2):
        for part in parts[1:]:
            assert g.merge_(part) is g
    assert list(g.named()) == [name for name, _ in model.named_parameters()]
    assert g.params == Params(model)
    assert list(parts[0].named()) == ["a.weight", "a.bias"]
    assert parts[0].params == Params(a)


def test_views_of_entries() -> None:
    w, b, g, _ = two()
    assert [(k is p, v is g[p]) for (k, v), p in zip(g.items(), (w, b), strict=True)] == [(True, True)] * 2
    assert [v is g[p] for v, p in zip(g.values(), (w, b), strict=True)] == [True] * 2
    assert len(g.items()) == len(g.values()) == 2
    for p, v in g.items():
        g[p] = v * 2  # as in a dict, entries may be replaced meanwhile
    assert list(GradDict({w: 1, b: 2}).values()) == [1, 2]
    plain = GradDict({w: 1})
    with pytest.raises(RuntimeError, match="changed size"):
        for _ in plain.items():
            plain[b] = 2
