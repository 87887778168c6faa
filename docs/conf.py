"""Sphinx configuration."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.abspath(".."))

from sphinx.application import Sphinx

from torchzygote._version import __version__

project = "torchzygote"
author = "torchzygote contributors"
copyright = "2026, torchzygote contributors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Only our own names are looked up: there is no inventory of other projects to resolve theirs in.
nitpick_ignore_regex = [
    ("py:(class|exc|obj|data|attr)", r"(?!torchzygote\.).*"),
    ("py:func", r"torch\..*"),
]

html_theme = "furo"
html_title = "torchzygote"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#7a3e9d", "color-brand-content": "#7a3e9d"},
    "dark_css_variables": {"color-brand-primary": "#c792ea", "color-brand-content": "#c792ea"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _module_table() -> str:
    """Each module with the first sentences of its docstring, up to what it must not know."""
    package = Path(__file__).parent.parent / "torchzygote"
    lines = ["| module | what it is |", "| --- | --- |"]
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first, _, rest = text.partition("\n\n")
        last = rest.rstrip().rpartition("\n\n")[2]
        shown = first
        for sentence in " ".join(last.split()).replace("; it", ". It").split(". "):
            if sentence.startswith(("Knows", "It must not", "It knows")):
                shown += f" {sentence.rstrip('.')}."
        name = "/".join(part for part in parts if part != "__init__") or "torchzygote"
        shown = " ".join(shown.replace("``", "`").replace(":mod:", "").replace("|", "\\|").split())
        lines.append(f"| `{name}` | {shown} |")
    return "\n".join(lines)


def _fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "architecture":
        source[0] = source[0].replace("%MODULES%", _module_table())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _fill_in)
