"""Keyword arguments that one call hands on to another: a mistyped one is answered with the nearest."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")
_ELSEWHERE = {
    "data": "data",
    "loader": "data",
    "loss": "loss",
    "criterion": "loss",
    "ratio": "sparsity",
    "input": "example_inputs",
}
"""What words of other libraries have in them, and the word for it here."""


def check_options(call: str, given: Collection[str], known: Collection[str]) -> None:
    """An error for the first word that ``call`` does not take.

    Raises:
        TypeError: naming the nearest word that it does take, or all of them.

    >>> check_options("compare", ["max_memroy"], ["mode", "max_memory"])
    Traceback (most recent call last):
    TypeError: compare does not take max_memroy=: did you mean max_memory=?
    """
    for word in given:
        if word not in known:
            near = _nearest(word, known)
            hint = f"did you mean {near}=?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{call} does not take {word}=: {hint}")


def check_keywords(call: Callable[..., Any], given: Collection[str], options: type | None = None) -> None:
    """:func:`check_options` for a call as its signature has it, and for the typed options that it hands on."""
    own = [p.name for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    check_options(call.__name__, given, [*own, *(options.__annotations__ if options else ())])


def _nearest(word: str, known: Collection[str]) -> str | None:
    """The word that is spelt alike, or that the same thing is called by here."""
    alike = difflib.get_close_matches(word, known, n=1)
    called = [own for part, own in _ELSEWHERE.items() if part in word.lower() and own in known]
    return next(iter([*called, *alike]), None)


def from_options(kind: type[T], options: Mapping[str, Any], **own: Any) -> T:
    """A dataclass from those of the options that are its words, and from words of the caller's own."""
    words = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    return kind(**{word: value for word, value in options.items() if word in words}, **own)
