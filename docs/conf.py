"""Sphinx configuration."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.abspath(".."))

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
nitpick_ignore_regex = [("py:(class|exc|obj|data|attr)", r"(?!torchzygote\.).*")]

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
