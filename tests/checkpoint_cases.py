"""Ways to differentiate through a checkpointed function, and the call that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import grad, jacrev

from torchzygote import gradient, hessian, jacobian

Checkpoint = Callable[..., Any]


def plainly(f: Callable[..., Any], *xs: Any, **kwargs: Any) -> Any:
    """The same without a checkpoint."""
    return f(*xs, **kwargs)


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "gradient": lambda f, x: gradient(lambda x: f(x).sum(), x)[0],
    "jacobian": lambda f, x: jacobian(f, x, mode="reverse", chunk_size=3)[0],
    "jacobian, row by row": lambda f, x: jacobian(f, x, mode="reverse", chunk_size=1)[0],
    "hessian": lambda f, x: hessian(lambda x: f(x).sum(), x),
    "func.grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "func.jacrev": lambda f, x: jacrev(f)(x),
    "func.jacrev twice": lambda f, x: jacrev(jacrev(f))(x),
}


def ways(*names: str) -> dict[str, Callable[[Any, Tensor], Any]]:
    """Some of them."""
    return {name: WAYS[name] for name in names}
