"""What Sphinx makes of these pages and of the docstrings; `make docs` builds them into build/docs/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dfer  # noqa: E402 (from this checkout)

project = "dfer"
author = "The dfer authors"
copyright = "2026, The dfer authors"
release = version = dfer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"dfer {release}"

default_role = "code"  # `name` in a docstring is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
myst_heading_anchors = 3  # links may lead to headings
