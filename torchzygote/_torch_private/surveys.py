"""Walks along the recorded graph, which tell of a backward pass without running it."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .nodes import is_leaf, node_of, source_of
from .telling import AS_IT_IS, AS_MANY, ELEMENTARY, LEAN, ORDINARY, Leaf, Survey, Told, is_right_as_it_is
from .walked import all_such, leading

__all__ = ["NOTHING_TOLD", "are_right_as_they_are", "coarsest", "survey"]

# What is told where there is nothing to tell, and of nodes alone.
NOTHING_TOLD = Told().survey(0, 0)
_NOTHING = NOTHING_TOLD[2:-2]


def survey(
    roots: Sequence[Tensor],
    ends: Collection[Any] = (),
    inputs: Sequence[Tensor] = (),
    number: int | None = None,
) -> Survey:
    """Walk along the graph recorded below ``roots``: 1.5 to 3 microseconds for each operation.

    ``inputs``: of leaves, these alone are given gradients; without any, all are. ``ends``: nodes that a
    backward pass doesn't come to, nor to what is below. ``number``: of the differentiation, if its inputs are
    new; then nothing counts but what leads to ``inputs``.
    """
    if number is not None:
        return _survey_of(_leading(roots, ends, inputs, number))
    # Written out, and not by a generator, which takes a microsecond for each node: small calls wait for this.
    seen: set[Any] = {None, *ends}
    passed = len(seen)
    stack: list[Any] = list(map(node_of, roots))
    wanted = set(map(id, inputs))
    total = alike = 0
    told = None
    products: list[Any] = []
    kinds: set[type] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        onward = node.next_functions
        kind = type(node)
        kinds.add(kind)
        if kind in AS_MANY:
            if onward[0][0] not in seen:  # it comes next, and is asked for both
                alike += 1
                stack.append(onward[0][0])
                continue
        elif kind not in ORDINARY:
            told = told or Told()
            told.look_at(node)
        largest = 0
        for meta in node._input_metadata:
            try:
                numel = int(math.prod(meta.shape))
            except Exception:  # the size of a nested tensor can't be asked
                if not meta.is_nested_tensor:
                    raise
                continue
            total += numel
            if numel > largest:
                largest = numel
        if alike:  # of several outputs, one goes on
            total += alike * largest
            alike = 0
        if wanted and kind in LEAN:
            products.append(node)
            stack.extend(following for following, _ in onward if not _is_unwanted(following, wanted))
        else:
            for following, _ in onward:
                stack.append(following)
    nodes = len(seen) - passed
    elementary = kinds <= ELEMENTARY
    if told:
        return told.survey(total, nodes)._replace(products=products, elementary=elementary)
    return Survey(total, nodes, *_NOTHING, products, elementary)


def are_right_as_they_are(
    roots: Sequence[Tensor], ends: Collection[Any] = (), number: int | None = None
) -> bool:
    """Whether a pullback of ``roots`` that is pulled back again has nothing to watch, put right or refuse.

    What is left then is what a survey says of that, in a third to half of its time. ``ends``, ``number``: as
    for :func:`survey`. ``False`` also for nodes that don't lead to the inputs.
    """
    return all_such(map(node_of, roots), ends, number, AS_IT_IS, is_right_as_it_is)


def _is_unwanted(node: Any, wanted: set[int]) -> bool:
    """Whether below ``node`` there is a leaf alone, as a weight, whose gradient nobody wants."""
    while type(node) in AS_MANY:
        node = node.next_functions[0][0]
    return type(node) is Leaf and id(node.variable) not in wanted


def _survey_of(nodes: Sequence[Any]) -> Survey:
    told = Told()
    for node in nodes:
        if type(node) not in ORDINARY:
            told.look_at(node)
    metas = [meta for node in nodes for meta in node._input_metadata if not meta.is_nested_tensor]
    found = told.survey(sum(int(math.prod(meta.shape)) for meta in metas), len(nodes))
    return found._replace(elementary=ELEMENTARY.issuperset(map(type, nodes)))


def _leading(
    roots: Sequence[Tensor], ends: Collection[Any], inputs: Sequence[Tensor], number: int
) -> list[Any]:
    leaves = {id(x) for x in inputs if is_leaf(x)}
    targets = {source_of(x)[0] for x in inputs if not is_leaf(x)}
    return leading(list(map(node_of, roots)), targets, leaves, ends, number)


def coarsest(
    roots: Sequence[Tensor],
    ends: Collection[Any] = (),
    inputs: Sequence[Tensor] = (),
    number: int | None = None,
) -> float:
    """Relative spacing of the coarsest numbers among the gradients, as after autocast in ``f``.

    ``ends``, ``inputs``, ``number``: as for :func:`survey`.
    """
    dtypes: set[torch.dtype] = set()
    if number is not None:
        for node in _leading(roots, ends, inputs, number):
            dtypes.update(meta.dtype for meta in node._input_metadata)
        return max(map(_spacing, dtypes), default=0.0)
    seen: set[Any] = {None, *ends}
    stack: list[Any] = list(map(node_of, roots))
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            dtypes.update(meta.dtype for meta in node._input_metadata)
            stack.extend(following for following, _ in node.next_functions)
    return max(map(_spacing, dtypes), default=0.0)


@functools.cache
def _spacing(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
