"""The code blocks of README.md and docs/ run as tests, each page from top to bottom."""

from __future__ import annotations

import doctest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS),
        SkipParser(),
    ],
    patterns=["*.md"],
    excludes=["docs/_build/**", ".venv/**", "build/**"],
    # Dynamo imports the module of a function that it traces (before 2.12).
    setup=lambda namespace: namespace.update(__name__="__main__"),
).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A page's blocks share one namespace, so they go to one process (pytest -n)."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
