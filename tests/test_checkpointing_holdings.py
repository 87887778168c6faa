"""Checkpointing: what functions hold besides their arguments, and others change before the rerun."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from checkpoint_cases import Checkpoint, plainly, ways
from torch import Tensor, nn
from torch.func import grad

from torchzygote import Params, checkpointed, eager_update, gradient, hessian, jacobian, pullback


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


DERIVATIVES = ways("gradient", "jacobian", "hessian", "func.grad", "func.jacrev", "func.jacrev twice")

LAYERS = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)]


# ---- what is put back --------------------------------------------------------------------------------------


def a_variable(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    h = x * 1
    for _ in range(3):
        h = h + checkpoint(lambda: torch.tanh(h * w))
    return h


def a_variable_that_is_a_number_first(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    h: Any = 0
    for _ in range(3):
        h = checkpoint(lambda: torch.tanh(h + x * w))
    return h


def the_variables_of_a_loop(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    for i, layer in enumerate(LAYERS):
        x = checkpoint(lambda x: torch.tanh(layer(x)) * (i + 1), x)
    return x


def of_a_function_that_is_closed_over(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    def step(x: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    for layer in LAYERS:  # noqa: B007 (step reads it)
        x = checkpoint(functools.partial(lambda y, x: step(x) * y, w), x)
    return x


def functions_made_in_a_loop(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    for layer in LAYERS:

        def step(x: Tensor, layer: nn.Module = layer) -> Any:
            return torch.tanh(layer(x))

        x = checkpoint(lambda x: step(x) + x, x)
    return x


def entries_of_a_dict(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    state = {"h": x * 1}
    for _ in range(3):
        state["h"] = state["h"] + checkpoint(lambda: torch.tanh(state["h"] * w))
    return state["h"]


def a_list_that_grows(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    hs = [x * 1]
    for _ in range(3):
        hs.append(checkpoint(lambda: torch.tanh(hs[-1] * w) + hs[0]))
    return hs[-1]


def a_variable_that_is_done_with(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    h: Any = x.sin()
    y = checkpoint(lambda: torch.tanh(h * w))
    h = None
    return y


BODIES = [
    a_variable,
    a_variable_that_is_a_number_first,
    the_variables_of_a_loop,
    of_a_function_that_is_closed_over,
    functions_made_in_a_loop,
    entries_of_a_dict,
    a_list_that_grows,
    a_variable_that_is_done_with,
]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("body", BODIES)
def test_what_is_closed_over_is_as_it_was(body: Any, derivative: str, x: Tensor, w: Tensor) -> None:
    expected = DERIVATIVES[derivative](lambda x: body(plainly, w, x), x)
    found = DERIVATIVES[derivative](lambda x: body(checkpointed, w, x), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_and_is_as_it_is_after_the_rerun(fails: bool, x: Tensor) -> None:
    runs = 0

    def f(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if fails and runs == 2:
            raise KeyError
        return (x * scale).sin() * len(names)

    scale, names = 2, ["a"]
    y = checkpointed(f, x.requires_grad_()).sum()
    scale = 5
    names.append("b")
    if fails:
        with pytest.raises(KeyError):
            y.backward()
    else:
        y.backward()
        torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos())
    assert (scale, names, runs) == (5, ["a", "b"], 2)


# ---- what is refused ---------------------------------------------------------------------------------------

H: Any = None


def a_global_variable(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    global H
    H = x * 1
    for _ in range(2):
        H = H + checkpoint(lambda: torch.tanh(H * w))
    return H


class Cell:
    def __init__(self, h: Any) -> None:
        self.h = h

    def step(self, w: Tensor) -> Any:
        return torch.tanh(self.h * w)

    __call__ = step


def an_attribute(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    cell = Cell(x * 1)
    cell.h = cell.h + checkpoint(lambda: torch.tanh(cell.h * w))
    return cell.h


def of_a_bound_method(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    cell = Cell(x * 1)
    cell.h = cell.h + checkpoint(cell.step, w)
    return cell.h


def of_a_callable_object(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    cell = Cell(x * 1)
    cell.h = cell.h + checkpoint(cell, w)
    return cell.h


@pytest.mark.parametrize("derivative", ["gradient", "hessian", "func.grad"])
@pytest.mark.parametrize(
    ("body", "name"),
    [(a_global_variable, "H"), (an_attribute, "h"), (of_a_bound_method, "h"), (of_a_callable_object, "h")],
)
def test_another_value_that_others_would_see_is_refused(
    body: Any, name: str, derivative: str, x: Tensor, w: Tensor
) -> None:
    with pytest.raises(
        RuntimeError, match=f"checkpointed: .* but {name}, a global .* something else now; pass it"
    ):
        DERIVATIVES[derivative](lambda x: body(checkpointed, w, x), x)


def test_a_module_in_another_mode_is_refused(x: Tensor) -> None:
    layer = nn.Dropout(0.5)
    y = checkpointed(layer, x.requires_grad_()).sum()
    layer.eval()
    with pytest.raises(RuntimeError, match="training, a global variable or an attribute"):
        y.backward()


def test_a_tensor_written_in_place_is_refused_where_nobody_saves_it(x: Tensor, w: Tensor) -> None:
    """By the sum and the product nothing of h is saved, and all gradients would be wrong."""

    def f(x: Tensor) -> Tensor:
        h = x * 1
        y = checkpointed(lambda: torch.tanh(h * w + x))
        h.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="h, which it uses, has been written in place since"):
        gradient(f, x)


@pytest.mark.parametrize("checkpoint", [plainly, checkpointed])
def test_unless_it_is_used_after_all_that_the_backward_pass_needs(
    checkpoint: Checkpoint, x: Tensor, w: Tensor
) -> None:
    """As by an eager update: the gradient by w is final before the sine is pulled back."""
    w.requires_grad_()
    with eager_update(lambda p, g: p.sub_(g), [w]):
        found = gradient(lambda: (checkpoint(lambda: x.sin() + w) ** 2).sum(), Params([w, x]))
    before = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(found[x], 2 * (x.sin() + before) * x.cos())
    torch.testing.assert_close(w.detach(), before - 2 * (x.sin() + before))


def test_inside_torch_func_another_tensor_is_refused_wherever_it_comes_from(x: Tensor, w: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        state = {"deep": {"down": x * 1}}
        for _ in range(2):
            state["deep"]["down"] = checkpointed(lambda: torch.tanh(state["deep"]["down"] * w))
        return state["deep"]["down"].sum()

    with pytest.raises(RuntimeError, match="it used another tensor; pass it as an argument"):
        grad(f)(x)


# ---- what doesn't matter -----------------------------------------------------------------------------------


def test_what_f_itself_changes_is_left_alone(x: Tensor) -> None:
    """Counters, logs and running means go on, in the rerun too; derivatives don't depend on them."""
    count = 0
    log: list[Tensor] = []
    mean = torch.zeros(4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        log.append(x.detach())
        mean.mul_(0.9).add_(x.detach(), alpha=0.1)
        return x.sin() * x

    for _ in range(2):
        found = gradient(lambda x: checkpointed(f, checkpointed(f, x)).sum(), x)[0]
        torch.testing.assert_close(
            found, gradient(lambda x: (x.sin() * x).sin().mul(x.sin() * x).sum(), x)[0]
        )
    assert (count, len(log)) == (8, 8)


def test_other_attributes_and_entries_may_change(x: Tensor, w: Tensor) -> None:
    cell = Cell(w)
    state = [w, w]

    def f(x: Tensor) -> Tensor:
        y = checkpointed(lambda x: torch.tanh(x * cell.h * state[0]), x)
        cell.other = y
        state[1] = y
        return y.sum()

    torch.testing.assert_close(gradient(f, x)[0], w**2 / torch.cosh(x * w**2) ** 2)


def test_what_was_closed_over_is_not_kept_for_ever(x: Tensor, w: Tensor) -> None:
    """Without a backward pass too, and without the garbage collector."""
    w.requires_grad_()
    refs: list[weakref.ref[Tensor]] = []

    def run() -> None:
        for _ in range(2):
            h = x * w
            y = checkpointed(lambda: torch.tanh(h * w))
            refs.extend([weakref.ref(h), weakref.ref(y)])

    was_collecting = gc.isenabled()
    gc.disable()
    try:
        run()
        assert not any(ref() is not None for ref in refs)
    finally:
        if was_collecting:
            gc.enable()


def test_derivatives_inside_run_f_again_before_it_has_returned(x: Tensor) -> None:
    scale = 2.0

    def f(x: Tensor) -> Tensor:
        return gradient(lambda y: (y**3 * scale).sum(), x, create_graph=True)[0]

    torch.testing.assert_close(gradient(lambda x: checkpointed(f, x).sum(), x)[0], 12 * x)


# ---- checkpoints in checkpoints ----------------------------------------------------------------------------

CUBED = [
    # by a variable that requires grad for as long as the inner derivative takes, and not when f ran first
    lambda z, p: gradient(lambda: (z * z * p**3).sum(), Params([z]))[z],
    lambda z, p: gradient(lambda: (z * z * p**3).sum(), Params([z, p]))[z],
    lambda z, p: jacobian(lambda: (z * z * p**3).sum(), Params([z]))[z][0],
    lambda z, p: gradient(lambda z: (z * z * p**3).sum(), z)[0],
]


@pytest.mark.parametrize("inner", CUBED)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_derivatives_by_arguments_of_inner_checkpoints(inner: Any, depth: int, x: Tensor, w: Tensor) -> None:
    def f(z: Tensor, p: Tensor, depth: int = depth) -> Tensor:
        if depth == 0:
            return inner(z, p)  # type: ignore[no-any-return]
        return checkpointed(lambda z: f(z, p, depth - 1), z)

    explicitly = gradient(lambda p: f(x, p).sum(), w)[0]
    torch.testing.assert_close(explicitly, 6 * x * w**2)
    torch.testing.assert_close(gradient(lambda: f(x, w).sum(), Params([w]))[w], 6 * x * w**2)
    torch.testing.assert_close(gradient(lambda x: f(x, w).sum(), x)[0], 2 * w**3)
    H = hessian(lambda p: f(x, p).sum(), w)
    torch.testing.assert_close(H, torch.diag(12 * x * w))
    y, back = pullback(lambda: f(x, w).sum(), Params([w]))
    torch.testing.assert_close(back(torch.ones_like(y))[w], 6 * x * w**2)
    assert not (x.requires_grad or w.requires_grad)  # noqa: PT018


@pytest.mark.parametrize("transform", ["vmap", "jacfwd"])
def test_transforms_in_inner_checkpoints(transform: str, x: Tensor) -> None:
    """What closes over an argument there is given it as another tensor when it runs again."""

    def body(z: Tensor) -> Tensor:
        if transform == "vmap":
            twice = torch.func.vmap(lambda s: checkpointed(lambda: z.sin()))(torch.ones(2))
            return twice.sum(0)  # type: ignore[no-any-return]
        return torch.func.jacfwd(lambda y: checkpointed(lambda q: q * q * z, y))(z).sum(0)  # type: ignore[no-any-return]

    f = lambda x: checkpointed(lambda w: checkpointed(body, w), x)
    first = 2 * x.cos() if transform == "vmap" else 4 * x
    torch.testing.assert_close(gradient(lambda x: f(x).sum(), x)[0], first)
    second = -2 * x.sin() if transform == "vmap" else torch.full_like(x, 4)
    torch.testing.assert_close(hessian(lambda x: f(x).sum(), x), torch.diag(second))
