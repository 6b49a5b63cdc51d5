"""How Sphinx builds the pages of this folder: `sphinx-build -W docs docs/_build`."""

import importlib.util
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "train", "pruning")

project = "Tombola"
release = metadata.version("tombola")
html_title = f"Tombola {release}"
html_theme = "furo"
html_show_copyright = False
html_show_sourcelink = False
exclude_patterns = ["_build"]
extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
]

# Pages are plain Markdown, read on code hosts too; a link `page.md#a-heading` leads to the heading.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# The API: every public name of every module, from its docstring, where `x` is code.
default_role = "code"
apidoc_modules = [
    {
        "path": f"../{package}",
        "destination": f"api/{package}",
        "separate_modules": True,
        "max_depth": 2,
        "include_private": False,
        "implicit_namespaces": False,
        "automodule_options": {"members", "undoc-members"},
    }
    for package in PACKAGES
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_display_short_literal_types = True
autodoc_mock_imports = [
    name for name in ("nvidia", "ffcv", "webdataset") if importlib.util.find_spec(name) is None
]

# Elsewhere: checked by `sphinx-build -b linkcheck`, where there is a network.
linkcheck_timeout = 20
linkcheck_retries = 2
