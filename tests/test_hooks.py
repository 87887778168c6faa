"""hook: what fn sees and may return, in every mode, for batches and structures, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from needs_torch import hooks_compiled, hooks_compiled_twice, tracer_forgets_hooks
from torch import Tensor

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian_dual,
    hessian_reverse,
    hook,
    jacobian,
    pullback,
    pushforward,
    showgrad,
)

func = torch.func


def cube_sum(x: Tensor) -> Tensor:
    return (hook(torch.neg, x) ** 3).sum()


# ---- what a hook does to gradients -----------------------------------------------------------------------


def test_what_fn_returns_replaces_the_gradient(x: Tensor) -> None:
    torch.testing.assert_close(gradient(cube_sum, x)[0], -3 * x**2)
    torch.testing.assert_close(func.grad(cube_sum)(x), -3 * x**2)
    y = x.clone().requires_grad_()
    cube_sum(y).backward()
    torch.testing.assert_close(y.grad, -3 * x**2)


def test_the_value_is_the_same_tensor_values_without_a_copy_of_memory(x: Tensor) -> None:
    y = x.clone().requires_grad_()
    copied = hook(torch.neg, y)
    assert torch.equal(copied, y)
    assert copied.data_ptr() == y.data_ptr()


def test_only_gradients_through_the_copy_are_meant(x: Tensor) -> None:
    found = gradient(lambda x: (hook(lambda g: 10 * g, x) * 2 + x * 3).sum(), x)[0]
    torch.testing.assert_close(found, torch.full_like(x, 23))


def test_a_write_into_the_copy_or_its_base_never_loses_the_hook(x: Tensor) -> None:
    def copy_written(x: Tensor) -> Tensor:
        y = hook(lambda g: 2 * g, x * 1)
        y.mul_(3)
        return y.sum()

    def base_written(x: Tensor) -> Tensor:
        z = x * 1
        y = hook(lambda g: 2 * g, z)
        z.mul_(3)
        return y.sum()

    for f in (copy_written, base_written):
        with pytest.raises(RuntimeError, match="(is being|has been) modified inplace"):
            gradient(f, x)
    # inside transforms it is a copy, which sees nothing of what is done to the base
    for f, slope in ((copy_written, 6), (base_written, 2)):
        torch.testing.assert_close(
            func.grad_and_value(f)(x), (torch.full_like(x, slope), slope / 2 * x.sum())
        )


def test_none_leaves_the_gradient(x: Tensor) -> None:
    seen: list[Tensor] = []
    found = gradient(lambda x: (hook(seen.append, x) ** 2).sum(), x)[0]
    torch.testing.assert_close(found, 2 * x)
    torch.testing.assert_close(seen, [2 * x])


def test_forward_mode_is_the_identity(x: Tensor) -> None:
    seen: list[object] = []

    def f(x: Tensor) -> Tensor:
        return hook(lambda g: seen.append(g) or -g, x) ** 3

    torch.testing.assert_close(jacobian(f, x, mode="forward")[0], torch.diag(3 * x**2))
    torch.testing.assert_close(func.jacfwd(f)(x), torch.diag(3 * x**2))
    torch.testing.assert_close(func.jacfwd(func.jacfwd(f))(x).sum((0, 2)), 6 * x)
    torch.testing.assert_close(pushforward(f, x)(torch.ones_like(x)), 3 * x**2)
    assert not seen


def test_forward_mode_by_params_is_the_identity(x: Tensor) -> None:
    grads = jacobian(lambda: hook(torch.neg, x) ** 3, Params([x]), mode="forward")
    torch.testing.assert_close(grads[x], torch.diag(3 * x**2))
    reverse = jacobian(lambda: hook(torch.neg, x) ** 3, Params([x]), mode="reverse")
    torch.testing.assert_close(reverse[x], -torch.diag(3 * x**2))


def test_second_derivatives_bend_once_per_reverse_pass(x: Tensor) -> None:
    torch.testing.assert_close(hessian_dual(cube_sum, x), torch.diag(-6 * x))
    torch.testing.assert_close(hessian_reverse(cube_sum, x), torch.diag(6 * x))
    torch.testing.assert_close(diaghessian(cube_sum, x)[0], 6 * x)
    torch.testing.assert_close(func.hessian(cube_sum)(x), torch.diag(-6 * x))
    torch.testing.assert_close(func.jacrev(func.jacrev(cube_sum))(x), torch.diag(6 * x))
    plain = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cube_sum(plain), plain, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), plain)[0], 6 * x)


def test_what_fn_does_is_differentiated_with_what_it_closes_over(x: Tensor) -> None:
    """The gradient is 3 x² g(x) with g = sin x; its derivative by the closed-over x must not get lost."""

    def bent(x: Tensor) -> Tensor:
        return gradient(lambda y: (hook(lambda g: g * x.sin(), y) ** 3).sum(), x)[0]

    # by x in the cube, seen through the hook of the outer pass as well, and by x in the sine
    expected = torch.diag(6 * x * x.sin() + 3 * x**2 * x.cos())
    torch.testing.assert_close(jacobian(bent, x, mode="forward")[0], expected)
    torch.testing.assert_close(func.jacfwd(bent)(x), expected)
    outer = torch.diag(6 * x * x.sin() * x.sin() + 3 * x**2 * x.cos())
    torch.testing.assert_close(jacobian(bent, x, mode="reverse")[0], outer)
    torch.testing.assert_close(func.jacrev(bent)(x), outer)


def test_a_pullback_calls_the_hook_each_time(x: Tensor) -> None:
    seen: list[Tensor] = []
    _, back = pullback(lambda x: hook(seen.append, x) * 2, x)
    for k in (1.0, 2.0):
        torch.testing.assert_close(back(torch.full_like(x, k))[0], torch.full_like(x, 2 * k))
    assert len(seen) == 2


def test_complex_gradients_go_through() -> None:
    z = torch.tensor([1 + 2j, -1j], dtype=torch.complex128)
    found = gradient(lambda z: hook(lambda g: g * 1j, z).abs().pow(2).sum(), z)[0]
    torch.testing.assert_close(found, 2j * z)


# ---- rows and examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: jacobian(f, x, mode="reverse")[0],
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: jacobian(lambda x: gradient(lambda x: (f(x) ** 2).sum(), x)[0], x, mode="reverse")[0],
    ],
)
def test_batched_rows_are_ordinary_tensors_with_the_rows_first(differentiate: Any, x: Tensor) -> None:
    seen: list[Tensor] = []
    differentiate(lambda x: hook(seen.append, x) ** 2, x)
    rows = [g for g in seen if g.dim() == 2]
    assert rows
    for g in rows:
        assert g.shape == (3, 3)
        assert type(g) is Tensor
        assert not torch._C._functorch.is_batchedtensor(g)


def test_rows_can_be_changed(x: Tensor) -> None:
    def clipped(x: Tensor) -> Tensor:
        return hook(lambda g: g / g.norm(dim=-1, keepdim=True), x) ** 2

    expected = torch.diag(x.sign())
    torch.testing.assert_close(jacobian(clipped, x, mode="reverse")[0], expected)
    torch.testing.assert_close(jacobian(clipped, x, mode="reverse", chunk_size=1)[0], expected)
    torch.testing.assert_close(func.jacrev(clipped)(x), expected)


def test_inside_vmap_fn_works_on_one_example() -> None:
    X = torch.randn(4, 3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (hook(lambda g: g / g.norm(), x) ** 3).sum()

    expected = torch.stack([gradient(f, x)[0] for x in X])
    torch.testing.assert_close(func.vmap(func.grad(f))(X), expected)
    torch.testing.assert_close(func.vmap(lambda x: gradient(f, x)[0])(X), expected)
    torch.testing.assert_close(gradient(lambda X: func.vmap(f)(X).sum(), X)[0], expected)
    torch.testing.assert_close(func.grad(lambda X: func.vmap(f, in_dims=1)(X.T).sum())(X), expected)
    rows = func.jacrev(func.vmap(f))(X)
    torch.testing.assert_close(rows[[0, 1, 2, 3], [0, 1, 2, 3]], expected)
    XX = X.reshape(2, 2, 3)
    nested = gradient(lambda X: func.vmap(func.vmap(f))(X).sum(), XX)[0]
    torch.testing.assert_close(nested, expected.reshape(2, 2, 3))


def test_what_fn_prints_inside_transforms_is_plain(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    def f(x: Tensor) -> Tensor:
        return hook(lambda g: print(g, f"{g}", [g]), x).sum()

    func.vmap(func.grad(f))(x[None])
    func.grad(func.grad(lambda x: f(x) * 1.0))
    func.vmap(lambda x: gradient(lambda x: hook(print, x).sum(), x)[0])(x[None])
    out = capsys.readouterr().out
    assert "tensor([[1., 1., 1.]], dtype=torch.float64)" in out
    assert "lvl" not in out
    assert "BatchedTensor" not in out


# ---- structures ------------------------------------------------------------------------------------------


def test_a_dict_comes_back_by_its_keys(x: Tensor) -> None:
    """In whatever order, as cotangents do; what is missing is another structure."""

    def f(a: Tensor, b: Tensor, bend: Any) -> Tensor:
        parts = hook(bend, {"a": a, "b": {"c": b}})
        return parts["a"].sum() + parts["b"]["c"].sum()

    swapped = lambda g: {"b": {"c": 10 * g["b"]["c"]}, "a": 2 * g["a"]}
    found = gradient(lambda a, b: f(a, b, swapped), x, x)
    torch.testing.assert_close(found, (torch.full_like(x, 2), torch.full_like(x, 10)))
    torch.testing.assert_close(torch.func.grad(lambda a: f(a, a, swapped))(x), torch.full_like(x, 12))
    for other in ({"a": x}, {"a": x, "b": x, "c": x}):
        with pytest.raises(ValueError, match="to return the structure that it got"):
            gradient(lambda a, other=other: f(a, a, lambda g: other), x)


def test_a_named_tuple_whose_constructor_refuses_missing_gradients() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    seen: list[Any] = []

    def f(rows: Tensor) -> Tensor:
        parts = hook(lambda g: seen.append(g), {"p": packed._replace(data=rows)})
        tripled = hook(lambda g: g._replace(data=3 * g.data), parts["p"])
        return (tripled.data**2).sum()

    for found in (gradient(f, packed.data)[0], torch.func.grad(f)(packed.data)):
        torch.testing.assert_close(found, 6 * packed.data)
        g = seen.pop()["p"]
        assert type(g) is type(packed)
        assert g.batch_sizes is None
        torch.testing.assert_close(g.data, found)


def test_a_structure_reaches_fn_whole(x: Tensor) -> None:
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        parts = hook(seen.append, {"a": x, "b": (x.sin(), "text"), "n": 3})
        return (parts["a"] * parts["b"][0]).sum() * parts["n"]

    found = gradient(f, x)[0]
    torch.testing.assert_close(found, 3 * (x.sin() + x * x.cos()))
    (g,) = seen
    torch.testing.assert_close(g["a"], 3 * x.sin())
    torch.testing.assert_close(g["b"][0], 3 * x)
    assert g["b"][1] is None
    assert g["n"] is None


def test_leaves_without_gradient_are_none_and_none_leaves_a_leaf(x: Tensor) -> None:
    seen: list[Any] = []

    def bend(g: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        seen.append(g)
        return (-g[0], None, None)

    def f(x: Tensor) -> Tensor:
        a, b, _ = hook(bend, (x, x * 2, x * 5))
        return (a + b).sum()

    for g in (gradient(f, x)[0], func.grad(f)(x)):
        torch.testing.assert_close(g, torch.full_like(x, -1 + 2))
    assert seen[0][2] is None
    assert seen[1][2] is None


def test_a_joint_norm_of_several_gradients(x: Tensor) -> None:
    def joint(gs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        norm = torch.cat(gs).norm()
        return tuple(g / norm for g in gs)

    a, b = gradient(lambda a, b: sum((t**2).sum() for t in hook(joint, (a, b))), x, 2 * x)
    torch.testing.assert_close(torch.cat([a, b]).norm(), torch.tensor(1.0, dtype=torch.float64))


# ---- torch.compile ---------------------------------------------------------------------------------------


@hooks_compiled_twice
def test_compiled_hooks_bend_as_they_do_uncompiled(x: Tensor) -> None:
    def joint(x: Tensor) -> Tensor:
        a, b = hook(lambda g: (g[1], g[0]), (x, x.sin()))
        return (a * 2 + b**3).sum()

    def all_of_them(x: Tensor) -> list[Tensor]:
        return [
            gradient(cube_sum, x)[0],
            func.vmap(func.grad(cube_sum))(x[None]),
            gradient(joint, x)[0],
            func.hessian(cube_sum)(x),
            func.jacrev(func.jacrev(cube_sum))(x),
            func.jacfwd(func.jacfwd(cube_sum))(x),
            gradient(lambda x: (hook(print, showgrad(x)) ** 2).sum(), x)[0],
            gradient(lambda x: (hook(lambda g: g.float() / 3, x) ** 2).sum(), x)[0],
            gradient(lambda x: (hook(lambda g: [g[0].float() / 3], [x])[0] ** 2).sum(), x)[0],
        ]

    torch._dynamo.reset()
    found = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, all_of_them(x))


@hooks_compiled_twice
def test_compiled_inside_vmap_it_works_on_one_example(x: Tensor) -> None:
    X = torch.randn(4, 3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (hook(lambda g: g / g.norm(), hook(lambda g: None, x)) ** 3).sum()

    def all_of_them(X: Tensor) -> list[Tensor]:
        return [
            func.grad(lambda X: func.vmap(f, in_dims=1)(X.T).sum())(X),
            gradient(lambda X: func.vmap(func.vmap(f))(X.reshape(2, 2, 3)).sum(), X)[0],
            func.vmap(func.grad(f))(X),
        ]

    torch._dynamo.reset()
    found = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(found, all_of_them(X))
    torch.compile(lambda X: func.vmap(f)(X).sum(), fullgraph=True, backend="aot_eager")(
        X.requires_grad_()
    ).backward()
    torch.testing.assert_close(X.grad, found[2])


@hooks_compiled
@pytest.mark.skipif(not tracer_forgets_hooks, reason="Dynamo follows hooks in second derivatives")
@pytest.mark.parametrize(
    "twice",
    [
        lambda x: func.grad(lambda x: gradient(cube_sum, x)[0].sum())(x),
        lambda x: func.hessian(cube_sum)(x),
        lambda x: func.grad(lambda x: pushforward(cube_sum, x)(x))(x),
    ],
)
def test_compiled_second_derivatives_are_refused_where_they_would_be_zero(twice: Any, x: Tensor) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="forgets hooks|ApplyTemplate|jvp function for custom"):
        torch.compile(twice, fullgraph=True, backend="aot_eager")(x)
