"""Entry points inside forward mode that no ``torch.func`` level tells of: linearize, plain dual numbers.

The derivatives are compared with those that plain ``torch.func`` gives, of formulas without this package.
"""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fa
from torch import Tensor
from torch.func import grad, jacrev, jvp, linearize

import torchzygote as tz
from torchzygote import (
    Buffer,
    Params,
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    jacobian,
    pullback,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)

pytestmark = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")

F = Callable[[Tensor], Tensor]
X = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
V = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
ONES = torch.nn.Linear(4, 1, bias=False, dtype=X.dtype)
torch.nn.init.ones_(ONES.weight)


def cubes(z: Tensor) -> Tensor:
    return (z**3).sum() + z[0] * z[1] ** 2 * z[2]


def each(z: Tensor) -> Tensor:
    return torch.stack([z[0] * z[1], z[1].sin(), z[2] ** 3, z[3] * z[0] ** 2])


def plain_hessian(x: Tensor) -> Tensor:
    return jacrev(grad(cubes))(x)


def by_closure(x: Tensor) -> Tensor:
    w = torch.ones_like(X)
    return gradient(lambda w: (w**2 * x**3).sum(), w)[0]


def by_params(x: Tensor) -> Tensor:
    w = torch.ones_like(X)
    return gradient(lambda: (w**2 * x**3).sum(), Params([w]))[w]


def jacobian_by_params(x: Tensor) -> Tensor:
    w = torch.ones_like(X)
    return jacobian(lambda: w**2 * x**3, Params([w]))[w].sum(0)


def by_module(x: Tensor) -> Tensor:
    return gradient(lambda m: m(x[None]).sum() ** 3, ONES)[0]["weight"][0]


def with_buffer(x: Tensor) -> Tensor:
    def f(z: Tensor) -> Tensor:
        buf = Buffer(z)
        for i in range(4):
            buf[i] = z[i] ** 3
        return buf.copy().sum()

    return gradient(f, x)[0]


FIRST: dict[str, tuple[F, F]] = {
    "gradient": (lambda x: gradient(cubes, x)[0], grad(cubes)),
    "gradient create_graph": (lambda x: gradient(cubes, x, create_graph=True)[0], grad(cubes)),
    "gradient create_graph=False": (lambda x: gradient(cubes, x, create_graph=False)[0], grad(cubes)),
    "gradient twice": (
        lambda x: gradient(lambda z: gradient(cubes, z)[0].sum(), x)[0],
        lambda x: plain_hessian(x).sum(0),
    ),
    "withgradient": (lambda x: withgradient(cubes, x).grad[0], grad(cubes)),
    "withgradient val": (lambda x: withgradient(cubes, x).val.reshape(1), lambda x: cubes(x).reshape(1)),
    "pullback": (lambda x: pullback(each, x)[1](V)[0], lambda x: V @ jacrev(each)(x)),
    "pullback y": (lambda x: pullback(each, x)[0], each),
    "jacobian": (lambda x: jacobian(each, x)[0], jacrev(each)),
    "jacobian reverse": (lambda x: jacobian(each, x, mode="reverse")[0], jacrev(each)),
    "jacobian in chunks": (lambda x: jacobian(each, x, chunk_size=3)[0], jacrev(each)),
    "jacobian by rows": (lambda x: jacobian(each, x, chunk_size=1)[0], jacrev(each)),
    "withjacobian val": (lambda x: withjacobian(each, x).val, each),
    "closed over": (by_closure, lambda x: 2 * x**3),
    "params": (by_params, lambda x: 2 * x**3),
    "jacobian by params": (jacobian_by_params, lambda x: 2 * x**3),
    "module": (by_module, lambda x: 3 * x.sum() ** 2 * x),
    "buffer": (with_buffer, lambda x: 3 * x**2),
    "hook": (lambda x: gradient(lambda z: (hook(lambda g: 2 * g, z) ** 3).sum(), x)[0], lambda x: 6 * x**2),
    "checkpointed": (
        lambda x: gradient(lambda z: checkpointed(lambda z: (z**3).sum(), z), x)[0],
        lambda x: 3 * x**2,
    ),
}

SECOND: dict[str, tuple[F, F]] = {
    "hessian": (lambda x: hessian(cubes, x), plain_hessian),
    "hessian reverse": (lambda x: hessian(cubes, x, mode="reverse_over_reverse"), plain_hessian),
    "hessian_reverse": (lambda x: hessian_reverse(cubes, x), plain_hessian),
    "hessian in chunks": (lambda x: hessian(cubes, x, chunk_size=3), plain_hessian),
    "withhessian": (lambda x: withhessian(cubes, x).hess, plain_hessian),
    "withhessian grad": (lambda x: withhessian(cubes, x).grad, grad(cubes)),
    "diaghessian": (lambda x: diaghessian(cubes, x)[0], lambda x: plain_hessian(x).diagonal()),
}

CASES = {**FIRST, **SECOND}
# What runs forward mode itself, which PyTorch doesn't allow within plain dual numbers.
PUSHED: dict[str, F] = {
    "pushforward": lambda x: pushforward(each, x)(V),
    "jacobian": lambda x: jacobian(each, x, mode="forward")[0],
    "hessian": lambda x: hessian(cubes, x, mode="forward_over_reverse"),
    "hessian_dual": lambda x: hessian_dual(cubes, x),
}


def along(f: F, x: Tensor, v: Tensor) -> Tensor:
    return jvp(f, (x,), (v,))[1]


@pytest.mark.parametrize("name", CASES)
def test_linearize(name: str) -> None:
    f, plain = CASES[name]
    y, push = linearize(f, X)
    torch.testing.assert_close(y.detach(), plain(X))
    for v in (V, V.flip(0)):
        torch.testing.assert_close(push(v), along(plain, X, v))


@pytest.mark.parametrize("name", CASES)
def test_dual_numbers(name: str) -> None:
    f, plain = CASES[name]
    with fa.dual_level():
        found = fa.unpack_dual(f(fa.make_dual(X, V)))
        assert found.tangent is not None
    torch.testing.assert_close(found.primal.detach(), plain(X))
    torch.testing.assert_close(found.tangent.detach(), along(plain, X, V))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("hook", "checkpointed")])
def test_batched_dual_numbers(name: str) -> None:
    f, plain = CASES[name]
    found = torch.autograd.functional.jacobian(f, X, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(found, jacrev(plain)(X))


@pytest.mark.parametrize("name", PUSHED)
def test_forward_mode_within_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="forward mode"), fa.dual_level():
        PUSHED[name](fa.make_dual(X, V))
    with pytest.raises(RuntimeError, match="forward mode"):
        linearize(PUSHED[name], X)


def test_forwarddiff() -> None:
    with fa.dual_level():
        found = fa.unpack_dual(gradient(lambda z: forwarddiff(cubes, z), fa.make_dual(X, V))[0])
    torch.testing.assert_close(found.tangent, along(grad(cubes), X, V))


def test_sparse_results_are_refused() -> None:
    with fa.dual_level():
        x = fa.make_dual(X, V)
        for call in (lambda: jacobian(each, x, sparse=True), lambda: hessian(cubes, x, sparse=True)):
            with pytest.raises(RuntimeError, match="sparse=True"):
                call()


def test_plans() -> None:
    J, H = tz.plan_jacobian(each, X), tz.plan_hessian(cubes, X)
    for f, plain in (
        (lambda x: J(x, dense=True)[0], jacrev(each)),
        (lambda x: H(x, dense=True), plain_hessian),
        (H.diagonal, lambda x: plain_hessian(x).diagonal()),
    ):
        with fa.dual_level():
            found = fa.unpack_dual(f(fa.make_dual(X, V))).tangent
        torch.testing.assert_close(found, along(plain, X, V))
        torch.testing.assert_close(linearize(f, X)[1](V), along(plain, X, V))


def test_pullback_from_outside() -> None:
    _, back = pullback(each, X)
    with fa.dual_level():
        found = fa.unpack_dual(back(fa.make_dual(V, X))[0])
    torch.testing.assert_close(found.tangent, X @ jacrev(each)(X))


def test_other_threads_are_left_alone() -> None:
    """While one thread is in forward mode of this package, gradients in another stay without a graph."""
    w = X.clone().requires_grad_()
    found: list[Tensor] = []

    def elsewhere() -> None:
        found.append(gradient(cubes, w)[0])

    def f(x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x.sin()

    pushforward(f, X)(V)
    assert not found[0].requires_grad
    torch.testing.assert_close(found[0], grad(cubes)(X))


def test_pushed_through_a_pullback_from_outside_leaves_no_graph() -> None:
    w = X.clone()
    J = jacrev(each)(X)
    pulls = (pullback(each, X)[1], lambda s: [pullback(lambda: each(w), Params([w]))[1](s)[w]])
    for back in pulls:
        for push in (lambda f: jvp(f, (V,), (X,))[1], lambda f: torch.func.jacfwd(f)(V) @ X):
            found = push(lambda s, back=back: back(s)[0])
            torch.testing.assert_close(found.detach(), X @ J)
            assert not found.requires_grad
    _, back = pullback(each, X)
    seed = V.clone().requires_grad_()  # of a plain graph, which doesn't count
    assert not jvp(lambda s: back(s)[0], (seed,), (X,))[1].requires_grad
    _, back = pullback(each, X.clone().requires_grad_(), create_graph=True)
    assert jvp(lambda s: back(s)[0], (V,), (X,))[1].requires_grad
    # what is differentiated in reverse mode around that keeps its way back
    twice = gradient(lambda s: jvp(lambda s: back(s)[0] ** 2, (s,), (X,))[1].sum(), V)[0]
    torch.testing.assert_close(twice.detach(), 2 * J @ (X @ J))
