"""From measured figures to docs/performance.md: ``python -m benchmarks.report``.

Rewrites what stands between ``<!-- part: NAME -->`` and ``<!-- end -->`` on the page, and draws the plots.
Measures nothing.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ._harness import ROOT, Row, met
from ._table import amount

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "_static" / "performance"
RESULTS = ROOT / "benchmarks" / "results"

Results = dict[str, Any]


def load(name: str = "cpu.json") -> Results:
    """The figures of the last run."""
    path = RESULTS / name
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    return found


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def kept(quantity: str) -> str:
    """A number and its unit, on one line whatever the width."""
    return quantity.replace(" ", "\u00a0")


def grouped_digits(n: int) -> str:
    """10 000, on one line."""
    return f"{n:,}".replace(",", "\u00a0")


def table(rows: list[Row]) -> str:
    """Rows as a table in Markdown; what misses its target or is slower is said in words."""
    judged = any(row.get("target") is not None for row in rows)
    head = ["work", "here", "best peer", "peer", "ratio", *(["at most", ""] if judged else [])]
    lines = [
        "| " + " | ".join(head) + " |",
        "| --- | ---: | --- | ---: | ---: |" + (" ---: | --- |" * judged),
    ]
    for row in rows:
        unit = row.get("unit", "")
        ratio, target = row.get("ratio"), row.get("target")
        values = [
            cell(row["work"]),
            kept(amount(row.get("ours_ms"), unit)),
            cell(row.get("peer", "") or ""),
            kept(amount(row.get("peer_ms"), unit)),
            _ratio(ratio),
        ]
        if judged:
            values += ["" if target is None else f"{target:g}", _word(row)]
        lines.append("| " + " | ".join(values) + " |")
    remarks = [f"- {cell(row['work'])}: {row['note']}." for row in rows if row.get("note")]
    return "\n".join(lines) + ("\n\n" + "\n".join(remarks) if remarks else "")


def _word(row: Row) -> str:
    reached = met(row)
    return {True: "met", False: "**missed**", None: ""}[reached]


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def describe(machine: dict[str, Any]) -> str:
    """A sentence on the machine."""
    memory = f", {machine['memory_gib']} GiB" if machine.get("memory_gib") else ""
    loaded = machine.get("native", "")
    kernels = "with the native library" if "'cpu'" in loaded.split("missing")[0] else "without native library"
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}; Python {machine['python']}, PyTorch {machine['torch']}, "
        f"torchzygote {machine['torchzygote']} {kernels}"
    )


def parts(results: Results) -> dict[str, str]:
    """What goes into each place of the page."""
    found = {name: table(part["rows"]) for name, part in results["parts"].items() if name != "sizes"}
    if "sizes" in results["parts"]:
        found["sizes"] = sizes_table(results["parts"]["sizes"]["rows"])
    machines = {describe(part["machine"]) for part in results["parts"].values()}
    found["machine"] = f"Measured {results.get('measured', '')} on {'; '.join(sorted(machines))}."
    judged = [met(row) for part in results["parts"].values() for row in part["rows"]]
    judged = [verdict for verdict in judged if verdict is not None]
    found["summary"] = f"{sum(judged)} of {len(judged)} targets are met."
    return found


def by_function(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """The rows of the sizes, by name and size."""
    grouped: dict[str, dict[int, Row]] = {}
    for row in rows:
        name, _, size = row["work"].rpartition(", n = ")
        if size.isdigit():
            grouped.setdefault(name, {})[int(size)] = row
    return grouped


def sizes_table(rows: list[Row]) -> str:
    """A line for each function: time and ratio at each size, and how time grows."""
    lines = ["| function | n | here | ratio to | |  growth |", "| --- | --- | --- | --- | --- | --- |"]
    for name, sizes in by_function(rows).items():
        ratios = ", ".join(
            "–" if row.get("ratio") is None else f"{row['ratio']:.2f}" for row in sizes.values()
        )
        times = ", ".join(kept(amount(row.get("ours_ms"))) for row in sizes.values())
        last = list(sizes.values())[-1]
        growth = re.search(r"exponent (-?[\d.]+)", last.get("note", ""))
        lines.append(
            f"| {cell(name)} | {', '.join(grouped_digits(n) for n in sizes)} | {times} "
            f"| {cell(last.get('peer', ''))} | {ratios} | {growth.group(1) if growth else ''} |"
        )
    return "\n".join(lines)


def fill(page: str, found: dict[str, str]) -> str:
    """The page with its parts replaced."""
    for name, text in found.items():
        pattern = re.compile(rf"(<!-- part: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = pattern.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def draw(results: Results, folder: Path) -> None:
    """The plots: ratios to the best peer, and growth with size."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in results["parts"].items():
        if name == "sizes":
            _draw_sizes(by_function(part["rows"]), folder / "sizes.png")
        else:
            _draw_ratios(part["rows"], folder / f"{name}.png")


def _draw_ratios(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown = [row for row in rows if row.get("ratio") is not None]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.32 * len(shown)), layout="constrained")
    for position, row in enumerate(reversed(shown)):
        ratio, target = row["ratio"], row.get("target")
        assert ratio is not None
        better = ratio <= (target if target is not None else 1.0)
        axes.plot([1, ratio], [position, position], color="0.8", lw=2, zorder=1)
        axes.scatter([ratio], [position], color="#7a3e9d" if better else "#c0392b", s=36, zorder=3)
        if target is not None:
            axes.scatter([target], [position], marker="|", color="0.35", s=120, zorder=2)
    axes.axvline(1, color="0.35", lw=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    names = [row["work"] for row in shown]
    labels = [
        f"{row['work']} ({row['peer']})" if names.count(row["work"]) > 1 else row["work"] for row in shown
    ]
    axes.set_yticks(range(len(shown)), labels[::-1], fontsize=8)
    axes.set_xlabel("ratio to the best peer (left of 1 is less; bar: target)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sizes(grouped: dict[str, dict[int, Row]], path: Path) -> None:
    import matplotlib.pyplot as plt

    columns = 4
    lines = -(-len(grouped) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(9.5, 1.75 * lines), layout="constrained")
    for axes in grid.flat[len(grouped) :]:
        axes.set_visible(False)
    for axes, (name, sizes) in zip(grid.flat, grouped.items(), strict=False):
        ns = list(sizes)
        axes.loglog(ns, [row.get("ours_ms") for row in sizes.values()], "o-", color="#7a3e9d", ms=3, lw=1.3)
        peers = [row.get("peer_ms") for row in sizes.values()]
        axes.loglog(ns, peers, "s--", color="0.55", ms=3, lw=1)
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=6)
        axes.minorticks_off()
    figure.supxlabel("n", fontsize=8)
    figure.supylabel("milliseconds; solid: torchzygote, dashed: best peer", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    """Fill the page and draw the plots."""
    results = load()
    page = fill(PAGE.read_text(encoding="utf-8"), parts(results))
    PAGE.write_text(page, encoding="utf-8")
    draw(results, PICTURES)
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURES.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
