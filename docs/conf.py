"""Sphinx's configuration of the site; `docs/make_site.py` lays out what it is made of."""

from __future__ import annotations

import os

project = "xenbackend"
author = copyright = "The xenbackend developers"  # noqa: A001 - Sphinx's name
version = release = os.environ.get("XENBACKEND_VERSION", "")
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
myst_heading_anchors = 6
myst_enable_extensions = ["colon_fence"]
highlight_language = "text"
suppress_warnings = ["misc.highlighting_failure"]  # blocks of `sh` that are no whole scripts
html_theme = "alabaster"
html_theme_options = {"page_width": "70em", "fixed_sidebar": True}
html_show_sourcelink = html_copy_source = False
