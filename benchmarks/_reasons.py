"""What is slower than its peer, and why: a section of docs/performance.md.

The causes are written here, the figures come from the last run, so that the section stays true when figures
change. A comparison that no cause fits is shown as unexplained. Measures nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ._harness import Row, met

__all__ = ["Cause", "cause_of", "is_yardstick", "overview", "slower", "slower_section"]

# Ratios up to this are called equal: two runs of one program differ by as much.
EQUAL = 1.05


class Cause(NamedTuple):
    """Why rows of a part whose work and peer match are slower."""

    title: str
    why: str
    part: str = ".*"
    work: str = ".*"
    peer: str = ".*"


CAUSES = (
    Cause(
        "What a call of a compiled function costs",
        "Before PyTorch runs what it compiled, it checks guards and passes through Python; JAX passes "
        "through C++ alone. The rows `x + 1` and `guards switched off` measure that by itself. It is a "
        "fixed time for each call, and belongs to PyTorch",
        part="compiled",
        peer="JAX",
    ),
    Cause(
        "Compiled by `torch.func` or by this package",
        "The tracer gets the same derivative with a few more operations: arguments are checked and "
        "flattened, and a matrix is put together",
        part="compiled",
    ),
    Cause(
        "A row for each sample",
        "By hand one writes the function of one sample and its weights, and knows that no sample meets "
        "another; Opacus has rules for modules that it knows. Here the losses of all are one function of any "
        "kind; its layers, and that samples stay apart, are read off the recorded graph, and one more "
        "product checks the rows",
        work="losses of",
        peer="vmap|Opacus",
    ),
    Cause(
        "BackPACK",
        "It takes sequences of layers that it knows, and propagates second derivatives through them in one "
        "pass. `diaghessian` takes any function; it pulls the channels of each linear layer back by "
        "themselves, and one more product to check each layer",
        peer="BackPACK",
    ),
    Cause(
        "Structure by hand",
        "By hand one knows that no point meets another, or which columns share a product. Here that is "
        "found in the function, and the result is checked, by the gradient or against a product with a "
        "random vector",
        work="PINN|plan reused",
        peer="by hand",
    ),
    Cause(
        "Compiled plans",
        "A plan computes one product more than its colors and compares it with the result, which asdex "
        "doesn't, and each call compares guards",
        part="sparse",
        work="compiled",
        peer="asdex",
    ),
    Cause(
        "Detection and coloring",
        "Rules in Python run once for each operation, whatever the size; coloring is native",
        part="sparse",
        work="detection",
    ),
    Cause(
        "Interpreted operations against a compiled program",
        "Each operation of an uncompiled call goes through PyTorch's dispatcher and stores its result; "
        "under `jit` they are fused. Compile the plan for the same effect",
        part="sparse",
        peer="asdex, jit|JAX",
    ),
    Cause(
        "Structure is looked for anew in each call",
        "`sparse=True` detects, colors and checks every time: some milliseconds, which a small matrix "
        "doesn't repay. A plan does it once",
        work=r"sparse=True|^plan_",
    ),
    Cause(
        "A plan for a small matrix",
        "Gathering compressed products into a CSR matrix and checking it costs about a millisecond, which"
        " a small dense matrix doesn't take in the first place",
        work="plan, called|by a plan|plan reused",
    ),
    Cause(
        "Forward mode inside a reverse pass",
        "`forwarddiff` trades time for memory: it pushes every direction forward, where reverse mode "
        "needs a single pass. It is for functions of few inputs that would store much",
        work="forwarddiff",
    ),
    Cause(
        "Checkpoints compute twice",
        "Less memory for a second run of the function: that is what they are for",
        peer="no checkpoint",
    ),
    Cause(
        "Checkpoints that work everywhere",
        "In addition to PyTorch's checkpoint a call looks for what the function closes over, and for "
        "writing in place that would spoil the gradient",
        work="checkpointed",
        peer="torch.utils.checkpoint",
    ),
    Cause(
        "A hook that works everywhere",
        "`Tensor.register_hook` adds to a list. `hook` is a custom function, so that it can be batched, "
        "nested and run in forward mode, where `register_hook` raises",
        work="hook",
    ),
    Cause(
        "Elements of a Buffer",
        "A Python list holds references and knows nothing of elements. A `Buffer` checks index, shape and"
        " dtype of each write, copies what a variable still holds, and keeps a map from element to value "
        "where parts of rows are written",
        part="buffer|sizes",
        work="write|recurrence|table|Buffer",
    ),
    Cause(
        "A general-purpose call against a handful of lines",
        "By hand one knows that every argument is a tensor, sets `requires_grad` on it and reads off the "
        "result. A call here tells numbers, arrays, structures and modules apart, works on twins so that "
        "the caller's tensors stay as they are, and puts the result into the arguments' shape: some tens "
        "of microseconds, whatever the function costs",
        work="gradient|withgradient|pullback|pushforward|training step",
        peer="by hand|plain autograd|torch.func|grad_and_value",
    ),
    Cause(
        "New memory",
        "Both make the same call, and new tensors for what it gives. Which of them waits for pages of the "
        "kernel depends on what else lies on the heap: between 0.95 and 1.4 in runs of one day, and 0.99 to "
        "1.02 where the C library is told to keep its memory, or to map each tensor by itself",
        work=r"^g1 \+ g2",
    ),
    Cause(
        "One push",
        "Pulling back twice takes less time than forward mode as long as functions are small, and stores "
        "what the first pass needs. A call here runs forward and stores nothing; constants have no tangents",
        work="pushforward",
        peer="autograd.functional.jvp",
    ),
    Cause(
        "Mappings of gradients",
        "Keys are compared and a new mapping is made around the same multi-tensor call: a fixed time, "
        "seen while the tensors are small",
        work=r"^g |^g\.|^g1|Grads",
    ),
    Cause(
        "Memory that is there is used",
        "As many rows are computed together as the memory budget allows and the caches hold; a smaller "
        "budget (`set_memory_budget`) or `chunk_size` takes less memory and more time",
        work="^peak memory",
    ),
    Cause(
        "A dense diagonal",
        "The products are the same as the peer's, which keeps all of them where a chunk is kept here: a "
        "tenth of the memory. What a peer pays in time for its memory is page faults, tens of thousands in "
        "a call where some thousands are made here, and depends on the state of the process: the ratio was "
        "between 0.5 and 1 in runs of one day, with the same code; where the C library is told to keep its "
        "memory, it is 0.97",
        part="second_order",
        work="diaghessian, dense",
    ),
    Cause(
        "A tall Jacobian",
        "A call here compares the result with a pullback, and is faster all the same where memory is there "
        "already: between 0.88 and 0.94 in a process of its own, and where this part runs alone",
        work=r"R\^3→R\^10000",
    ),
    Cause(
        "Small or dense matrices",
        "The products are the same as the peer's. Around them, a call here prepares arguments, chooses "
        "the mode, walks the recorded graph for structure and divides the rows into chunks: some tenths "
        "of a millisecond that a small matrix shows, and that buys large ones their bounded memory. A way"
        " that is asked for by name (`mode=`, `hessian_dual`, `hessian_reverse`) is not exchanged for a "
        "cheaper one",
        work="jacobian|hessian|Hessian",
    ),
    Cause(
        "More than a copy",
        "These operators are compared with `copy_` of the same bytes; gathering from scattered places "
        "reads more cache lines than it uses",
        part="native_ops",
    ),
    Cause("Growth above its limit", "Times are given below the table of that part", peer="linear"),
)

UNEXPLAINED = Cause("Unexplained", "No cause is known; noise of this run, or something to look into")


def cause_of(part: str, row: Row) -> Cause:
    """The first cause that fits."""
    for cause in CAUSES:
        if (
            re.search(cause.part, part)
            and re.search(cause.work, row["work"])
            and re.search(cause.peer, row.get("peer") or "")
        ):
            return cause
    return UNEXPLAINED


def is_yardstick(row: Row) -> bool:
    """Whether the other side does less by nature: a unit to count in, not a rival."""
    yardsticks = r"^(copy_|linear|values and indices|one gradient.*)$"
    return row.get("unit") == "exponent" or re.match(yardsticks, row.get("peer") or "") is not None


def slower(row: Row) -> bool:
    """Whether the row belongs into the section: more than the peer's, or than the limit set for it."""
    ratio = row.get("ratio")
    if ratio is None:
        return False
    return met(row) is False or (not is_yardstick(row) and ratio > EQUAL)


def overview(parts: dict[str, Any]) -> str:
    """How many targets are met, and how many comparisons are won, equal and lost."""
    rows = [row for part in parts.values() for row in part["rows"]]
    judged = [verdict for verdict in map(met, rows) if verdict is not None]
    ratios = [row["ratio"] for row in rows if row.get("ratio") is not None and not is_yardstick(row)]
    less, equal = sum(r < 1 / EQUAL for r in ratios), sum(1 / EQUAL <= r <= EQUAL for r in ratios)
    return (
        f"{sum(judged)} of {len(judged)} targets are met. Of {len(ratios)} comparisons with another "
        f"implementation, this package takes less in {less}, the same within 5 % in {equal}, and more in "
        f"{len(ratios) - less - equal}."
    )


def slower_section(parts: dict[str, Any]) -> str:
    """Every slower row, grouped by cause, the largest ratio first."""
    grouped: dict[Cause, list[tuple[str, Row]]] = {}
    for name, part in parts.items():
        for row in part["rows"]:
            if slower(row):
                grouped.setdefault(cause_of(name, row), []).append((name, row))
    if not grouped:
        return "Nothing was slower than its best peer in this run."
    worst = {cause: max(_ratio(row) for _, row in found) for cause, found in grouped.items()}
    blocks = []
    for cause in sorted(grouped, key=lambda cause: worst[cause], reverse=True):
        blocks.append(f"**{cause.title}.** {cause.why}.")
        blocks.append("\n".join(f"- {line}" for line in _lines([row for _, row in grouped[cause]])))
    return "\n\n".join(blocks)


def _ratio(row: Row) -> float:
    ratio = row.get("ratio")
    assert ratio is not None
    return ratio


def _lines(rows: list[Row]) -> list[str]:
    """One for each work and peer; sizes of the same function share theirs."""
    grouped: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for row in rows:
        name, _, size = row["work"].rpartition(", n = ")
        work, at = (name, f" at n = {size}") if size.isdigit() and name else (row["work"], "")
        grouped.setdefault((work, row.get("peer") or ""), []).append((at, row))
    worst = {key: max(_ratio(row) for _, row in found) for key, found in grouped.items()}
    lines = []
    for work, peer in sorted(grouped, key=lambda key: worst[key], reverse=True):
        ratios = ", ".join(f"{_ratio(row):.2f}{at}{_missed(row)}" for at, row in grouped[work, peer])
        lines.append(f"{work}, against {peer}: {ratios}" if peer else f"{work}: {ratios}")
    return [re.sub(r"([|*_<])", r"\\\1", line) for line in lines]


def _missed(row: Row) -> str:
    return f" (at most {row.get('target'):g} was the target)" if met(row) is False else ""
