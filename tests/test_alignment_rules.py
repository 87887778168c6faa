"""Rules for axes, on square values, where a mistaken axis doesn't show in the shapes."""

from __future__ import annotations

import math

import pytest
import torch
from alignment_cases import ATTENTION, IMAGES, RULES, D, N, Q, off_axes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded.alignment import aligned_axes


@pytest.mark.parametrize("name", [*ATTENTION, *IMAGES])
def test_axes_of_attention_and_of_images(name: str) -> None:
    f, expected = {**ATTENTION, **IMAGES}[name]
    x = torch.linspace(0, 99, N**4, dtype=D).sin().view(N, N, N, N).requires_grad_()
    y = f(x)
    found = aligned_axes(y, x) or []
    assert set(found) <= set(expected)
    if name in IMAGES or "ScaledDotProduct" in y.grad_fn.name():
        assert found == expected
    for p, q in found:  # moved along one axis of x, y moves there alone
        tangent = torch.zeros_like(x).index_fill_(q, torch.tensor([2]), 1.0) * Q
        moved = (f((x + 1e-6 * tangent).detach()) - y.detach()).abs().movedim(p, 0).flatten(1).amax(1)
        assert (moved > 1e-9).tolist() == [i == 2 for i in range(N)]


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What rules raised: nobody gets to see it, but none should."""
    seen: list[str] = []
    monkeypatch.setattr(_alignment._log, "debug", lambda message, *args: seen.append(message % args))
    return seen


@pytest.mark.parametrize("name", RULES)
def test_axes_hold_and_none_is_missed(name: str, failures: list[str]) -> None:
    f, of_result, of_gradient = RULES[name]
    torch.manual_seed(0)
    x = torch.randn(N, N, dtype=D).requires_grad_()
    y = f(x)
    assert (aligned_axes(y, x) or []) == of_result
    J = torch.autograd.functional.jacobian(f, x)
    for p, q in of_result:
        assert not off_axes(J, p, y.dim() + q).any()
    weights = torch.linspace(1, 2, y.numel(), dtype=D).view(y.shape)
    scalar = lambda x: (f(x).square() * weights).sum() if y.dim() > 0 else f(x)
    (g,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    assert (aligned_axes(g, x) or []) == of_gradient
    H = torch.autograd.functional.hessian(scalar, x)
    for p, q in of_gradient:
        assert not off_axes(H, p, 2 + q).any()
    assert not failures


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[list[int] | int]]:
    """A shape, and what happens to it: a list is a view of these sizes, a number an axis that is mixed."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    steps: list[list[int] | int] = []
    for _ in range(4):
        sizes, left = [], math.prod(shape)
        while len(sizes) < 4 and (left > 1 or not sizes):
            sizes.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
            left //= sizes[-1]
        sizes[-1] *= left
        steps.append(sizes)
        if draw(st.booleans()):
            steps.append(draw(st.integers(0, len(sizes) - 1)))
    return shape, steps


def followed(x: Tensor, steps: list[list[int] | int]) -> Tensor:
    for step in steps:
        x = x.cumsum(step) + x.flip(step) if isinstance(step, int) else x.view(step)
    return x


@settings(deadline=None, max_examples=150)
@given(programs())
def test_axes_survive_views_or_are_given_up(program: tuple[list[int], list[list[int] | int]]) -> None:
    shape, steps = program
    x = torch.randn(shape, dtype=D).requires_grad_()
    y = followed(x, steps)
    J = torch.autograd.functional.jacobian(lambda x: followed(x, steps), x)
    for p, q in aligned_axes(y, x) or []:
        assert not off_axes(J, p, y.dim() + q).any()


def test_views_that_mix_nothing_lose_no_axis() -> None:
    x = torch.randn(2, 3, 4, dtype=D).requires_grad_()
    assert aligned_axes(followed(x, [[24], [6, 4], [2, 12], [2, 3, 4]]), x) == [(0, 0), (1, 1), (2, 2)]
    assert aligned_axes(followed(x, [[6, 4], 1, [2, 3, 4]]), x) == [(0, 0), (1, 1)]
    assert aligned_axes(followed(x, [[6, 4], 0, [2, 3, 4]]), x) == [(2, 2)]
