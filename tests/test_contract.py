"""The public contract of arguments and gradients, promise by promise, independent of how it is kept."""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from torchzygote import gradient, jacobian, pullback, pushforward, withgradient

t = torch.tensor


def same(a: object, b: object) -> bool:
    """Equal in structure, type, dtype, shape and value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is b


# ---- arguments ----


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (2, torch.float32),
        (2.0, torch.float32),
        (2 + 0j, torch.complex64),
        (np.float64(2), torch.float32),
        (np.int64(2), torch.float32),
        (np.float16(2), torch.float32),
        (np.complex128(2), torch.complex64),
    ],
)
def test_numbers_become_0_dim_tensors_of_the_default_dtype(x: object, dtype: torch.dtype) -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return (x * x.conj()).real

    (g,) = gradient(f, x)
    assert seen[0].dtype == dtype
    assert seen[0].shape == ()
    assert same(g, t(4, dtype=dtype))


def test_numbers_follow_the_default_dtype(float64: None) -> None:
    assert same(gradient(lambda x: x**2, 3), (t(6.0, dtype=torch.float64),))
    assert gradient(lambda x: (x * x.conj()).real, 1j)[0].dtype == torch.complex128


@pytest.mark.parametrize(
    "opaque", ["text", None, True, np.bool_(True), (i for i in range(3)), object(), b"x", len]
)
def test_opaque_values_reach_f_untouched(opaque: object) -> None:
    def f(x: torch.Tensor, o: object) -> torch.Tensor:
        assert o is opaque
        return x**2

    g = gradient(f, 3.0, opaque)
    assert same(g, (t(6.0), None))


@pytest.mark.parametrize("b", [t([True, False]), np.array([True, False])])
def test_boolean_arrays_are_opaque(b: object) -> None:
    def f(x: torch.Tensor, mask: object) -> torch.Tensor:
        assert mask is b
        return (x * torch.as_tensor(mask)).sum()

    assert same(gradient(f, t([1.0, 2.0]), b), (t([1.0, 0.0]), None))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_integer_tensors_are_promoted(dtype: torch.dtype) -> None:
    x = t([1, 2, 3], dtype=dtype)
    assert same(gradient(lambda x: (x**2).sum(), x)[0], t([2.0, 4.0, 6.0]))
    assert x.dtype == dtype


def test_numpy_arrays_keep_their_floating_dtype() -> None:
    a = np.array([1.0, 2.0])
    (g,) = gradient(lambda x: (x**2).sum(), a)
    assert same(g, t([2.0, 4.0], dtype=torch.float64))
    (g,) = gradient(lambda x: (x**2).sum(), np.array([1, 2]))
    assert same(g, t([2.0, 4.0]))
    readonly = np.array([1.0, 2.0], dtype=np.float32)
    readonly.flags.writeable = False
    assert same(gradient(lambda x: (x**2).sum(), readonly)[0], t([2.0, 4.0]))
    reverse = np.array([1.0, 2.0])[::-1]
    assert same(gradient(lambda x: (x**2).sum(), reverse)[0], t([4.0, 2.0], dtype=torch.float64))
    assert gradient(lambda x: (x**2).sum(), np.zeros((2, 0)))[0].shape == (2, 0)
    assert same(gradient(lambda x: x**2, np.array(3.0))[0], t(6.0, dtype=torch.float64))


@pytest.mark.parametrize("index", [t([2, 0]), 1, np.array([2, 0])])
def test_promotion_is_named_when_f_raises(index: object) -> None:
    a = t([1.0, 2.0, 3.0])
    with pytest.raises(IndexError) as error:
        gradient(lambda a, i: a[i].sum(), a, index if not isinstance(index, int) else t(index))
    notes = "\n".join(getattr(error.value, "__notes__", [])) + repr(error.value.__cause__)
    assert "argument 1" in notes
    assert "argnums" in notes


def test_argnums_keeps_the_others_as_given() -> None:
    index = t([2, 0])

    def f(a: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        assert i is index
        return a[i].sum()

    assert same(gradient(f, t([1.0, 2.0, 3.0]), index, argnums=0), (t([1.0, 0.0, 1.0]), None))
    assert same(gradient(lambda a, n: a * int(n), 2.0, 3, argnums=(0,)), (t(3.0), None))
    assert same(gradient(lambda a, n: a * n, 2.0, 3, argnums=[1, 0]), (t(3.0), t(2.0)))

    def number(a: float, b: torch.Tensor) -> torch.Tensor:
        assert type(a) is int
        return a * b

    assert same(gradient(number, 2, 3.0, argnums=1), (None, t(2.0)))
    assert same(jacobian(lambda a, n: a * n, t([1.0, 2.0]), 3, argnums=1), (None, t([1.0, 2.0])))


@pytest.mark.parametrize("argnums", [2, (0, 2), -3, (0, 0), [1, 1]])
@pytest.mark.parametrize("entry", [gradient, withgradient, pullback, jacobian])
def test_bad_argnums(entry: object, argnums: object) -> None:
    with pytest.raises(ValueError, match="argnums"):
        entry(lambda a, b: a * b, 1.0, 2.0, argnums=argnums)


def test_the_callers_tensors_are_never_changed() -> None:
    x = t([1.0, 2.0])
    p = t([1.0, 2.0], requires_grad=True)
    model = nn.Linear(2, 1)
    frozen = [q.clone() for q in model.parameters()]

    class Boom(Exception):
        pass

    def bad(*args: object) -> torch.Tensor:
        raise Boom

    for f in (lambda x, p, m: (m(x) * p).sum(), bad):
        for entry in (gradient, jacobian, pullback):
            with pytest.raises(Boom) if f is bad else nullcontext():
                entry(f, x, p, model)
    assert not x.requires_grad
    assert x.grad is None
    assert p.requires_grad
    assert p.is_leaf
    assert p.grad is None
    assert all(q.requires_grad and q.grad is None for q in model.parameters())
    assert all(torch.equal(q, r) for q, r in zip(model.parameters(), frozen, strict=True))


def test_results_carry_no_graph_at_top_level() -> None:
    p = t([1.0, 2.0], requires_grad=True)
    assert not gradient(lambda x: (x * p).sum(), t([1.0, 2.0]))[0].requires_grad
    assert not gradient(lambda x: (x**2).sum(), p)[0].requires_grad
    value, grad = withgradient(lambda x: ((x * p).sum(), x * p), t([1.0, 2.0]))
    assert not value[0].requires_grad
    assert not value[1].requires_grad
    assert not grad[0].requires_grad
    y, back = pullback(lambda x: x * p, t([1.0, 2.0]))
    assert not y.requires_grad
    assert not back(torch.ones(2))[0].requires_grad
    assert not jacobian(lambda x: x * p, t([1.0, 2.0]))[0].requires_grad


def test_create_graph_joins_a_plain_autograd_graph() -> None:
    p = t([1.0, 2.0], requires_grad=True)
    (g,) = gradient(lambda x: (x**2 * p).sum(), t([3.0, 4.0]), create_graph=True)
    g.sum().backward()
    assert torch.equal(p.grad, t([6.0, 8.0]))
    q = t([3.0, 4.0], requires_grad=True)
    (g,) = gradient(lambda x: (x**3).sum(), q, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.sum(), q)[0], t([18.0, 24.0]))


def test_results_are_differentiable_inside_another_differentiation() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return gradient(lambda y: (x * y**3).sum(), x)[0].sum()  # 3 x³

    x = t([1.0, 2.0])
    assert torch.allclose(gradient(inner, x)[0], 9 * x**2)
    assert torch.allclose(torch.func.grad(inner)(x), 9 * x**2)
    assert torch.allclose(jacobian(inner, x, mode="forward")[0][0], 9 * x**2)
    assert torch.allclose(torch.func.jacfwd(inner)(x), 9 * x**2)


def test_threads_do_not_disturb_each_other() -> None:
    errors: list[str] = []

    def work(k: int) -> None:
        x = torch.arange(1.0, 5.0) * k
        for _ in range(20):
            if not torch.allclose(gradient(lambda x: (x**2).sum(), x)[0], 2 * x):
                errors.append("gradient")
            for mode in ("forward", "reverse"):
                if not torch.allclose(jacobian(lambda x: x**2, x, mode=mode)[0], torch.diag(2 * x)):
                    errors.append(mode)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_random_functions_are_drawn_once_and_leave_the_state_of_a_plain_call(
    mode: str, chunk_size: int | None
) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(3)

    torch.manual_seed(3)
    y = f(torch.ones(3))
    after = torch.rand(())
    torch.manual_seed(3)
    (J,) = jacobian(f, torch.ones(3), mode=mode, chunk_size=chunk_size)
    assert torch.equal(torch.rand(()), after)
    assert torch.allclose(J, torch.diag(y))


# ---- gradient ----


def test_gradient_examples() -> None:
    assert same(gradient(torch.mul, 2, 3), (t(3.0), t(2.0)))
    got = gradient(lambda a, s: (a * s[0]).sum() + s[1], t([1.0, 2.0, 3.0]), (4, 5))
    assert same(got, (t([4.0, 4.0, 4.0]), (t(6.0), t(1.0))))
    assert repr(withgradient(torch.div, 1, 2)) == (
        "WithGradient(val=tensor(0.5000), grad=(tensor(0.5000), tensor(-0.2500)))"
    )


Point = namedtuple("Point", "x y label")


def test_structures_leaf_by_leaf() -> None:
    s = {"a": t([1.0, 2.0]), "b": [3, (4.0, "text")], "c": Point(2.0, t([5.0]), None)}

    def f(s: dict) -> torch.Tensor:
        return (s["a"] ** 2).sum() + s["b"][1][0] ** 2 + s["c"].x * s["c"].y.sum()

    (g,) = gradient(f, s)
    want = {"a": t([2.0, 4.0]), "b": [None, (t(8.0), None)], "c": Point(t(5.0), t([2.0]), None)}
    assert isinstance(g["c"], Point)
    assert same(g, want)
    (g,) = gradient(lambda d: d["x"] ** 2, OrderedDict(x=3.0))
    assert isinstance(g, OrderedDict)
    assert same(gradient(lambda e, x: x, (), 2.0), ((), t(1.0)))


def test_modules_give_a_dict_of_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    x = torch.randn(4, 2)
    g, gx = gradient(lambda m, x: m(x).sum(), model, x)
    assert list(g) == ["0.weight", "2.weight", "2.bias"]
    want = torch.autograd.grad(model(x).sum(), [model[0].weight, model[2].weight, model[2].bias])
    assert all(torch.allclose(a, b) for a, b in zip(g.values(), want, strict=True))
    assert gx.shape == x.shape
    assert gradient(lambda m, x: m[2](x).sum(), model, torch.ones(1, 3))[0]["0.weight"] is None
    inside = {"net": model, "scale": 2.0}
    (g,) = gradient(lambda s: s["scale"] * s["net"](x).sum(), inside)
    assert list(g["net"]) == ["0.weight", "2.weight", "2.bias"]


def test_what_is_unused_gets_none() -> None:
    assert same(gradient(lambda a, b: a**2, 3.0, t([1.0])), (t(6.0), None))
    assert same(gradient(lambda a: 1.0, 3.0), (None,))
    assert same(gradient(lambda a, b: True, 3.0, t([1.0])), (None, None))
    assert same(gradient(lambda a: 7, t([1.0])), (None,))
    assert same(gradient(lambda a: (a > 0).sum(), t([1.0])), (None,))
    assert same(gradient(lambda a: t(1.0), t([1.0])), (None,))
    assert same(gradient(lambda a: a.argmax(), t([1.0, 2.0])), (None,))
    assert same(gradient(lambda a: np.float64(2.0), t([1.0])), (None,))
    assert same(gradient(lambda a: (a > 0).any(), t([1.0])), (None,))
    p = t(2.0, requires_grad=True)
    assert same(gradient(lambda a: p * 2, t([1.0])), (None,))
    assert same(gradient(lambda a: a.detach().sum(), t([1.0])), (None,))


def test_a_real_argument_gets_a_real_gradient() -> None:
    g = gradient(lambda x: (x * (2 + 1j)).abs(), 3.0)
    assert g[0].dtype == torch.float32
    assert torch.allclose(g[0], t(5.0).sqrt())
    (g,) = gradient(lambda x: torch.fft.fft(x).abs().pow(2).sum(), t([1.0, 2.0, 3.0]))
    assert same(g, t([6.0, 12.0, 18.0])) or torch.allclose(g, t([6.0, 12.0, 18.0]))


def test_complex_gradients_follow_pytorch() -> None:
    (g,) = gradient(lambda z: (z * z.conj()).real, 1 + 2j)
    assert torch.equal(g, t(2 + 4j))
    z = torch.randn(3, dtype=torch.complex128)
    assert torch.allclose(gradient(lambda z: z.abs().pow(2).sum(), z)[0], 2 * z)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x * t([1.0, 2.0]), ValueError, "perhaps you wanted jacobian"),
        (lambda x: x.reshape(1), ValueError, "perhaps you wanted jacobian"),
        (lambda x: np.ones(3), ValueError, "perhaps you wanted jacobian"),
        (lambda x: x * 1j, ValueError, "complex"),
        (lambda x: 1j, ValueError, "complex"),
        (lambda x: "text", TypeError, "str"),
        (lambda x: None, TypeError, "NoneType"),
        (lambda x: [x], TypeError, "list"),
        (lambda x: {"x": x}, TypeError, "dict"),
        (lambda x: (x, x), TypeError, "tuple"),
    ],
)
def test_gradient_refuses_what_is_no_real_scalar(result: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        gradient(result, 2.0)


@pytest.mark.parametrize(
    ("y", "what"),
    [
        (lambda x: ("text", x), "first field of what f returns"),
        (lambda x: (x * 1j,), "first field of what f returns"),
        (lambda x: (x.reshape(1), 1), "first field of what f returns"),
        (lambda x: ((x, x), x), "first field of what f returns"),
        (lambda x: (), "f to return"),
        (lambda x: [x], "f to return"),
    ],
)
def test_withgradient_refuses_a_first_field_that_is_no_real_scalar(y: object, what: str) -> None:
    with pytest.raises((ValueError, TypeError), match=what):
        withgradient(y, 2.0)


Aux = namedtuple("Aux", "loss logits note")


def test_withgradient_returns_all_that_f_returned() -> None:
    value, grad = withgradient(lambda x: Aux((x**2).sum(), x * 2, "note"), t([1.0, 2.0]))
    assert isinstance(value, Aux)
    assert value.note == "note"
    assert torch.equal(value.loss, t(5.0))
    assert torch.equal(value.logits, t([2.0, 4.0]))
    assert same(grad, (t([2.0, 4.0]),))
    assert withgradient(lambda x: 5, 1.0) == (5, (None,))
    got = withgradient(lambda x: (x**2, {"k": [x]}), 3.0)
    assert same(got.val, (t(9.0), {"k": [t(3.0)]}))
    calls = []
    withgradient(lambda x: calls.append(1) or x, 1.0)
    assert len(calls) == 1


# ---- pullback and pushforward ----


def test_pullback_any_number_of_times() -> None:
    y, back = pullback(lambda a, b: a * b, t([1.0, 2.0]), 3)
    assert same(y, t([3.0, 6.0]))
    for _ in range(3):
        assert same(back(t([1.0, 10.0])), (t([3.0, 30.0]), t(21.0)))
    assert back(None) == (None, None)
    y, back = pullback(lambda a: a**2, 3)
    assert same(back(1), (t(6.0),))
    assert same(back(2.5), (t(15.0),))


def test_pullback_of_a_structure() -> None:
    y, back = pullback(lambda a, b: {"p": a * b, "q": (a.sum(), b)}, t([1.0, 2.0]), 3.0)
    assert set(y) == {"p", "q"}
    assert same(back({"p": None, "q": (1.0, None)}), (t([1.0, 1.0]), None)) or same(
        back({"p": None, "q": (1.0, None)}), (t([1.0, 1.0]), t(0.0))
    )
    got = back({"p": t([1.0, 1.0]), "q": (0.0, 1.0)})
    assert same(got, (t([3.0, 3.0]), t(4.0)))


@pytest.mark.parametrize(
    "ybar", [t([1.0]), t([1.0, 2.0, 3.0]), t([[1.0, 2.0]]), 1.0, (t([1.0, 2.0]),), {"y": t([1.0, 2.0])}]
)
def test_a_cotangent_that_does_not_fit(ybar: object) -> None:
    _, back = pullback(lambda a: a * 2, t([1.0, 2.0]))
    with pytest.raises(ValueError, match="expected"):
        back(ybar)


def test_a_cotangent_structure_that_does_not_fit() -> None:
    _, back = pullback(lambda a: (a, a), t([1.0, 2.0]))
    for ybar in (t([1.0, 2.0]), (t([1.0, 2.0]),), [t([1.0, 2.0])] * 2, (t([1.0]), t([1.0, 2.0]))):
        with pytest.raises(ValueError, match="expected"):
            back(ybar)


def test_pushforward() -> None:
    push = pushforward(lambda a, b: a * b, t([1.0, 2.0]), 3)
    assert same(push(t([1.0, 0.0]), 1), t([4.0, 2.0]))
    assert same(push(t([1.0, 0.0]), 0), t([3.0, 0.0]))
    expanded = t([2.0]).expand(3)
    assert same(pushforward(lambda x: x**2, expanded)(t([1.0, 0.0, 1.0])), t([4.0, 0.0, 4.0]))
    assert same(pushforward(lambda x: x**2, t([1.0, 2.0]))(t(1.0).expand(2)), t([2.0, 4.0]))
    ydot = pushforward(lambda s: {"u": s[0] * s[1]}, (2.0, t([3.0])))((1.0, t([0.0])))
    assert same(ydot, {"u": t([3.0])})
    with pytest.raises(ValueError, match="expected"):
        pushforward(lambda x: x, t([1.0, 2.0]))(t([1.0]))


def test_f_is_called_once() -> None:
    calls = []

    def f(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x**2

    _, back = pullback(f, t([1.0, 2.0]))
    back(t([1.0, 1.0]))
    back(t([1.0, 1.0]))
    assert len(calls) == 1
    jacobian(f, t([1.0, 2.0]), mode="reverse", chunk_size=1)
    assert len(calls) == 2
