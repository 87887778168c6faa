"""A recorded program run again, on index sets instead of numbers.

Knows which operators matter for the result; what each does to sets is the rules' business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._sets import ID, IndexSets, OverBudget
from ._shadow import Shadow
from ._trace import Const, Op, Program, Ref
from .rules import RULES, Call, Context, Dep, active_couplings
from .rules._table import CURVED, LINEAR, PRODUCT

__all__ = ["Replay"]

logger = logging.getLogger("torchzygote")
_named: set[str] = set()


class Replay:
    """Index sets of a program's values.

    Parameters
    ----------
    program : Program
        What was recorded.
    inputs : sequence of Ref
        Their elements are the indices, counted on from one input to the next.
    budget : int
        How many members and couplings may be stored.
    second : bool
        Collect couplings, and sets only as far as these need them.
    """

    def __init__(self, program: Program, inputs: Sequence[Ref], budget: int, second: bool) -> None:
        self.program = program
        self.bounds = [0]
        for ref in inputs:
            self.bounds.append(self.bounds[-1] + _numel(ref))
        self.sets = IndexSets(self.bounds[-1], budget, nested=second)
        self.context = Context(self.sets, second)
        self.unknown: dict[str, None] = {}
        self._shadows: dict[int, Shadow] = {}
        for ref, start in zip(inputs, self.bounds, strict=False):
            ids = torch.arange(start + 1, start + 1 + _numel(ref), dtype=ID, device="cpu").view(ref.size)
            shadow = self._shadow(ref)
            shadow.write(ref, self.sets.unite(shadow.read(ref), ids))

    def run(self, output: Ref) -> Tensor:
        """Run what matters for ``output``; its ids (not to be used when couplings were collected)."""
        for op, wanted in self._relevant(output):
            self.context.wanted = wanted
            self._step(op)
        return self._shadow(output).read(output)

    def _relevant(self, output: Ref) -> list[tuple[Op, bool]]:
        """Operators that matter, in order; whether the sets of their results do.

        What doesn't reach the output doesn't matter. For couplings, neither does what is linear all the way
        from there on: summing a million terms needs no set of a million members.
        """
        second = self.context.second
        live = {output.place.index}
        needed = set() if second else {output.place.index}
        found: list[tuple[Op, bool]] = []
        for op in reversed(self.program.ops):
            results = {ref.place.index for ref in (*op.outs, *op.written) if isinstance(ref, Ref)}
            if live.isdisjoint(results):
                continue
            operands = {ref.place.index for ref in _refs((op.args, tuple(op.kwargs.values())))}
            live |= operands
            wanted = not needed.isdisjoint(results)
            if wanted or (second and _is_curved(op)):
                needed |= operands
                found.append((op, wanted))
        found.reverse()
        return found

    def _shadow(self, ref: Ref) -> Shadow:
        shadow = self._shadows.get(ref.place.index)
        if shadow is None:
            shadow = self._shadows[ref.place.index] = Shadow(ref.place, self.sets.unite)
        return shadow

    def _step(self, op: Op) -> None:
        args = {name: self._load(value) for name, value in _bound(op).items()}
        shapes = [_shape(out) for out in op.outs]
        call = Call(op.about.name, args, op.outs, shapes, op.extra)
        results = self._apply(op, call)
        covered = set()
        for position, target in enumerate(op.outs):
            if isinstance(target, Ref):
                covered.add(target.place.index)
                if self.context.wanted:
                    ids = results[position] if position < len(results) else None
                    self._shadow(target).write(target, self.context.everything(call) if ids is None else ids)
        for target in op.written:
            if target.place.index not in covered and self.context.wanted:
                self._shadow(target).write(target, self.context.everything(call))

    def _apply(self, op: Op, call: Call) -> list[Any]:
        rule = RULES.get(op.about.name)
        if rule is not None and _intact((op.args, tuple(op.kwargs.values()))):
            try:
                found = rule.handler(self.context, call)
                found = list(found) if isinstance(found, (list, tuple)) else [found]
                _check_shapes(op, found)
                return found
            except OverBudget:
                raise
            except Exception as error:
                logger.debug("sparsity: the rule for %s failed: %r", op.about.full_name, error)
        self._unknown(op.about.full_name)
        self.context.couple(self.context.everything(call))
        return [None] * len(op.outs)

    def _unknown(self, name: str) -> None:
        self.unknown[name] = None
        if name not in _named:
            _named.add(name)
            logger.debug("sparsity: %s has no rule here; its results depend on all its arguments", name)

    def _load(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return Dep(self._shadow(value).read(value), value.dtype)
        if isinstance(value, list):
            return [self._load(part) for part in value]
        return value


def _numel(ref: Ref) -> int:
    return torch.Size(ref.size).numel()


def _shape(out: Any) -> Any:
    if isinstance(out, Ref):
        return out.size
    return tuple(out.tensor.shape) if isinstance(out, Const) else None


def _bound(op: Op) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    bound = dict(op.about.parameters)
    bound.update(zip(bound, op.args, strict=False))
    bound.update(op.kwargs)
    return bound


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (list, tuple)):
        return [ref for part in value for ref in _refs(part)]
    return []


def _intact(value: Any) -> bool:
    """Whether no constant has been overwritten since it was used."""
    if isinstance(value, Ref):
        return True
    if isinstance(value, (list, tuple)):
        return all(_intact(part) for part in value)
    return not isinstance(value, Const) or value.intact


def _is_curved(op: Op) -> bool:
    """Whether an operator has second derivatives by its dependent arguments."""
    rule = RULES.get(op.about.name)
    if rule is None or rule.curvature == CURVED:
        return True
    if rule.curvature == LINEAR:
        return False
    if rule.curvature == PRODUCT:
        return len(_refs((op.args, tuple(op.kwargs.values())))) > 1
    return bool(active_couplings(op.about.name, list(_bound(op).values())))


def _check_shapes(op: Op, found: list[Any]) -> None:
    """A rule's result must broadcast to the tensor it stands for: otherwise the rule is wrong."""
    for target, ids in zip(op.outs, found, strict=False):
        if isinstance(target, Ref) and ids is not None:
            ids.expand(target.size)
