"""Every keyword is described on the page of every function that takes it; in the sources each is described once.

A docstring says ``data, loss: ..., see :func:`~torch_flowprune.flow```, or of ``**options`` whose they are. In the
reference such an entry becomes one entry a keyword, with the words of the function that it names.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from typing_extensions import Unpack

Names = tuple[str, ...]

_ENTRY = re.compile(r"    (\w+(?:, \w+)*): ?(?=\S|$)")
_REFERENCE = re.compile(r":func:`~([\w.]+)`")
_ELSEWHERE = re.compile(r"see :func:`~[\w.]+`")


def complete(function: Callable[..., Any], lines: list[str]) -> list[str]:
    """The lines of a docstring, with every keyword described in it; those of ``**options`` with their types."""
    start, end = _arguments(lines)
    types = _options(function) if ("options",) in _entries(lines[start:end]) else {}
    described = [line for names, text in _completed(function, lines[start:end]) for line in _entry(names, text, types)]
    return [*lines[:start], *described, *lines[end:]]


def descriptions(function: Callable[..., Any]) -> dict[str, list[str]]:
    """What the complete docstring says of each keyword."""
    lines = (inspect.getdoc(function) or "").splitlines()
    start, end = _arguments(lines)
    return {name: text for names, text in _completed(function, lines[start:end]) for name in names}


def _arguments(lines: list[str]) -> tuple[int, int]:
    if "Args:" not in lines:
        return 0, 0
    start = lines.index("Args:") + 1
    return start, next((n for n in range(start, len(lines)) if not lines[n].startswith("    ")), len(lines))


def _completed(function: Callable[..., Any], lines: list[str]) -> Iterator[tuple[Names, list[str]]]:
    """Entries that point elsewhere give way to those there; what the function describes itself stays."""
    entries = _entries(lines)
    own = {name for names in entries for name in names}
    for names, text in entries.items():
        said, options = " ".join(text), names == ("options",)
        elsewhere = _described_in(_REFERENCE.findall(said)) if options or _ELSEWHERE.search(said) else {}
        words = [name for name in _options(function) if name not in own] if options else names
        if any(name in elsewhere for name in words):
            yield from (((name,), elsewhere.get(name, text)) for name in words)
        else:
            yield names, text


def _described_in(paths: list[str]) -> dict[str, list[str]]:
    """What several functions say of their keywords; the first has the word."""
    return {name: text for path in reversed(paths) for name, text in descriptions(_imported(path)).items()}


def _entries(lines: list[str]) -> dict[Names, list[str]]:
    entries: dict[Names, list[str]] = {}
    for line in lines:
        if begun := _ENTRY.match(line):
            names = tuple(begun[1].split(", "))
            entries[names] = [line[begun.end() :]]
        else:
            entries[names].append(line.strip())
    return entries


def _entry(names: Names, text: list[str], types: Mapping[str, str]) -> list[str]:
    of_type = f" ({types[names[0]]})" if names[0] in types else ""
    return [f"    {', '.join(names)}{of_type}: {text[0]}", *(f"        {line}" for line in text[1:])]


def _options(function: Callable[..., Any]) -> dict[str, str]:
    """The keywords of ``**options: Unpack[...]``, with their types as they are written; none, where it is anything."""
    function = function.__init__ if inspect.isclass(function) else function
    hint = get_type_hints(function)["options"]
    if get_origin(hint) is not Unpack:
        return {}
    (keywords,) = get_args(hint)
    return {name: getattr(kind, "__forward_arg__", str(kind)) for name, kind in keywords.__annotations__.items()}


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("function", "class"):
        lines[:] = complete(obj, lines)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx; before napoleon reads the entries."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _on_docstring, priority=100)
    return {"parallel_read_safe": True}
