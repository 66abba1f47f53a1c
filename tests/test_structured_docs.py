"""Every Python snippet of the page runs, one after the other in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_snippets() -> None:
    page = (Path(__file__).parent.parent / "docs" / "structured.md").read_text()
    namespace: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, namespace)
