"""From measured figures to docs/performance.md: ``python -m benchmarks.report``.

Rewrites what stands between ``<!-- part: NAME -->`` and ``<!-- end -->`` on the page, and draws the plots.
Measures nothing.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from ._harness import ROOT, Row, met
from ._reasons import overview, slower_section
from ._table import amount

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "_static" / "performance"
RESULTS = ROOT / "benchmarks" / "results"

Results = dict[str, Any]

# What a picture shows, for those who don't see it.
CAPTIONS = {
    "first_order": "Ratios to the best peer, first order",
    "second_order": "Ratios to the best peer, second order",
    "sparse": "Ratios to the best peer, sparse derivatives",
    "buffer": "Ratios to the best peer, Buffer",
    "checkpointing": "Ratios to the best peer, checkpoints and hooks",
    "native_ops": "Ratios to moving the same bytes",
    "compiled": "Ratios to the best peer, compiled functions",
    "sizes": "Ratios to the nearest thing in PyTorch at three sizes",
}


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
    """Rows as a table in Markdown; what misses its target is said in words."""
    judged = any(row.get("target") is not None for row in rows)
    head = ["work", "here", "spread", "best peer", "peer", "ratio", *(["at most", ""] if judged else [])]
    lines = [
        "| " + " | ".join(head) + " |",
        "| --- | ---: | ---: | --- | ---: | ---: |" + (" ---: | --- |" * judged),
    ]
    for row in rows:
        unit = row.get("unit", "")
        ratio, target = row.get("ratio"), row.get("target")
        values = [
            cell(row["work"]),
            kept(amount(row.get("ours_ms"), unit)),
            f"{row['spread']:.0%}" if "spread" in row else "",
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
    kernels = "with the native library" if "cpu" in loaded else "without native library"
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}; Python {machine['python']}, PyTorch {machine['torch']}, "
        f"torchzygote {machine['torchzygote']} {kernels}"
    )


def parts(results: Results) -> dict[str, str]:
    """What goes into each place of the page; a part without figures says so."""
    measured = results["parts"]
    found = {}
    for name, caption in CAPTIONS.items():
        rows = measured[name]["rows"] if name in measured else []
        picture = f"![{caption}](_static/performance/{name}.png){{.plot}}\n\n" if drawable(rows) else ""
        made = sizes_table(rows) if name == "sizes" else table(rows)
        found[name] = f"\n{picture}{made}\n" if rows else "Not measured yet."
    machines = {describe(part["machine"]) for part in measured.values()}
    found["machine"] = f"Measured {results.get('measured', '')} on {'; '.join(sorted(machines))}."
    found["summary"] = overview(measured)
    found["slower"] = f"\n{slower_section(measured)}\n"
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
    lines = ["| function | n | here | ratio to | | growth |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for name, sizes in by_function(rows).items():
        ratios = "<br>".join(_ratio(row.get("ratio")) for row in sizes.values())
        times = "<br>".join(kept(amount(row.get("ours_ms"))) for row in sizes.values())
        # the best of several peers may be another one at another size
        peers = [row.get("peer") or "" for row in sizes.values()]
        shown = cell("<br>".join(peers) if len(set(peers)) > 1 else peers[0])
        growth = re.search(r"exponent (-?[\d.]+)", list(sizes.values())[-1].get("note", ""))
        lines.append(
            f"| {cell(name)} | {'<br>'.join(grouped_digits(n) for n in sizes)} | {times} "
            f"| {shown} | {ratios} | {growth.group(1) if growth else ''} |"
        )
    return "\n".join(lines)


def fill(page: str, found: dict[str, str]) -> str:
    """The page with its parts replaced."""
    for name, text in found.items():
        pattern = re.compile(rf"(<!-- part: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = pattern.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def drawable(rows: list[Row]) -> bool:
    """Whether there is anything to draw."""
    return any(row.get("ratio") for row in rows)


def draw(results: Results, folder: Path) -> None:
    """The plots: ratios to the best peer, and for the sizes one ratio for each."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in results["parts"].items():
        rows = part["rows"]
        if drawable(rows):
            lines = _lines_of_sizes(rows) if name == "sizes" else _lines_of_rows(rows)
            _draw_ratios(lines, folder / f"{name}.png")


# A label, its ratios from the smallest size to the largest, and the target.
_Line = tuple[str, list[float], float | None]


def _lines_of_rows(rows: list[Row]) -> list[_Line]:
    shown = [(row, ratio) for row in rows if (ratio := row.get("ratio"))]
    names = [row["work"] for row, _ in shown]
    lines: list[_Line] = []
    for row, ratio in shown:
        peer = f" ({row.get('peer')})" if names.count(row["work"]) > 1 else ""
        lines.append((row["work"] + peer, [ratio], row.get("target")))
    return lines


def _lines_of_sizes(rows: list[Row]) -> list[_Line]:
    lines: list[_Line] = []
    for name, sizes in by_function(rows).items():
        ratios = [ratio for row in sizes.values() if (ratio := row.get("ratio"))]
        if ratios:
            lines.append((name, ratios, None))
    return lines


def _draw_ratios(lines: list[_Line], path: Path) -> None:
    """A dot for each ratio, left of 1 where less is taken; larger dots for larger sizes."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    labels = [textwrap.fill(label, 48) for label, _, _ in lines]
    height = sum(0.3 if "\n" not in label else 0.38 for label in labels)
    figure, axes = plt.subplots(figsize=(8, 1.0 + height), layout="constrained")
    for position, (_, ratios, target) in enumerate(reversed(lines)):
        axes.plot([1, *ratios], [position] * (1 + len(ratios)), color="0.85", lw=2, zorder=1)
        limit = 1.0 if target is None else target
        colors = ["#7a3e9d" if ratio <= limit else "#c0392b" for ratio in ratios]
        areas = [40] if len(ratios) == 1 else [14 + 24 * step for step in range(len(ratios))]
        axes.scatter(ratios, [position] * len(ratios), c=colors, s=areas, zorder=3)
        if target is not None:
            axes.scatter([target], [position], marker="|", color="0.2", s=150, zorder=2)
    axes.axvline(1, color="0.35", lw=0.8, zorder=0)
    axes.set_xscale("log")
    low, high = (limits := axes.get_xlim())[0], limits[1]
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", alpha=0.25)
    axes.margins(x=0.08, y=0.5 / len(lines))
    axes.set_yticks(range(len(labels)), labels[::-1], fontsize=9)
    axes.tick_params(axis="y", length=0)
    targets = "; bar: target" if any(target is not None for *_, target in lines) else ""
    sizes = "; larger dot: larger size" if any(len(ratios) > 1 for _, ratios, _ in lines) else ""
    figure.supxlabel(f"ratio to the best peer; left of 1: less is taken{targets}{sizes}", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
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
