"""Group norm of channels-last images, whose backward by the bias alone ends the process (PyTorch 2.13).

In a process of its own where that happened; the oracle is the formula.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import diaghessian, gradient, hessian, hessian_dual, pullback, pushforward

D = torch.float64
W, B = torch.tensor([0.5, -1.5, 2.0, 1.0], dtype=D), torch.tensor([0.1, 0.2, -0.3, 0.7], dtype=D)
LAYOUTS = {
    "2d": torch.linspace(-1, 1, 72, dtype=D)
    .exp()
    .sin()
    .view(2, 4, 3, 3)
    .to(memory_format=torch.channels_last),
    "3d": torch.linspace(-1, 1, 64, dtype=D)
    .exp()
    .sin()
    .view(2, 4, 2, 2, 2)
    .to(memory_format=torch.channels_last_3d),
}
LAYOUTS["a crop"] = torch.cat([LAYOUTS["2d"]] * 2, 2).to(memory_format=torch.channels_last)[:, :, ::2]
LAYOUTS["channels of more"] = torch.cat([LAYOUTS["2d"]] * 2, 1).to(memory_format=torch.channels_last)[:, :4]


def by_formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    groups = x.reshape(2, 2, -1)
    centered = groups - groups.mean(2, keepdim=True)
    y = centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
    shape = (1, 4) + (1,) * (x.dim() - 2)
    return y.reshape(x.shape) * w.view(shape) + b.view(shape)


def by_operator(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x, 2, w, b)


Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss(norm: Norm, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda b: norm(x, W * b.sum(), b).pow(3).sum()


WAYS: dict[str, Callable[[Norm, Tensor], Tensor]] = {
    "hessian": lambda n, x: hessian(loss(n, x), B),
    "hessian_dual": lambda n, x: hessian_dual(loss(n, x), B),
    "diaghessian": lambda n, x: diaghessian(loss(n, x), B)[0],
    "by the weight": lambda n, x: diaghessian(lambda w: n(x, w, B).pow(3).sum(), W)[0],
    "by the input": lambda n, x: hessian(lambda x: n(x, W, B).pow(3).sum(), x),
    "gradient of one entry": lambda n, x: gradient(lambda b: gradient(loss(n, x), b)[0][1], B)[0],
    "pullback of a gradient": lambda n, x: pullback(lambda b: gradient(loss(n, x), b)[0], B)[1](W)[0],
    "pushforward": lambda n, x: pushforward(lambda b: n(x, W, b), B)(W),
    "third": lambda n, x: gradient(lambda b: hessian(loss(n, x), b).sin().sum(), B)[0],
}


def differ(way: str, layout: str) -> None:
    found, expected = (WAYS[way](norm, LAYOUTS[layout]) for norm in (by_operator, by_formula))
    torch.testing.assert_close(found, expected)
    assert found.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_channels_last_images_in_a_process_of_their_own(layout: str) -> None:
    command = [sys.executable, __file__, layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_its_result_has_the_layout_that_it_has_elsewhere() -> None:
    x = LAYOUTS["2d"]

    def f(b: Tensor) -> Tensor:
        y = F.group_norm(x, 2, W, b)
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y.permute(0, 2, 3, 1).view(-1).pow(2).sum()

    assert F.group_norm(x, 2, W, B).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(hessian(f, B), 36 * torch.eye(4, dtype=D))


def test_first_derivatives_copy_nothing_and_the_operator_is_back_afterwards() -> None:
    before, seen = torch.group_norm, []

    def f(x: Tensor) -> Tensor:
        seen.append(torch.group_norm)
        return by_operator(x, W, B).pow(3).sum()

    gradient(f, LAYOUTS["2d"])
    assert seen == [before]
    hessian(f, LAYOUTS["2d"])
    assert seen[1] is not before
    assert torch.group_norm is before


if __name__ == "__main__":
    warnings.simplefilter("error")  # of rows that can't be batched
    for each in WAYS:
        differ(each, sys.argv[1])


def test_not_contiguous_under_vmap() -> None:
    """Where no other layout can be asked for."""
    images = torch.linspace(-1, 1, 3 * 72, dtype=D).exp().sin().view(3, 2, 4, 3, 3).transpose(-1, -2)
    found = torch.vmap(lambda x: hessian(loss(by_operator, x), B))(images)
    torch.testing.assert_close(found[1], hessian(loss(by_formula, images[1]), B))
