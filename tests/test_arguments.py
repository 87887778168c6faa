"""Unusual arguments, tangents and cotangents: what fits, and what is said of what does not."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchzygote import Params, diaghessian, gradient, hessian, jacobian, pullback, pushforward

t = torch.tensor
Pair = namedtuple("Pair", "a b")


def test_a_packed_sequence_has_gradients_in_its_fields() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 2), t([3, 2]), batch_first=True)
    (found,) = gradient(lambda s: (s.data**2).sum(), packed)
    assert type(found) is type(packed)
    assert torch.equal(found.data, 2 * packed.data)
    assert found.batch_sizes is None
    (inside,) = gradient(lambda a: (a["p"].data ** 2).sum(), {"p": packed})
    assert torch.equal(inside["p"].data, 2 * packed.data)


class Strict(Pair):
    """Takes no ``None``."""

    def __new__(cls, a: Any, b: Any) -> Any:
        if b is None or any(x is None for x in b):
            raise ValueError("b: expected tensors")
        return super().__new__(cls, a, b)


def test_gradients_are_in_the_fields_that_they_are_by() -> None:
    (found,) = gradient(lambda p: p.b[0].sum(), Strict((), (torch.ones(2), torch.ones(2))))
    assert found.a == ()
    assert torch.equal(found.b[0], torch.ones(2))
    assert found.b[1] is None


# ---- NumPy ----


@pytest.mark.parametrize("z", [np.clongdouble(1 + 2j), np.complex64(1 + 2j)])
def test_complex_numpy_scalars_keep_their_imaginary_part(z: Any) -> None:
    assert torch.equal(gradient(lambda z: z.abs() ** 2, z)[0], t(2 + 4j))


def test_numpy_arrays_of_any_strides() -> None:
    field = np.zeros(3, [("a", "f4"), ("b", "f8")])["b"]
    field[:] = [1, 2, 3]
    expected = t([1.0, 4.0, 9.0], dtype=torch.float64) * 3
    assert torch.equal(gradient(lambda x: (x**3).sum(), field)[0], expected)
    assert torch.equal(gradient(lambda x: (x**3).sum(), field[::-1])[0], expected.flip(0))


@pytest.mark.parametrize(
    "ones", [np.ones(3)[::-1], np.ones(3, ">f4"), np.ones(3, int), np.ones((3, 2))[:, 0]]
)
def test_numpy_cotangents_and_tangents_of_any_layout(ones: Any) -> None:
    x = t([1.0, 2.0, 3.0])
    _, back = pullback(lambda x: x**2, x)
    assert torch.equal(back(ones)[0], 2 * x)
    assert torch.equal(pushforward(lambda x: x**2, x)(ones), 2 * x)


def test_a_numpy_array_that_f_returns_has_a_shape() -> None:
    _, back = pullback(lambda x: np.ones(3), 1.0)
    assert back(np.ones(3)) == (None,)
    with pytest.raises(ValueError, match=r"cotangent for y of shape \(3,\)"):
        back(np.ones(2))


def test_0_dim_numpy_arrays_that_f_returns_are_what_they_hold() -> None:
    assert gradient(lambda x: np.array(2), 1.0) == (None,)
    with pytest.raises(ValueError, match="complex"):
        gradient(lambda x: np.array(1j), 1.0)
    with pytest.raises(TypeError, match="real scalar"):
        gradient(lambda x: np.array("a"), 1.0)


def test_numpy_integers_are_integers() -> None:
    assert gradient(torch.mul, 2.0, 3.0, argnums=np.int64(-1)) == (None, t(2.0))
    assert gradient(torch.mul, 2.0, 3.0, argnums=[np.int8(1)]) == (None, t(2.0))
    J = jacobian(lambda x: x**2, t([1.0, 2.0]), chunk_size=np.int64(1))[0]
    assert torch.equal(J, torch.diag(t([2.0, 4.0])))
    with pytest.raises(ValueError, match="chunk_size"):
        jacobian(lambda x: x, t([1.0]), chunk_size=np.int64(0))
    with pytest.raises(ValueError, match="argnums"):
        gradient(torch.mul, 2.0, 3.0, argnums=[np.int64(0), -2])


def test_a_numpy_array_that_changes_before_back_is_called() -> None:
    a, b = np.array([1.0, 2.0]), np.array([3.0])
    y, back = pullback(lambda x, s: (x * x * s["b"][0], x), a, {"b": [b]})
    a += 10
    b += 10
    assert torch.equal(y[1], t([1.0, 2.0], dtype=torch.float64))
    ga, gs = back((np.ones(2), None))
    assert torch.equal(ga, t([6.0, 12.0], dtype=torch.float64))
    assert torch.equal(gs["b"][0], t([5.0], dtype=torch.float64))


def test_a_numpy_array_that_changes_before_its_gradient_is_differentiated() -> None:
    a, w = np.array([1.0, 2.0]), t(3.0, dtype=torch.float64, requires_grad=True)
    (g,) = gradient(lambda x: (w * x * x).sum(), a, create_graph=True)
    a += 10
    assert torch.autograd.grad(g.sum(), w)[0] == 6

    def f(w: torch.Tensor) -> torch.Tensor:
        x = np.array([1.0, 2.0])
        (g,) = gradient(lambda x: (w * x * x).sum(), x)
        x += 10
        return g.sum()

    assert gradient(f, 3.0) == (t(6.0),)
    assert torch.func.grad(f)(t(3.0)) == 6


@pytest.mark.parametrize("way", [jacobian, hessian, diaghessian])
def test_a_numpy_array_that_changes_before_a_matrix_is_differentiated(way: Callable[..., Any]) -> None:
    a, w = np.array([1.0, 2.0]), t(3.0, dtype=torch.float64, requires_grad=True)
    found = way(lambda x: (w * x**3).sum(), a, create_graph=True)
    before = [torch.autograd.grad(h.sum(), w, retain_graph=True)[0] for h in found]
    a += 10
    after = [torch.autograd.grad(h.sum(), w, retain_graph=True)[0] for h in found]
    assert before == after


# ---- structures ----


def test_none_stands_for_any_part_of_a_tangent_or_cotangent() -> None:
    x = {"a": t([1.0, 2.0]), "b": Pair(3.0, "opaque")}
    push = pushforward(lambda s: s["a"] * s["b"].a, x)
    assert torch.equal(push({"a": None, "b": Pair(1.0, None)}), t([1.0, 2.0]))
    assert torch.equal(push({"a": t([1.0, 1.0]), "b": None}), t([3.0, 3.0]))
    _, back = pullback(lambda x: {"p": (x, 2 * x), "q": Pair(x, [x])}, 1.0)
    assert back({"p": None, "q": Pair(None, [3.0])}) == (t(3.0),)


def test_the_order_of_keys_does_not_matter() -> None:
    push = pushforward(lambda s: s["a"] + 2 * s["b"], {"a": 1.0, "b": 2.0})
    assert push({"b": 10.0, "a": 1.0}) == 21
    _, back = pullback(lambda x: {"a": x, "b": 2 * x}, 1.0)
    assert back({"b": 10.0, "a": 1.0}) == (t(21.0),)


def test_structures_that_do_not_fit_are_shown() -> None:
    _, back = pullback(lambda x: {"p": (x, x)}, 1.0)
    push = pushforward(lambda s: s["p"][0], {"p": (1.0, 2.0)})
    for given in ({"p": [1.0, 1.0]}, {"p": (1.0,)}, {"q": (1.0, 1.0)}, OrderedDict(p=(1.0, 1.0)), (1.0, 1.0)):
        for function in (back, push):
            with pytest.raises(ValueError, match=r"\{'p': \(\*, \*\)\}"):
                function(given)


# ---- tangents ----


def test_tangents_for_opaque_arguments_are_refused() -> None:
    push = pushforward(lambda x, s: x * 2, 1.0, "text")
    assert push(1.0, None) == 2
    with pytest.raises(ValueError, match=r"push: tangent 1: expected None.*opaque.*got int"):
        push(1.0, 3)
    push = pushforward(lambda s: s["a"] * 2, {"a": 1.0, "mask": t([True])})
    assert push({"a": 1.0, "mask": None}) == 2
    with pytest.raises(ValueError, match=r"push: tangent 0: expected None.*got Tensor of shape \(1,\)"):
        push({"a": 1.0, "mask": t([1.0])})


def test_the_tangent_of_what_f_returns_has_its_form() -> None:
    push = pushforward(lambda x: (np.ones((2, 3)), np.array([True]), "text", 3, x, np.arange(2)), 1.0)
    array, mask, text, number, ydot, integers = push(1.0)
    assert torch.equal(array, torch.zeros(2, 3, dtype=torch.float64))
    assert mask is None
    assert text is None
    assert torch.equal(number, t(0.0))
    assert torch.equal(ydot, t(1.0))
    assert torch.equal(integers, torch.zeros(2))


@pytest.mark.parametrize("f", [lambda z: z * 1j, lambda z: z + 2j, lambda z: torch.complex(z, z) * 1j])
@pytest.mark.parametrize("x", [1.0, t([1.0, 2.0]), t(1.0, dtype=torch.float64)])
def test_a_tangent_has_the_dtype_of_what_f_returns(f: Any, x: Any) -> None:
    tangent = pushforward(f, x)(torch.ones_like(torch.as_tensor(x)))
    assert tangent.dtype == f(torch.as_tensor(x)).dtype


def test_a_cotangent_for_what_has_none_is_refused() -> None:
    _, back = pullback(lambda x: (x, "text"), 1.0)
    assert back((1.0, None)) == (t(1.0),)
    with pytest.raises(ValueError, match="ybar: expected None"):
        back((1.0, 2.0))


@pytest.mark.parametrize("given", ["text", True, [1.0]])
def test_what_is_no_tangent_or_cotangent_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match=rf"push: tangent 0: .*got {type(given).__name__}"):
        pushforward(torch.sin, 1.0)(given)
    with pytest.raises(ValueError, match="ybar: expected"):
        pullback(torch.sin, 1.0)[1](given)


def test_complex_tangents_and_cotangents_of_what_is_real_are_refused() -> None:
    for given in (1j, t(1j), np.complex64(1j), np.array(1j)):
        with pytest.raises(ValueError, match="push: tangent 0: expected a real tangent.*float32"):
            pushforward(torch.sin, 1.0)(given)
        with pytest.raises(ValueError, match="ybar: expected a real cotangent.*float32"):
            pullback(torch.sin, 1.0)[1](given)


# ---- numbers and modules that make no tensor ----


def test_integers_that_no_dtype_holds_are_named() -> None:
    huge = 10**400
    with pytest.raises(OverflowError, match=r"argument 1: .*float32.*10\*\*400.*argnums"):
        gradient(lambda x, y: x, 1.0, huge)
    with pytest.raises(OverflowError, match="a leaf of argument 0: "):
        gradient(lambda s: s["a"][0], {"a": [huge]})
    with pytest.raises(OverflowError, match="push: tangent 0: "):
        pushforward(torch.sin, 1.0)(-huge)
    with pytest.raises(OverflowError, match="ybar: "):
        pullback(torch.sin, 1.0)[1](huge)
    assert gradient(lambda x, y: x, 1.0, huge, argnums=0) == (t(1.0), None)


def test_parameters_that_have_no_shape_yet_are_named() -> None:
    layer, x = nn.LazyLinear(2), torch.ones(3)
    with pytest.raises(ValueError, match="weight.*run the module once first"):
        gradient(lambda m: m(x).sum(), layer)
    with pytest.raises(ValueError, match="weight.*run the module once first"):
        gradient(lambda: layer(x).sum(), Params(layer))
    with pytest.raises(ValueError, match="weight.*run the module once first"):
        pushforward(lambda m: m(x).sum(), layer)(None)
    layer(x)
    assert list(gradient(lambda m: m(x).sum(), layer)[0]) == ["weight", "bias"]


# ---- what is not to be changed, or can't be seen ----


def test_a_pushforward_of_what_writes_into_its_argument_leaves_the_callers_tensor_alone() -> None:
    x = t([[1.0, 2.0], [3.0, 4.0]]).t()
    before = x.clone()
    ydot = pushforward(lambda x: x.mul_(2), x)(torch.ones(2, 2))
    assert torch.equal(ydot, torch.full((2, 2), 2.0))
    assert torch.equal(x, before)


def test_params_are_no_arguments_of_a_pushforward() -> None:
    with pytest.raises(TypeError, match="Params"):
        pushforward(lambda: t(1.0), Params())


def test_parameters_made_in_inference_mode_are_refused_instead_of_missed() -> None:
    with torch.inference_mode():
        layer = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="inference.*got weight"):
        gradient(lambda m: m(torch.ones(2)).sum(), layer)
    assert layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="inference.*got weight"):
        gradient(lambda: layer(torch.ones(2)).sum(), Params(layer))


def test_parameters_behind_a_reentrant_checkpoint_of_before_are_refused_instead_of_missed() -> None:
    p, x = torch.ones(3), torch.ones(3, requires_grad=True)
    before = checkpoint(lambda x: (x * p).sum(), x, use_reentrant=True)
    for call in (gradient, jacobian, diaghessian):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            call(lambda: before * 1, Params([p]))
    got = gradient(lambda: checkpoint(lambda x: (x * p).sum(), x, use_reentrant=False), Params([p]))
    assert torch.equal(got[p], torch.ones(3))


# ---- a pushforward stays where it was taken ----


def test_a_pushforward_is_of_a_numpy_array_as_it_was() -> None:
    a = np.array([1.0, 2.0])
    push = pushforward(lambda a: (a**2).sum(), a)
    a[:] = 0
    assert push(np.ones(2)).item() == 6.0


@pytest.mark.parametrize("inside", [False, True])
def test_a_pushforward_of_what_was_written_to_since_is_refused(inside: bool) -> None:
    x = t([1.0, 2.0])
    push = pushforward(lambda s: (s["a"] ** 2).sum(), {"a": x}) if inside else pushforward(torch.square, x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="written to in place since; call pushforward anew"):
        push({"a": t([1.0, 1.0])} if inside else t([1.0, 1.0]))


def test_a_pushforward_has_structures_as_they_were() -> None:
    x = t([1.0, 2.0])
    d, xs = {"a": x, "b": x.clone()}, [x]
    by_dict = pushforward(lambda d: d["a"] * 2 + d["b"] * 3, d)
    by_list = pushforward(lambda xs: sum(xs), xs)
    d["a"] = d.pop("a")
    xs.append(x)
    one = torch.ones(2)
    assert torch.equal(by_dict({"a": one, "b": 0 * one}), 2 * one)
    assert torch.equal(by_list([one]), one)


def test_a_pushforward_has_modules_as_they_are() -> None:
    m = nn.Linear(2, 2, bias=False)
    push = pushforward(lambda m, x: m(x), m, torch.ones(2))
    m.weight = nn.Parameter(torch.zeros(2, 2))
    assert torch.equal(push({"weight": torch.ones(2, 2)}, torch.zeros(2)), t([2.0, 2.0]))


def test_all_pushes_are_of_the_same_draw() -> None:
    x = t([1.0, 2.0, 3.0])
    push = pushforward(lambda x: x * torch.rand(3), x)
    torch.manual_seed(0)
    first, ones = torch.rand(3), torch.ones(3)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(push(ones), first)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(push(2 * ones), 2 * first)  # and leaves the generator alone
    state = torch.get_rng_state()
    assert torch.equal(push(ones), first)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what would be taken for a constant ----


class Settings(dict[str, Any]):
    """A dict that PyTorch's pytrees don't know."""


@pytest.mark.parametrize("kind", [Settings, type("Rows", (list,), {}), type("Fixed", (tuple,), {})])
def test_tensors_in_a_container_that_nobody_knows_are_noticed(kind: Any) -> None:
    holds = kind(a=t(2.0)) if kind is Settings else kind([t(2.0)])
    first = (lambda s: s["a"]) if kind is Settings else (lambda s: s[0])
    with pytest.warns(UserWarning, match=f"argument 0 is a {kind.__name__}, which isn't registered"):
        assert gradient(lambda s, x: first(s) * x, holds, 3.0) == (None, t(2.0))
    assert gradient(lambda s, x: first(s) * x, holds, 3.0, argnums=1) == (None, t(2.0))
    empty = kind(n=1) if kind is Settings else kind([1])
    assert gradient(lambda s, x: x * 2, empty, 3.0) == (None, t(2.0))


def test_odd_containers_are_left_alone() -> None:
    class Lazy(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("not loaded")

    assert gradient(lambda s, x: x * 2, Lazy(a=1), 3.0) == (None, t(2.0))
    run = lambda x: gradient(lambda s, x: s["a"].sum() * x, Settings(a=x), x.sum())[1]
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.ones(3)).item() == 3.0


@pytest.mark.parametrize("call", [gradient, pullback, jacobian, diaghessian])
def test_params_beside_other_arguments_are_refused(call: Callable[..., Any]) -> None:
    x = t([1.0, 2.0])
    params = Params([x])
    with pytest.raises(TypeError, match="argument 1: expected Params alone, in place of all arguments"):
        call(lambda c, ps: (x**2).sum() * c, 2.0, params)
    if call is not jacobian and call is not diaghessian:
        with pytest.raises(TypeError, match="a leaf of argument 1: expected Params alone"):
            call(lambda c, ps: (x**2).sum() * c, 2.0, [params])
    with pytest.raises(TypeError, match="argument 1: expected Params alone"):
        pushforward(lambda c, ps: (x**2).sum() * c, 2.0, params)(1.0, None)
    (found, nothing) = gradient(lambda c, ps: (ps[0] ** 2).sum() * c, 2.0, params, argnums=0)
    assert (found.item(), nothing) == (5.0, None)


# ---- errors of f ----


@dataclasses.dataclass(frozen=True)
class Refused(Exception):
    """Takes no attributes, and no notes."""

    why: str


def test_an_error_that_takes_no_note_reaches_the_caller() -> None:
    def f(n: Any) -> Any:
        raise Refused("because")

    for call in (gradient, jacobian, hessian):
        with pytest.raises(Refused, match="because"):
            call(f, 3)


@pytest.mark.parametrize("call", [hessian, lambda f, x: pushforward(f, x)(x)])
def test_no_argnums_are_advised_where_there_are_none(call: Callable[..., Any]) -> None:
    x = t([1.0, 2.0])
    with pytest.raises(IndexError) as caught:
        call(lambda i: x[i].sum(), t([1]))
    notes = "".join(getattr(caught.value, "__notes__", [])) + repr(caught.value.__cause__)
    assert "let f close over it" in notes
    assert "argnums" not in notes


# ---- NumPy arrays inside a compiled function ----


@pytest.mark.parametrize("a", [np.arange(3.0), np.arange(3), np.arange(6, dtype=np.float32).reshape(2, 3).T])
def test_numpy_arrays_inside_a_compiled_function(a: Any) -> None:
    run = lambda f: torch.compile(f, fullgraph=True, backend="eager")(a)
    ways: list[Callable[[Any], Any]] = [
        lambda a: gradient(lambda x: (x**2).sum(), a),
        lambda a: gradient(lambda d: (d["a"] ** 2).sum(), {"a": a}),
        lambda a: jacobian(lambda x: x**2, a),
        lambda a: (hessian(lambda x: (x**3).sum(), a),),
    ]
    for way in ways:
        torch.testing.assert_close(run(way), way(a))
