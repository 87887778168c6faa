"""What the cases on an emulated device have in common: how they are named, and how results are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchzygote import GradDict

__all__ = [
    "CASES",
    "FIRST",
    "SECOND",
    "Case",
    "arrays",
    "assert_same",
    "beside",
    "case",
    "float64_numbers",
    "leaves",
    "places",
]

Case = Callable[[], None]

FIRST, SECOND = "cuda:0", "cuda:1"
# Where the one argument of a case is, and where the other one: device 0 is the current one.
PLACES = (("cpu", FIRST), (FIRST, "cpu"), (FIRST, SECOND), (SECOND, FIRST), (SECOND, SECOND))

# Filled as the modules with cases are imported; each is run in a process that has the devices.
CASES: dict[str, Case] = {}


def case(run: Case) -> Case:
    """One case: it raises where something is wrong."""
    CASES[run.__name__] = run
    return run


def places(run: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """A case at every pair of PLACES, compared with the same on the CPU alone."""

    def everywhere() -> None:
        torch.manual_seed(0)
        expected = run("cpu", "cpu")
        for place in PLACES:
            torch.manual_seed(0)
            try:
                assert_same(run(*place), expected)
            except Exception as error:
                raise AssertionError(f"on {' and '.join(place)}") from error

    everywhere.__name__ = run.__name__
    case(everywhere)
    return run


def leaves(value: Any) -> list[Any]:
    """Tensors, numbers and ``None`` of a result, in order."""
    if isinstance(value, (GradDict, dict)):
        return [x for entry in value.values() for x in leaves(entry)]
    if isinstance(value, (list, tuple)):
        return [x for entry in value for x in leaves(entry)]
    return [value]


def assert_same(found: Any, expected: Any) -> None:
    """Equal results, wherever they are."""
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert one.layout == other.layout
        one, other = (x.to_dense() if x.layout != torch.strided else x for x in (one, other))
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-10, atol=1e-10)


def beside(derivatives: Any, *args: Tensor) -> Any:
    """The derivatives, each of which is on the device of what it is by."""
    for derivative, x in zip(derivatives, args, strict=True):
        assert derivative.device == x.device
    return derivatives


def arrays(a: str, b: str) -> tuple[Tensor, Tensor]:
    """Two vectors of six elements, on two devices."""
    steps = torch.linspace(0.5, 1.7, 6, dtype=torch.float64)
    return steps.to(a), steps.cos().add(0.9).to(b)


@contextlib.contextmanager
def float64_numbers() -> Iterator[None]:
    """Numbers become float64, as on the CPU, in which they are compared."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
