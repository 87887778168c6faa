"""Dataclasses that are registered with PyTorch's pytrees: ``None`` in a field is zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchzygote import gradient, pullback, pushforward

t = torch.tensor


@dataclasses.dataclass
class Pair:
    a: Any
    b: Any


@dataclasses.dataclass
class Other:
    a: Any
    b: Any


class Plain:
    """Registered with its fields, and no dataclass."""

    def __init__(self, a: Any, b: Any) -> None:
        self.a = a
        self.b = b


@dataclasses.dataclass
class Named:
    """With a field that isn't part of the structure."""

    a: Any
    b: Any
    name: str = ""


pytree.register_dataclass(Pair)
pytree.register_dataclass(Other)
pytree.register_dataclass(Plain, field_names=["a", "b"])
pytree.register_dataclass(Named, field_names=["a", "b"], drop_field_names=["name"])


@pytest.mark.parametrize("kind", [Pair, Plain, Named])
def test_a_gradient_is_a_tangent(kind: type[Any]) -> None:
    s = kind(t([1.0, 2.0]), t([3.0, 4.0]))

    def first(s: Any) -> Tensor:
        return (s.a**2).sum()

    (g,) = gradient(first, s)
    assert g.b is None
    assert pushforward(first, s)(g).item() == 20
    assert pushforward(lambda s: (s.a * s.b).sum(), s)(kind(None, t([1.0, 1.0]))).item() == 3
    assert pushforward(lambda s: (s.a * s.b).sum(), s)(kind(None, None)).item() == 0


@pytest.mark.parametrize("kind", [Pair, Plain, Named])
def test_none_in_a_cotangent(kind: type[Any]) -> None:
    back = pullback(lambda x: kind(x * 2, x**2), 3.0)[1]
    assert back(kind(1, None)) == (t(2.0),)
    assert back(kind(None, 1)) == (t(6.0),)
    assert back(kind(1, 1)) == (t(8.0),)
    assert back(kind(None, None))[0] in (None, t(0.0))


def test_nested() -> None:
    back = pullback(lambda x: {"p": Pair(x, [Pair(2 * x, x**2), x])}, 3.0)[1]
    assert back({"p": Pair(None, [Pair(None, 1), None])}) == (t(6.0),)
    assert back({"p": Pair(1, [None, 1])}) == (t(2.0),)
    assert back({"p": Pair(1, None)}) == (t(1.0),)
    s = Pair((1.0, Pair(2.0, 3.0)), {"c": 4.0})
    push = pushforward(lambda s: s.a[0] * s.a[1].b * s.b["c"], s)
    assert push(Pair((None, Pair(None, 1)), None)).item() == 4
    assert push(Pair(None, {"c": 1})).item() == 3


def test_where_f_returns_none() -> None:
    back = pullback(lambda x: Pair(Pair(x, 2 * x), None), 3.0)[1]
    assert back(Pair(Pair(None, 1), None)) == (t(2.0),)
    with pytest.raises(ValueError, match=r"expected the structure .*b=None.*, got .*b=\*"):
        back(Pair(Pair(1, None), 1))


class Static:
    """Registered by hand, with what looks like the names of fields."""

    def __init__(self, part: Any, names: list[list[str]]) -> None:
        self.part = part
        self.names = names


pytree.register_pytree_node(Static, lambda s: ([s.part], s.names), lambda parts, names: Static(*parts, names))


def test_what_does_not_fit_is_shown() -> None:
    back = pullback(lambda x: Pair(x * 2, Pair(x, x)), 3.0)[1]
    expected = r"expected the structure Pair\(a=\*, b=Pair\(a=\*, b=\*\)\), got "
    for ybar, got in (
        (Other(1, None), r"Other\(a=\*, b=None\)"),
        (Pair(1, Other(None, 1)), r"Pair\(a=\*, b=Other\(a=None, b=\*\)\)"),
        ((1, None), r"\(\*, \*\)"),
    ):
        with pytest.raises(ValueError, match=expected + got):
            back(ybar)
    incomplete = Pair(1, None)
    del incomplete.b
    with pytest.raises(ValueError, match=expected + "Pair"):
        back(incomplete)
    with pytest.raises(ValueError, match=r"push: tangent 0: expected the structure Pair\(a=\*, b=\*\)"):
        pushforward(lambda s: s.a, Pair(1.0, 2.0))(Other(1.0, None))
    back = pullback(lambda x: Static(x, [["names"], []]), 3.0)[1]
    with pytest.raises(ValueError, match="expected the structure"):
        back(Static(1, [["names"], ["part"]]))
