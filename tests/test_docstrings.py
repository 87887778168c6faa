"""Sections of public docstrings: what is taken, what is returned, what is raised, and an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import torchzygote
from torchzygote.eager import EagerUpdate

# Named tuples and a warning: nobody calls them.
RESULTS = {"WithGradient", "WithHessian", "WithJacobian", "DroppedGradientWarning"}
# Made by a function or a method, which says what it takes.
MADE_ELSEWHERE = {"HessianPlan", "JacobianPlan", "EagerUpdate"}
# Those of every mapping of Python's, with its docstrings.
OF_MAPPINGS = {"items", "values"}
NOTHING_TO_RAISE = {"isderiving"}
# "Parameters, result and errors are those of :func:`hessian`": what is said there holds.
REFERS = re.compile(r"\b[Pp]arameters(,? (?P<result>result))? and errors are those of :func:`\w+`")

NAMES = sorted(torchzygote.__all__)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(torchzygote, name))]
CLASSES = {
    **{name: getattr(torchzygote, name) for name in NAMES if inspect.isclass(getattr(torchzygote, name))},
    "EagerUpdate": EagerUpdate,
}


def methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods and ``__call__``, also those of bases that are of this package."""
    for name, kind in CLASSES.items():
        found: dict[str, Any] = {}
        for base in reversed(kind.__mro__):
            if base.__module__.split(".")[0] == "torchzygote":
                found.update(vars(base))
        for attribute, value in found.items():
            method = getattr(value, "__func__", value)
            if attribute.startswith("_") and attribute != "__call__":
                continue
            if inspect.isfunction(method) and not (
                issubclass(kind, torchzygote.GradDict) and attribute in OF_MAPPINGS
            ):
                yield f"{name}.{attribute}", method


METHODS = dict(methods())
CALLABLES = {**{name: getattr(torchzygote, name) for name in FUNCTIONS}, **METHODS}


def sections(documented: Any) -> dict[str, str]:
    """The text of each section by its title; what comes before them by an empty one."""
    text = inspect.cleandoc(documented.__doc__ or "")
    parts = re.split(r"^([A-Z]\w+)\n-{3,}$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def taken(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def lacking(function: Callable[..., Any]) -> list[str]:
    """What the docstring of ``function`` should say and doesn't."""
    found = sections(function)
    refers = REFERS.search(" ".join(found[""].split()))
    missing = []
    if taken(function) and not refers:
        # the lines that aren't indented name them
        described = " ".join(re.findall(r"^\S.*$", found.get("Parameters", ""), re.MULTILINE))
        missing += [
            f"parameter {name}" for name in taken(function) if not re.search(rf"\b{name}\b", described)
        ]
    returns = inspect.signature(function).return_annotation
    if returns not in (None, "None") and not (refers and refers["result"]) and "Returns" not in found:
        missing.append("Returns")
    if ">>>" not in found.get("Examples", ""):
        missing.append("Examples")
    return missing


@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_says_what_it_takes_and_returns_with_an_example(name: str) -> None:
    assert not lacking(CALLABLES[name])


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - NOTHING_TO_RAISE))
def test_a_function_says_what_it_raises(name: str) -> None:
    found = sections(CALLABLES[name])
    assert "Raises" in found or REFERS.search(" ".join(found[""].split()))


@pytest.mark.parametrize("name", sorted(set(CLASSES) - RESULTS))
def test_a_class_says_what_it_is_made_of_with_an_example(name: str) -> None:
    found = sections(CLASSES[name])
    assert ">>>" in found.get("Examples", "")
    if name not in MADE_ELSEWHERE:
        for parameter in taken(CLASSES[name].__init__):
            assert re.search(rf"\b{parameter}\b", found.get("Parameters", "")), parameter


def test_exemptions_are_needed() -> None:
    assert set(CLASSES) >= RESULTS | MADE_ELSEWHERE
    assert set(FUNCTIONS) >= NOTHING_TO_RAISE
    assert all(getattr(torchzygote.GradDict, name).__doc__ is None for name in OF_MAPPINGS)


def test_what_is_lacking_is_found() -> None:
    def f(x: int, y: int) -> int:
        """Something.

        Parameters
        ----------
        x : int
            A number.
        """
        return x + y

    assert lacking(f) == ["parameter y", "Returns", "Examples"]
    assert not lacking(torchzygote.hessian_dual)
