"""The examples run in their quick mode and print what they promise."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# example, arguments ({out} is an empty folder), what it prints, files it writes
TABLE = [
    ("quickstart", [], r"tensor\(\[\[-2\., *1\., *0\.\]", []),
    (
        "lattice_buffer",
        ["--quick", "--output", "{out}/lattice.png"],
        r"gradient against forward-backward algorithm: \d\.\de-1\d at most",
        ["lattice.png"],
    ),
    (
        "brusselator",
        ["--quick", "--output", "{out}/brusselator.png"],
        r"plan: .* and \d+ products; distance from the solution \d\.\de-0[56]\nwith the plan: ",
        ["brusselator.png", "brusselator_structure.png"],
    ),
    (
        "laplacian",
        ["--quick", "--output", "{out}/laplacian.png"],
        r"relative error against the formula: \d\.\de-1[5-9]",
        ["laplacian.png"],
    ),
    (
        "checkpoint_memory",
        ["--quick", "--output", "{out}/memory.png"],
        r"losses differ by 0\.0e\+00\n.*peak memory with checkpoints: [1-8]\d% of that without",
        ["memory.png"],
    ),
    (
        "newton_logistic",
        ["--quick", "--output", "{out}/newton.png"],
        r"order of convergence of Newton's method: (1\.9|2\.0)",
        ["newton.png"],
    ),
    (
        "pinn_poisson",
        ["--quick", "--output", "{out}/poisson.png"],
        r"relative error: 1\.\de\+00 to [1-9]\.\de-0[123]",
        ["poisson.png"],
    ),
    (
        "train_digits",
        ["--quick", "--output", "{out}/digits.png"],
        r"test accuracy: \d+\.\d+%",
        ["digits.png"],
    ),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, arguments: list[str]) -> object:
    main: Callable[[list[str]], object] = load(name).main
    return main(arguments)


@pytest.mark.parametrize(("name", "arguments", "prints", "writes"), TABLE, ids=[row[0] for row in TABLE])
def test_example_runs(
    name: str,
    arguments: list[str],
    prints: str,
    writes: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(name, [argument.format(out=tmp_path) for argument in arguments])
    assert re.search(prints, capsys.readouterr().out)
    for file in writes:
        assert (tmp_path / file).stat().st_size > 1000


def test_every_example_is_in_the_table() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {row[0] for row in TABLE}


@pytest.mark.slow
def test_the_digits_are_learnt(tmp_path: Path) -> None:
    accuracy = run("train_digits", ["--output", str(tmp_path / "digits.png")])
    assert isinstance(accuracy, float)
    assert accuracy >= 0.97
