"""Measuring: interleaved runs, medians and spread, growth exponents, peak memory in a process of its own.

A benchmark module has one function, ``rows(full=False)``, that returns (or yields) rows. It makes them with

    compare("jacobian, 10 to 10", ours, {"jacrev": theirs}, target=0.9)     time against the best of the peers
    compare_memory("...", "benchmarks.module:build", {"which": "ours"}, ...) peak memory, each in a process
    growth("...", {1024: f1, 2048: f2, 4096: f4}, target=1.15)              exponent of time over size

Knows nothing of what is measured.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

ROOT = Path(__file__).resolve().parent.parent


class Timed(Protocol):
    """A contender that times itself: one in another process, or on another device."""

    def time(self, loops: int) -> float:
        """Seconds that ``loops`` calls take."""


Contender = Callable[[], Any] | Timed


class Row(TypedDict, total=False):
    """One line of the table. ``ours_ms`` and ``peer_ms`` are in ``unit`` (milliseconds if there is none)."""

    work: str
    ours_ms: float | None
    peer: str
    peer_ms: float | None
    ratio: float | None
    target: float | None
    unit: str  # "MB", "exponent", "GB/s"; absent: milliseconds
    spread: float  # quartile distance of our runs over their median
    others: dict[str, float]  # the other peers
    note: str


def make_row(
    work: str,
    ours: float | None,
    peer: str = "",
    peer_value: float | None = None,
    *,
    target: float | None = None,
    ratio: float | None = None,
    unit: str = "",
    note: str = "",
    others: Mapping[str, float] | None = None,
    spread: float | None = None,
) -> Row:
    """A row; the ratio is ours over the peer's where it isn't given."""
    if ratio is None and ours is not None and peer_value:
        ratio = ours / peer_value
    row: Row = {
        "work": work,
        "ours_ms": ours,
        "peer": peer,
        "peer_ms": peer_value,
        "ratio": ratio,
        "target": target,
    }
    if unit:
        row["unit"] = unit
    if note:
        row["note"] = note
    if others:
        row["others"] = dict(others)
    if spread is not None:
        row["spread"] = spread
    return row


def missing(work: str, peer: str, reason: str = "peer not installed", *, target: float | None = None) -> Row:
    """The row of a comparison whose peer isn't there."""
    return make_row(work, None, peer, None, target=target, note=reason)


def met(row: Row) -> bool | None:
    """Whether the row reaches its target; ``None`` where it has none or was not measured."""
    target, ratio = row.get("target"), row.get("ratio")
    return None if target is None or ratio is None else ratio <= target


# ---------------------------------------------------------------------------------------------------------
# time


def run_time(contender: Contender, loops: int) -> float:
    """Seconds for ``loops`` calls."""
    if hasattr(contender, "time"):
        seconds: float = contender.time(loops)
        return seconds
    start = time.perf_counter()
    for _ in range(loops):
        contender()
    return time.perf_counter() - start


def calibrate(contender: Contender, sample_s: float) -> tuple[int, float]:
    """How many calls fill a sample of about ``sample_s``, and what one took; warms the contender up."""
    first = run_time(contender, 1)
    if first > 100 * sample_s and first > 2:
        return 1, first  # so slow that warming up again would only take time
    if first < sample_s * 10:
        run_time(contender, 2)  # what is kept from one call for others is not kept by the first alone
    loops = 1
    while True:
        taken = run_time(contender, loops)
        if taken >= sample_s or loops >= 1 << 20:
            return max(1, loops if taken < 2 * sample_s else round(loops * sample_s / taken)), taken / loops
        loops = max(loops + 1, min(loops * 10, math.ceil(loops * sample_s / max(taken, 1e-9))))


def interleave(
    contenders: Mapping[str, Contender],
    *,
    seconds: float = 1.0,
    rounds: int = 7,
    sample_s: float = 0.005,
    most_s: float = 15.0,
) -> dict[str, list[float]]:
    """Milliseconds per call, one figure per round and contender, the contenders taking turns.

    Every contender runs before anything is measured, and ``rounds`` times after; more often where ``seconds``
    leave room, less often where that would take more than ``most_s``. Every other round goes backwards. Short
    calls are warmed up in each round: what ran before has filled the caches with other code.
    """
    calibrated = {name: calibrate(contender, sample_s) for name, contender in contenders.items()}
    loops = {name: found for name, (found, _) in calibrated.items()}
    round_s = sum(found * each for found, each in calibrated.values())
    rounds = max(1, min(rounds, int(most_s / round_s)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < rounds or (time.perf_counter() - start < seconds and done < 200):
            for name in order:
                if loops[name] > 1:
                    run_time(contenders[name], 1)
                taken = run_time(contenders[name], loops[name])
                samples[name].append(1e3 * taken / loops[name])
            order.reverse()
            done += 1
    finally:
        if was_collecting:
            gc.enable()
    return samples


def spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    if len(samples) == 1:
        return 0.0
    if len(samples) < 4:
        return (max(samples) - min(samples)) / statistics.median(samples)
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def compare(
    work: str,
    ours: Contender,
    peers: Mapping[str, Contender | None],
    *,
    target: float | None = None,
    seconds: float = 1.0,
    rounds: int = 7,
    note: str = "",
) -> Row:
    """Ours against the fastest of the peers, in interleaved runs.

    A peer that is ``None`` isn't installed; one that raises as it is warmed up is left out, and said so.
    The ratio is the median of the ratios of each round, which is less disturbed by what else the machine
    does than the ratio of the medians.
    """
    contenders: dict[str, Contender] = {"": ours}
    remarks = [note] if note else []
    for name, peer in peers.items():
        if peer is None:
            remarks.append(f"{name}: peer not installed")
            continue
        try:
            run_time(peer, 1)
        except Exception as error:
            remarks.append(f"{name} fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        contenders[name] = peer
    samples = interleave(contenders, seconds=seconds, rounds=rounds)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    mine = medians.pop("")
    own_spread = spread(samples[""])
    if not medians:
        row = make_row(work, mine, target=target, note="; ".join(remarks), spread=own_spread)
        row["ratio"] = None
        return row
    best = min(medians, key=lambda name: medians[name])
    ratio = statistics.median(a / b for a, b in zip(samples[""], samples[best], strict=True))
    others = {name: value for name, value in medians.items() if name != best}
    return make_row(
        work,
        mine,
        best,
        medians[best],
        target=target,
        ratio=ratio,
        note="; ".join(remarks),
        others=others,
        spread=own_spread,
    )


def exponent(times: Mapping[int, float]) -> float:
    """Least-squares slope of log time over log size."""
    xs = [math.log(size) for size in times]
    ys = [math.log(taken) for taken in times.values()]
    return statistics.linear_regression(xs, ys).slope


def growth(
    work: str,
    contenders: Mapping[int, Contender],
    *,
    target: float | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
    note: str = "",
) -> Row:
    """The exponent with which time grows with size (1 is linear); its limit is ``target``."""
    named = {str(size): contender for size, contender in contenders.items()}
    samples = interleave(named, seconds=seconds, rounds=rounds)
    medians = {int(name): statistics.median(taken) for name, taken in samples.items()}
    slope = exponent(medians)
    shown = ", ".join(f"{size}: {value:.3g} ms" for size, value in medians.items())
    return make_row(
        work, slope, "linear", 1.0, target=target, unit="exponent", note=f"{note}; {shown}" if note else shown
    )


# ---------------------------------------------------------------------------------------------------------
# memory


def build(spec: str, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """``"benchmarks.module:function"`` called with ``arguments`` gives the callable to run."""
    module, function = spec.split(":")
    run: Callable[[], Any] = getattr(importlib.import_module(module), function)(**arguments)
    return run


def peak_memory(spec: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 300.0) -> float:
    """Megabytes (2**20) that the callable needs at its peak beyond what was there before it ran.

    ``spec`` names a function that prepares the work (inputs, a small warm-up so that lazily loaded code
    isn't counted) and returns the callable; see :func:`build`. It runs once, in a fresh process whose
    allocator gives freed memory back at once.
    """
    environment = dict(os.environ)
    environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    payload = json.dumps([spec, dict(arguments or {})])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._memory", payload],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{spec} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_mb"])


def compare_memory(
    work: str,
    spec: str,
    ours: Mapping[str, Any],
    peers: Mapping[str, Mapping[str, Any]],
    *,
    target: float | None = None,
    note: str = "",
) -> Row:
    """Peak memory of ``spec`` with the arguments ``ours`` against the leanest of the peers' arguments."""
    mine = peak_memory(spec, ours)
    theirs = {name: peak_memory(spec, arguments) for name, arguments in peers.items()}
    best = min(theirs, key=lambda name: theirs[name])
    others = {name: value for name, value in theirs.items() if name != best}
    return make_row(work, mine, best, theirs[best], target=target, unit="MB", note=note, others=others)
