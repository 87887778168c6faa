"""JAX and asdex in an environment of their own: times one of WORKS on request, in JSON, line by line.

Run by :mod:`benchmarks.peers` as ``.venv-jax/bin/python benchmarks/jax_server.py``; imports nothing of the
project, and nothing of the project imports it. Requests and answers:

    {"prepare": "ode_jacobian", "arguments": {"n": 10}}  ->  {"id": 0, "first_s": 0.31}
    {"time": 0, "loops": 100}                            ->  {"seconds": 0.0021}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Work = Callable[[], Any]


def normal(*shape: int) -> jax.Array:
    """Standard normal values, always the same."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype=jnp.float32)


def jitted(f: Callable[..., Any], *args: Any) -> Work:
    """``f`` compiled, run once, and waited for."""
    compiled = jax.jit(f)
    jax.block_until_ready(compiled(*args))
    return lambda: jax.block_until_ready(compiled(*args))


def ode(x: jax.Array) -> jax.Array:
    """The right-hand side of benchmarks.first_order.ode."""
    return jnp.roll(x, 1) * (jnp.roll(x, -1) - jnp.roll(x, 2)) - jnp.sin(x) + 8.0


def rosenbrock(x: jax.Array) -> jax.Array:
    """The chained Rosenbrock function."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def brusselator(u: jax.Array, side: int) -> jax.Array:
    """The 2-D Brusselator on a periodic grid, both species in one flat vector."""
    a, b = u.reshape(2, side, side)
    scale = 0.1 * (side - 1) ** 2

    def laplacian(w: jax.Array) -> jax.Array:
        return jnp.roll(w, 1, 0) + jnp.roll(w, -1, 0) + jnp.roll(w, 1, 1) + jnp.roll(w, -1, 1) - 4 * w

    da = 1.0 + a**2 * b - 4.4 * a + scale * laplacian(a)
    db = 3.4 * a - a**2 * b + scale * laplacian(b)
    return jnp.stack([da, db]).reshape(-1)


def add_one(n: int = 10) -> Work:
    """What a call costs."""
    return jitted(lambda x: x + 1, normal(n))


def gradient_small(n: int = 10) -> Work:
    return jitted(jax.grad(lambda x: jnp.sum(jnp.sin(x) * x)), normal(n))


def ode_jacobian(n: int = 10) -> Work:
    return jitted(jax.jacfwd(ode), normal(n))


def rosenbrock_hessian(n: int = 100) -> Work:
    return jitted(jax.hessian(rosenbrock), normal(n))


def logistic_hessian(samples: int = 2000, n: int = 500) -> Work:
    X, y = normal(samples, n), (normal(samples) < 0).astype(jnp.float32)

    def loss(w: jax.Array) -> jax.Array:
        z = X @ w
        return jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))))

    return jitted(jax.hessian(loss), 0.1 * normal(n))


def sparse_brusselator(side: int = 128) -> Work:
    """The Jacobian with detection and coloring done: warm evaluation."""
    import asdex

    u = normal(2 * side * side)
    f = lambda u: brusselator(u, side)
    return jitted(asdex.jacobian_from_coloring(f, asdex.jacobian_coloring(f, u)), u)


def sparse_brusselator_coloring(side: int = 128) -> Work:
    """Detection and coloring."""
    import asdex

    u = normal(2 * side * side)
    return lambda: asdex.jacobian_coloring(lambda u: brusselator(u, side), u)


def sparse_rosenbrock(n: int = 100_000) -> Work:
    """The Hessian with detection and coloring done: warm evaluation."""
    import asdex

    x = normal(n)
    return jitted(asdex.hessian_from_coloring(rosenbrock, asdex.hessian_coloring(rosenbrock, x)), x)


def sparse_rosenbrock_coloring(n: int = 100_000) -> Work:
    """Detection and coloring."""
    import asdex

    x = normal(n)
    return lambda: asdex.hessian_coloring(lambda x: rosenbrock(x), x)


WORKS: dict[str, Callable[..., Work]] = {
    work.__name__: work
    for work in (
        add_one,
        gradient_small,
        ode_jacobian,
        rosenbrock_hessian,
        logistic_hessian,
        sparse_brusselator,
        sparse_brusselator_coloring,
        sparse_rosenbrock,
        sparse_rosenbrock_coloring,
    )
}


def answer(request: dict[str, Any], prepared: list[Work]) -> dict[str, Any]:
    """One request served."""
    if "prepare" in request:
        start = time.perf_counter()
        prepared.append(WORKS[request["prepare"]](**request.get("arguments", {})))
        return {"id": len(prepared) - 1, "first_s": time.perf_counter() - start}
    run = prepared[request["time"]]
    start = time.perf_counter()
    for _ in range(request["loops"]):
        run()
    return {"seconds": time.perf_counter() - start}


def serve() -> None:
    """Until the input ends."""
    prepared: list[Work] = []
    print(json.dumps({"jax": jax.__version__}), flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), prepared)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
