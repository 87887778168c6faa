"""Checkpointing: what changes between the run of a function and its rerun is as it was, or refused."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoint_cases import Checkpoint, plainly, ways
from torch import Tensor, nn
from torch.func import grad

from torchzygote import (
    Params,
    checkpointed,
    eager_update,
    gradient,
    jacobian,
    pullback,
)

Pair = namedtuple("Pair", "h n")

REFUSED = r"written in place since|modified by an inplace operation"


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


DERIVATIVES = ways("gradient", "jacobian", "hessian", "func.grad", "func.jacrev")


# ---- containers that the caller changes --------------------------------------------------------------------


def a_dict(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    state = {"h": x * 1.0}
    for _ in range(3):
        state["h"] = state["h"] + checkpoint(lambda s: torch.tanh(s["h"] * w), state)
    return state["h"]


def a_list_that_grows(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    hs = [x.sin()]
    for _ in range(3):
        hs.append(checkpoint(lambda hs: torch.tanh(hs[-1] * w) + hs[0], hs))
    return hs[-1]


def nested_and_by_keyword(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    state = OrderedDict(pair=[Pair(x.sin(), 2)], more=None)

    def step(a: Tensor, *, state: Any, scale: float) -> Tensor:
        pair = state["pair"][0]
        return torch.exp(pair.h * w / 9) * pair.n * scale * a

    y = checkpoint(step, x, state=state, scale=0.5)
    state["pair"][0] = Pair(w, 3)
    state.clear()
    return y


def an_argument_dropped(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    hs = [x.sin(), x.cos()]
    y = checkpoint(lambda hs: hs[0] ** 2 * hs[1] * w, hs)
    hs.pop()
    return y * hs[0]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("body", [a_dict, a_list_that_grows, nested_and_by_keyword, an_argument_dropped])
def test_containers_are_as_they_were(body: Any, derivative: str, x: Tensor, w: Tensor) -> None:
    expected = DERIVATIVES[derivative](lambda x: body(plainly, w, x), x)
    found = DERIVATIVES[derivative](lambda x: body(checkpointed, w, x), x)
    torch.testing.assert_close(found, expected)


def test_f_gets_the_containers_of_the_caller_once(x: Tensor) -> None:
    """What f writes into them is there after the call, and isn't written again by the backward pass."""
    notes: dict[str, Any] = {"runs": []}

    def f(x: Tensor, notes: dict[str, Any]) -> Tensor:
        notes["y"] = x.sin()
        return notes["y"] * x

    def loss(x: Tensor) -> Tensor:
        y = checkpointed(f, x, notes)
        notes["y"] = None
        return y.sum()

    torch.testing.assert_close(gradient(loss, x)[0], x.cos() * x + x.sin())
    assert notes == {"runs": [], "y": None}


def test_what_a_container_gets_later_is_not_kept_alive_by_itself(x: Tensor, w: Tensor) -> None:
    w.requires_grad_()
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        state = {"h": x * w}
        state["h"] = checkpointed(lambda s: torch.tanh(s["h"] * w), state)
        ref = weakref.ref(state["h"])
        del state
        assert ref() is None
    finally:
        if was_collecting:
            gc.enable()


def test_tensors_of_inference_mode_in_a_container_are_passed_on(x: Tensor) -> None:
    with torch.inference_mode():
        offset = torch.ones(4, dtype=torch.float64)
    f = lambda x: checkpointed(lambda d: (d["x"] + d["offset"]).sin(), {"x": x, "offset": offset}).sum()
    torch.testing.assert_close(gradient(f, x)[0], (x + 1).cos())


# ---- tensors written in place ------------------------------------------------------------------------------


def closed_over(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    h = x * 1
    h += checkpoint(lambda: torch.tanh(h * h * w))
    return h


def behind_a_call(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    block = lambda a: torch.tanh(a * a * w)
    h = x * 1
    h += checkpoint(lambda: block(h))
    return h


def a_keyword(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    h = x * 2
    y = checkpoint(lambda *, d: (d**2).exp(), d=h)
    h += 1
    return y


def in_a_list(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    hs = [x * 2]
    y = checkpoint(lambda hs: (hs[0] ** 2).exp(), hs)
    hs[0] += 1
    return y


def a_constant(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Tensor:
    scale = w * 2
    y = checkpoint(lambda x: torch.tanh(x * scale), x)
    scale.mul_(2)
    return y


@pytest.mark.parametrize("derivative", ["gradient", "hessian", "func.grad"])
@pytest.mark.parametrize("body", [closed_over, behind_a_call, a_keyword, in_a_list, a_constant])
def test_a_tensor_written_in_place_since_is_refused(body: Any, derivative: str, x: Tensor, w: Tensor) -> None:
    """As it is without a checkpoint."""
    for checkpoint in (plainly, checkpointed):
        with pytest.raises(RuntimeError, match=REFUSED):
            DERIVATIVES[derivative](lambda x: body(checkpoint, w, x), x)


@pytest.mark.parametrize("checkpoint", [plainly, checkpointed])
def test_parameters_that_are_stepped_before_the_backward_pass_are_refused(
    checkpoint: Checkpoint, x: Tensor
) -> None:
    layer = nn.Linear(4, 4).double()
    y = checkpoint(layer, x.requires_grad_()).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        y.backward()


def test_the_refusal_says_what_was_written_and_what_to_do(x: Tensor) -> None:
    layer = nn.Linear(4, 4).double()
    y = checkpointed(layer, x.requires_grad_()).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"checkpointed: expected Linear .* shape \(4, 4\).* clone\(\)"):
        y.backward()


@pytest.mark.parametrize("checkpoint", [plainly, checkpointed])
def test_an_eager_update_of_what_is_used_without_its_gradient_is_refused(
    checkpoint: Checkpoint, x: Tensor
) -> None:
    w = torch.tensor(2.0, dtype=torch.float64)

    def loss() -> Tensor:
        h = checkpoint(lambda a: (a * w.detach()).exp(), x)
        return (h * w).sum()

    with eager_update(lambda p, g: p.mul_(10), [w]), pytest.raises(RuntimeError, match=REFUSED):
        gradient(loss, Params([w, x]))


def test_what_saved_tensor_hooks_hand_out_again_need_not_count_its_writes(x: Tensor, w: Tensor) -> None:
    """Copies of the arguments start counting anew."""
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        h = (leaf * 2).add_(w)
        y = checkpointed(lambda h: torch.tanh(h * h * w), h).sum()
    (found,) = torch.autograd.grad(y, leaf)
    torch.testing.assert_close(found, gradient(lambda x: torch.tanh((x * 2 + w) ** 2 * w).sum(), x)[0])


# ---- flags of parameters -----------------------------------------------------------------------------------


def with_torch_func_inside(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Any:
    return checkpoint(lambda a: grad(lambda b: (b**3 * w**2).sum())(a), x)


def without(checkpoint: Checkpoint, w: Tensor, x: Tensor) -> Any:
    return checkpoint(lambda a: torch.tanh(a * w), x)


@pytest.mark.parametrize("way", ["gradient", "create_graph", "hessian", "func.grad"])
@pytest.mark.parametrize("body", [without, with_torch_func_inside])
def test_parameters_need_no_flag_that_outlives_the_call(body: Any, way: str, x: Tensor, w: Tensor) -> None:
    """The call that held their flags is over when what it returned is differentiated."""

    def inner(checkpoint: Checkpoint, x: Tensor, **options: Any) -> Tensor:
        found = gradient(lambda: body(checkpoint, w, x).sum(), Params([w]), **options)
        return found[w].sum()

    def outer(checkpoint: Checkpoint) -> Any:
        if way == "create_graph":
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(inner(checkpoint, leaf, create_graph=True), leaf)[0]
        return DERIVATIVES[way](lambda x: inner(checkpoint, x), x)

    torch.testing.assert_close(outer(checkpointed), outer(plainly))
    assert not w.requires_grad


@pytest.mark.parametrize("product", [lambda a, w: a * w, lambda a, w: w * a])
def test_flags_that_were_switched_in_between_are_refused(product: Any, x: Tensor, w: Tensor) -> None:
    """Other tensors are saved then, it may be as many and of the same shapes."""
    y = checkpointed(lambda a: torch.tanh(product(a, w)), x.requires_grad_()).sum()
    w.requires_grad_()
    with pytest.raises(RuntimeError, match="other tensors require grad now"):
        y.backward()
    y = checkpointed(lambda a: torch.tanh(product(a, w)), x).sum()
    w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="to do the same"):
        y.backward()


# What is saved for `w` may pass for what was saved for `a`: as many, of the same shapes.
ALIKE = {
    "the first operation": lambda a, w: w.sin() + a.sin(),
    "a result": lambda a, w: w.exp() + a.exp(),
    "before the only one": lambda a, w: torch.tanh(a + w.sin()),
    "a function": lambda a, w: nn.functional.softplus(w) + nn.functional.softplus(a),
}


@pytest.mark.parametrize("held", ["switched", "by a call", "a parameter", "by another thread"])
@pytest.mark.parametrize("body", ALIKE.values(), ids=ALIKE)
def test_what_is_saved_for_others_does_not_pass_for_what_was_saved(
    body: Any, held: str, x: Tensor, w: Tensor
) -> None:
    """PyTorch tells saved tensors apart by their order alone, and ends the rerun when it has enough."""
    module = nn.ParameterList([nn.Parameter(w, requires_grad=False)])
    p = module[0] if held == "a parameter" else w
    call = (lambda a: body(a, module[0])) if held == "a parameter" else (lambda a: body(a, w))
    y, back = pullback(lambda x: checkpointed(call, x).sum(), x)
    expected = gradient(lambda x: body(x, w).sum(), x)[0]
    assert torch.equal(back(torch.ones_like(y))[0], expected)
    if held == "by a call":
        with pytest.raises(RuntimeError, match="other tensors require grad now"):
            gradient(lambda: (back(torch.ones_like(y)), p.sum())[1], Params([p]))
    elif held == "by another thread":
        with flags_held_elsewhere(p), pytest.raises(RuntimeError, match="other tensors require grad now"):
            back(torch.ones_like(y))
    else:
        p.requires_grad_(True)
        with pytest.raises(RuntimeError, match="other tensors require grad now"):
            back(torch.ones_like(y))
        p.requires_grad_(False)
    assert torch.equal(back(torch.ones_like(y))[0], expected)


def test_another_shape_in_the_rerun_is_named(x: Tensor) -> None:
    """Also where the rerun records more operations, and so goes on to its end."""
    runs = []

    def impure(a: Tensor) -> Tensor:
        runs.append(1)
        return torch.tanh(a[:3] if len(runs) > 1 else a)

    with pytest.raises(RuntimeError, match=r"of shape \(4,\) .* came as one of shape \(3,\)"):
        gradient(lambda x: checkpointed(impure, x).sum(), x)


@contextlib.contextmanager
def flags_held_elsewhere(p: Tensor) -> Iterator[None]:
    """Another thread is in the middle of a derivative by ``p``."""
    inside, over = threading.Event(), threading.Event()

    def loss() -> Tensor:
        inside.set()
        over.wait(30)
        return p.sum()

    thread = threading.Thread(target=lambda: gradient(loss, Params([p])))
    thread.start()
    try:
        assert inside.wait(30)
        yield
    finally:
        over.set()
        thread.join()


def test_casts_that_were_cached_in_the_first_run(x: Tensor) -> None:
    """The rerun records them itself, which counts as nothing: it saves the same tensors."""
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x.float())
        y = checkpointed(lambda a: layer(a).tanh() * 2, x.float().requires_grad_()).sum()
        expected = (layer(x.float()).tanh() * 2).sum()
    found = torch.autograd.grad(y, list(layer.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected, list(layer.parameters())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("way", ["gradient", "jacobian", "hessian"])
def test_a_jacobian_inside_in_chunks(mode: Any, way: str, x: Tensor) -> None:
    """Identity rows move through the same memory from chunk to chunk."""

    def f(checkpoint: Checkpoint, x: Tensor) -> Tensor:
        inner = lambda x: (jacobian(torch.sin, x, chunk_size=2, mode=mode)[0] ** 2).sum()
        return checkpoint(inner, x)  # type: ignore[no-any-return]

    found = DERIVATIVES[way](lambda x: f(checkpointed, x), x)
    torch.testing.assert_close(found, DERIVATIVES[way](lambda x: x.cos().square().sum(), x))


def test_a_pullback_by_parameters_of_a_run_without_them_is_refused(x: Tensor, w: Tensor) -> None:
    _, back = pullback(lambda x: checkpointed(lambda a: torch.tanh(a * w), x), x)
    with pytest.raises(RuntimeError, match="other tensors require grad now"):
        gradient(lambda: back(w)[0].sum(), Params([w]))


# ---- modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [without, with_torch_func_inside])
def test_a_backward_pass_in_inference_mode(body: Any, x: Tensor, w: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    y = body(checkpointed, w, leaf).sum()
    with torch.inference_mode():
        y.backward()
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(leaf.grad, gradient(lambda x: body(plainly, w, x).sum(), x)[0])


@pytest.mark.parametrize("derivative", ["gradient", "func.grad"])
def test_the_default_dtype_is_as_it_was(derivative: str, x: Tensor) -> None:
    seen: list[torch.dtype] = []

    def f(x: Tensor) -> Tensor:
        seen.append(torch.ones(1).dtype)
        return torch.tanh(x * torch.full((4,), 2.0)).sum()

    before = torch.get_default_dtype()

    def loss(x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        y = checkpointed(f, x)
        torch.set_default_dtype(torch.float32)
        return y

    try:
        found = DERIVATIVES[derivative](loss, x)
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, 2 / torch.cosh(2 * x) ** 2)
    assert seen == [torch.float64] * 2


# ---- names -------------------------------------------------------------------------------------------------


def test_keywords_of_any_name_are_passed_on() -> None:
    assert checkpointed(lambda f, a: f * a, f=2, a=3) == 6
    assert checkpointed(lambda f, xs, kwargs: f * xs * kwargs, f=2, xs=3, kwargs=4) == 24


def test_an_error_that_somebody_keeps_leaves_no_hooks_in_force() -> None:
    kept: list[Exception] = []

    def f(x: Tensor) -> Tensor:
        raise KeyError("inside")

    for wanted in (True, False):
        try:
            checkpointed(f, torch.ones(3, requires_grad=wanted))
        except KeyError as error:
            kept.append(error)
    assert len(kept) == 2
    torch.func.grad(torch.sum)(torch.ones(3))  # which refuses hooks around it
