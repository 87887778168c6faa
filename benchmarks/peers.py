"""Peers that don't come with PyTorch; ``make bench-peers`` installs them, and without them their rows say so.

BackPACK and curvlinops lie in a folder of their own (``.peers``) beside the project's torch; JAX and asdex in
an environment of their own (``.venv-jax``), run as another process that speaks JSON.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
from typing import Any

import torch

from ._harness import ROOT

TORCH_PEERS = ROOT / ".peers"
JAX_PYTHON = ROOT / ".venv-jax" / "bin" / "python"


def torch_peer(name: str) -> Any | None:
    """The module ``name`` (``backpack``, ``curvlinops``), or ``None`` where it isn't installed."""
    if TORCH_PEERS.is_dir() and str(TORCH_PEERS) not in sys.path:
        sys.path.append(str(TORCH_PEERS))
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _Server:
    """The process with JAX in it."""

    def __init__(self) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("PYTHONPATH", None)
        if torch.get_num_threads() == 1:  # the same number of threads for both sides
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        self.process = subprocess.Popen(
            [str(JAX_PYTHON), str(ROOT / "benchmarks" / "jax_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.version = self._read()["jax"]
        atexit.register(self.close)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the JAX process ended with exit code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"JAX: {reply['error']}")
        return reply

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=10)


@functools.cache
def _server() -> _Server:
    return _Server()


class JaxContender:
    """A work of :mod:`benchmarks.jax_server`, compiled and warm, that times itself in its own process.

    ``first_s``: how long preparing it took, tracing and compiling included.
    """

    def __init__(self, work: str, **arguments: Any) -> None:
        reply = _server().ask(prepare=work, arguments=arguments)
        self._id = reply["id"]
        self.first_s: float = reply["first_s"]

    def time(self, loops: int) -> float:
        """Seconds that ``loops`` calls take."""
        return float(_server().ask(time=self._id, loops=loops)["seconds"])


def jax_contender(work: str, **arguments: Any) -> JaxContender | None:
    """A contender in JAX, or ``None`` where ``make bench-peers`` hasn't been run."""
    return JaxContender(work, **arguments) if JAX_PYTHON.exists() else None
