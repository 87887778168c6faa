"""Rows as text, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._harness import Row, met

_HEADER = ("work", "ours", "best peer", "peer", "ratio", "at most", "")
_WIDTHS = (58, 11, 30, 11, 7, 8, 8)


def amount(value: float | None, unit: str = "") -> str:
    """Three digits and a unit."""
    if value is None:
        return "-"
    if unit:
        return f"{value:.2f}" if unit == "exponent" else f"{value:.3g} {unit}"
    if value < 0.1:
        return f"{1e3 * value:.3g} µs"
    return f"{value:.3g} ms" if value < 1e4 else f"{value / 1e3:.3g} s"


def verdict(row: Row) -> str:
    """One word on the target."""
    reached = met(row)
    if reached is None:
        return ""
    return "ok" if reached else "MISSED"


def cells(row: Row) -> tuple[str, ...]:
    """The cells of one line."""
    unit = row.get("unit", "")
    ratio, target = row.get("ratio"), row.get("target")
    return (
        row["work"],
        amount(row.get("ours_ms"), unit),
        row.get("peer", ""),
        amount(row.get("peer_ms"), unit),
        "-" if ratio is None else f"{ratio:.2f}",
        "" if target is None else f"{target:g}",
        verdict(row),
    )


def line(values: Iterable[str]) -> str:
    """Cells padded to columns."""
    padded = []
    for position, (value, width) in enumerate(zip(values, _WIDTHS, strict=True)):
        right = position in (1, 3, 4, 5)
        padded.append(value.rjust(width) if right else value.ljust(width))
    return "  ".join(padded).rstrip()


def header() -> str:
    """The first two lines of the table."""
    return line(_HEADER) + "\n" + line("-" * width for width in _WIDTHS)


def text(row: Row) -> str:
    """A line of the table; notes go below it, indented."""
    shown = line(cells(row))
    return f"{shown}\n    {row['note']}" if row.get("note") else shown


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    import torchzygote

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchzygote": torchzygote.__version__,
        "native": _native(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _native() -> str:
    try:
        from torchzygote import native

        loaded = native.info()["devices"]
        return ", ".join(loaded) if loaded else "none"
    except ImportError:
        return "not built"
