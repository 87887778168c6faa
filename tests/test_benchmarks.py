"""The benchmark harness: its arithmetic, its table, its processes, and a tiny run of everything."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import _harness as harness
from benchmarks import _reasons as reasons
from benchmarks import _table as table
from benchmarks import peers, report


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Pretended:
    """A contender with a time of its own, in another process as it were."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def time(self, loops: int) -> float:
        self.calls += loops
        return self.seconds * loops


def test_the_fastest_peer_is_the_one_compared_with() -> None:
    row = harness.compare(
        "work",
        Pretended(3e-3),
        {"slow": Pretended(9e-3), "fast": Pretended(2e-3), "absent": None},
        target=1.0,
        seconds=0.01,
    )
    assert row["peer"] == "fast"
    assert row["ratio"] == pytest.approx(1.5)
    assert row["ours_ms"] == pytest.approx(3.0)
    assert row["others"] == pytest.approx({"slow": 9.0})
    assert "absent: peer not installed" in row["note"]
    assert harness.met(row) is False


def test_a_peer_that_fails_is_left_out_and_said_so() -> None:
    def broken() -> None:
        raise RuntimeError("not for this function")

    row = harness.compare("work", Pretended(1e-3), {"broken": broken}, target=1.0, seconds=0.01)
    assert row["ratio"] is None
    assert harness.met(row) is None
    assert "broken fails: RuntimeError: not for this function" in row["note"]


def test_time_is_what_a_call_takes() -> None:
    samples = harness.interleave({"a": lambda: busy(2e-3), "b": lambda: busy(4e-3)}, seconds=0.01, rounds=5)
    assert len(samples["a"]) == len(samples["b"]) >= 5
    assert 2.0 <= min(samples["a"]) < 20  # never less; how much more is the machine's business
    assert 4.0 <= min(samples["b"]) < 40


def test_slow_contenders_get_fewer_rounds() -> None:
    slow = Pretended(6.0)
    samples = harness.interleave({"slow": slow}, seconds=0, rounds=9, most_s=15)
    assert len(samples["slow"]) == 2
    assert slow.calls == 3


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    assert harness.exponent({n: 3.0 * n**power for n in (10, 100, 1000)}) == pytest.approx(power)


def test_growth_is_a_row_with_its_exponent() -> None:
    row = harness.growth("work", {n: Pretended(1e-5 * n) for n in (10, 100, 1000)}, target=1.1, seconds=0.01)
    assert row["ratio"] == pytest.approx(1.0)
    assert harness.met(row) is True


def test_spread_of_equal_samples_is_zero() -> None:
    assert harness.spread([2.0] * 8) == 0
    assert harness.spread([1.0]) == 0
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0)


def build_block(megabytes: int) -> object:
    def run() -> torch.Tensor:
        return torch.ones(megabytes << 18) * 1  # two blocks at a time

    return run


def test_peak_memory_is_what_the_callable_needs() -> None:
    peak = harness.peak_memory("tests.test_benchmarks:build_block", {"megabytes": 32})
    assert peak == pytest.approx(64, rel=0.15)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="unexpected keyword argument"):
        harness.peak_memory("tests.test_benchmarks:build_block", {"wrong": 1})


def test_the_table_shows_what_is_missed() -> None:
    row = harness.make_row("work", 2.0, "peer", 1.0, target=1.5, note="because")
    shown = table.text(row)
    assert "MISSED" in shown
    assert "2.00" in shown
    assert shown.endswith("because")
    assert "ok" in table.text(harness.make_row("work", 1.0, "peer", 1.0, target=1.5))
    assert "peer not installed" in table.text(harness.missing("work", "JAX"))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0123, "", "12.3 µs"),
        (12.34, "", "12.3 ms"),
        (23900.0, "", "23.9 s"),
        (40.2, "MB", "40.2 MB"),
        (None, "", "-"),
    ],
)
def test_amounts_have_three_digits(value: float | None, unit: str, shown: str) -> None:
    assert table.amount(value, unit) == shown


def test_a_run_prints_saves_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Module:
        @staticmethod
        def rows(full: bool = False) -> list[harness.Row]:
            return [harness.make_row("a work", 1.0, "peer", 2.0, target=1.0)]

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    out = tmp_path / "results.json"
    assert command.main(["--only", "buffer", "--out", str(out)]) == 0
    assert command.main(["--only", "sparse", "--out", str(out)]) == 0
    assert "a work" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert set(saved["parts"]) == {"buffer", "sparse"}
    assert saved["parts"]["buffer"]["rows"][0]["ratio"] == 0.5
    assert saved["parts"]["buffer"]["machine"]["torch"] == torch.__version__


def test_a_part_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Module:
        @staticmethod
        def rows(full: bool = False) -> list[harness.Row]:
            raise ValueError("no such thing")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    assert command.main(["--only", "buffer", "sparse", "--out", str(tmp_path / "r.json")]) == 1
    assert "ValueError: no such thing" in capsys.readouterr().out


def test_the_page_shows_the_figures_of_the_last_run() -> None:
    """``python -m benchmarks.report`` after a run; nothing on the page is written by hand."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.fill(page, report.parts(report.load())) == page


def test_a_report_says_in_words_what_is_missed(tmp_path: Path) -> None:
    rows = [
        harness.make_row("good work", 1.0, "peer", 2.0, target=1.0),
        harness.make_row("slow | work", 3.0, "peer", 2.0, target=1.0, note="since it does more"),
        harness.missing("other work", "JAX"),
    ]
    shown = report.table(rows)
    assert "| good work | 1\u00a0ms |  | peer | 2\u00a0ms | 0.50 | 1 | met |" in shown
    assert "| slow \\| work | 3\u00a0ms |  | peer | 2\u00a0ms | 1.50 | 1 | **missed** |" in shown
    assert "- slow \\| work: since it does more." in shown
    assert "peer not installed" in shown
    results = {"parts": {"sparse": {"rows": rows, "machine": table.machine()}}}
    report.draw(results, tmp_path)
    assert (tmp_path / "sparse.png").stat().st_size > 1000
    page = "a\n<!-- part: sparse -->\nold\n<!-- end -->\nb\n<!-- part: buffer -->\n<!-- end -->\n"
    filled = report.fill(page, report.parts(results))
    assert shown in filled
    assert "![Ratios to the best peer, sparse derivatives](_static/performance/sparse.png)" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- part: buffer -->\nNot measured yet.\n<!-- end -->\n")
    assert report.fill(filled, report.parts(results)) == filled


def test_sizes_are_one_line_for_each_function() -> None:
    rows = [harness.make_row(f"gradient, n = {n}", n / 10, "by hand", n / 20) for n in (10, 100, 1000)]
    rows[-1]["note"] = "time grows with exponent 1.00"
    shown = report.sizes_table(rows).splitlines()
    assert len(shown) == 3
    assert "10<br>100<br>1\u00a0000" in shown[-1]
    assert shown[-1].count("2.00<br>2.00<br>2.00") == 1


def parts_of(**parts: list[harness.Row]) -> dict[str, dict[str, list[harness.Row]]]:
    return {name: {"rows": rows} for name, rows in parts.items()}


def test_what_is_slower_is_said_with_its_cause() -> None:
    found = parts_of(
        compiled=[harness.make_row("compiled f", 9.0, "JAX, jit", 1.0, target=1.5)],
        buffer=[
            harness.make_row("4096 row writes", 1.0, "in place", 2.0),
            harness.make_row("table from neighbours", 3.0, "nested_lists", 2.0),
        ],
        sizes=[harness.make_row(f"gradient through hook, n = {n}", 2.0, "hand", 1.0) for n in (10, 20)],
    )
    shown = reasons.slower_section(found)
    assert "- compiled f, against JAX, jit: 9.00 (at most 1.5 was the target)" in shown
    assert "- table from neighbours, against nested\\_lists: 1.50" in shown
    assert "- gradient through hook, against hand: 2.00 at n = 10, 2.00 at n = 20" in shown
    assert "4096" not in shown
    assert "guards" in shown
    assert shown.index("compiled f") < shown.index("hook") < shown.index("neighbours")
    assert reasons.slower_section(parts_of(buffer=[])).startswith("Nothing was slower")


def test_a_yardstick_is_judged_by_its_target() -> None:
    copied = harness.make_row("gather", 1.4, "copy_", 1.0, target=1.5)
    linear = harness.make_row("growth", 1.1, "linear", 1.0, target=1.15, unit="exponent")
    assert not reasons.slower(copied)
    assert not reasons.slower(linear)
    assert reasons.slower(harness.make_row("gather", 1.6, "copy_", 1.0, target=1.5))
    assert not reasons.slower(harness.missing("work", "JAX", target=1.0))


def test_wins_ties_and_losses_are_counted() -> None:
    rows = [harness.make_row("work", ours, "peer", 1.0, target=1.0) for ours in (0.5, 1.02, 2.0)]
    rows.append(harness.make_row("gather", 1.4, "copy_", 1.0, target=1.5))
    shown = reasons.overview(parts_of(first_order=rows))
    assert shown.startswith("2 of 4 targets are met. Of 3 comparisons")
    assert shown.endswith("takes less in 1, the same within 5 % in 1, and more in 1.")


def test_every_row_of_the_last_run_has_a_cause_in_case_it_is_slower() -> None:
    """Whatever the figures of the next run are, the page can say why."""
    unexplained = [
        row["work"]
        for name, part in report.load()["parts"].items()
        for row in part["rows"]
        if row.get("peer") and reasons.cause_of(name, row) is reasons.UNEXPLAINED
    ]
    assert not unexplained


def test_absent_peers_are_none() -> None:
    assert peers.torch_peer("no_such_library_anywhere") is None


def test_a_small_comparison_of_the_real_thing() -> None:
    from benchmarks.first_order import by_hand, three_small_ops
    from torchzygote import gradient

    x = torch.randn(10)
    torch.testing.assert_close(gradient(three_small_ops, x)[0], by_hand(three_small_ops, x)())
    row = harness.compare(
        "gradient",
        lambda: gradient(three_small_ops, x),
        {"by hand": by_hand(three_small_ops, x)},
        seconds=0.01,
    )
    ratio = row["ratio"]
    assert ratio is not None
    assert math.isfinite(ratio)
