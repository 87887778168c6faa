"""Run the comparison, print one table: ``python -m benchmarks [--full] [--only NAME ...] [--out FILE]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ._harness import ROOT, Row, met
from ._table import header, machine, text

# Module to the heading of its part of the table.
PARTS = {
    "first_order": "First order: gradients, Jacobians, implicit parameters",
    "second_order": "Second order: Hessians and their diagonals",
    "sparse": "Sparse derivatives",
    "buffer": "Buffer",
    "checkpointing": "Checkpoints and hooks",
    "native_ops": "Native operators",
    "compiled": "Inside torch.compile",
    "sizes": "Every public function at three sizes",
}


def run_part(name: str, full: bool) -> list[Row]:
    """The rows of one module, printed as they come; a failure is a row too."""
    found: list[Row] = []
    try:
        module = importlib.import_module(f"benchmarks.{name}")
        for row in module.rows(full):
            found.append(row)
            print(text(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        failed: Row = {"work": f"{name} failed", "note": f"{type(error).__name__}: {error}"}
        found.append(failed)
        print(f"{name} failed: {failed['note']}", flush=True)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more sizes and repetitions")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    default = ROOT / "benchmarks" / "results" / "cpu.json"
    parser.add_argument("--out", type=Path, default=default, help="where the figures go, as JSON")
    return parser.parse_args(arguments)


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results; parts that did not run this time keep their earlier figures."""
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        results["parts"] = {**earlier.get("parts", {}), **results["parts"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save; 1 if a part failed, whatever the figures are."""
    options = parse(arguments)
    start = time.perf_counter()
    where = machine()
    print("; ".join(f"{key}: {value}" for key, value in where.items()), "\n")
    print(header())
    parts: dict[str, Any] = {}
    for name in options.only or PARTS:
        print(f"\n{PARTS[name]}", flush=True)
        began = time.perf_counter()
        rows = run_part(name, options.full)
        parts[name] = {"machine": where, "seconds": round(time.perf_counter() - began), "rows": rows}
    taken = time.perf_counter() - start
    judged = [met(row) for part in parts.values() for row in part["rows"]]
    judged = [verdict for verdict in judged if verdict is not None]
    print(f"\n{sum(judged)} of {len(judged)} targets met; {taken:.0f} s")
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    save(options.out, {"measured": stamp, "full": options.full, "parts": parts})
    return int(any(row["work"].endswith(" failed") for part in parts.values() for row in part["rows"]))


if __name__ == "__main__":
    sys.exit(main())
