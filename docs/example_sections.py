"""For the pages: Griffe renders doctests under "Examples:" only, where the docstrings say "Example:"."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads "Example:" as Griffe's section of examples."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Each module, class and function, once it is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
