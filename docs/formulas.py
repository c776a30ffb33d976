"""For the pages: MathJax out of a Python package into the site, so that formulas need no network when they are read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

PACKAGE = "mathjax"  # of django-static-mathjax, which is MathJax and nothing else
FILES = {"es5/tex-svg.js": "tex-svg.js", "LICENSE": "tex-svg.LICENSE"}  # one script with its glyphs, no fonts


def folder() -> Path:
    """Where the installed package has MathJax."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise PluginError("formulas need the package django-static-mathjax: `pip install --group docs`")
    return Path(found.origin).parent / "static" / "mathjax"


def on_files(files: Any, *, config: Any) -> Any:
    """MathJax and its licence beside the site's own scripts."""
    for source, name in FILES.items():
        files.append(File.generated(config, f"javascripts/{name}", abs_src_path=str(folder() / source)))
    return files
