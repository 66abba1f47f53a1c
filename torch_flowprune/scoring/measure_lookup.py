"""The measure that a word or a function stands for, and what it reads."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Sequence

from torch_flowprune.gradients import INGREDIENTS
from torch_flowprune.scoring.measures import ALIASES, MEASURES, Measure

_ABOUT_LAYERS = ("name", "shape")
"""What a function of a user may ask for besides rows: whose they are."""


def resolve(method: str | Measure) -> Measure:
    """Resolve a measure from its name, an alias or a function.

    Raises:
        ValueError: for an unknown name (the message has the nearest known ones), or for a function with a parameter
            that the flow does not have.
        TypeError: for anything that is neither.

    >>> resolve("snip") is MEASURES["loss_preservation"]
    True
    """
    if isinstance(method, str):
        return _by_name(method)
    if not callable(method):
        raise TypeError(
            f"method should be a measure's name or a function of rows, got {type(method).__name__}: "
            f"{reprlib.repr(method)}"
        )
    unknown = [name for name in asks(method) if name not in (*INGREDIENTS, *_ABOUT_LAYERS)]
    if unknown:
        raise ValueError(
            f"the measure {name_of(method)!r} asks for {', '.join(map(repr, unknown))}; a measure's parameters are "
            f"named after what it reads: {', '.join((*INGREDIENTS, *_ABOUT_LAYERS))} (give any other a default)"
        )
    return method


def measures_by_name(methods: Sequence[str | Measure]) -> dict[str, Measure]:
    """Measures under the names they are asked by.

    Raises:
        ValueError: where two have one name.
    """
    names = [method if isinstance(method, str) else name_of(method) for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(
            f"scores come back by name, and these are asked for: {', '.join(names)}; name each once, and give each "
            "function a __name__ of its own"
        )
    return dict(zip(names, map(resolve, methods), strict=True))


def needs(method: str | Measure) -> tuple[str, ...]:
    """What a measure reads, in the order of its parameters.

    >>> needs("gradient_norm_preservation")
    ('theta', 'Hg')
    """
    return tuple(name for name in asks(resolve(method)) if name not in _ABOUT_LAYERS)


def name_of(measure: str | Measure) -> str:
    """A measure's own name: aliases resolved, a function's ``__name__``.

    >>> name_of("grasp")
    'gradient_norm_increase'
    """
    if isinstance(measure, str):
        return ALIASES.get(measure, measure)
    return getattr(measure, "__name__", type(measure).__name__)


def _by_name(name: str) -> Measure:
    known = ALIASES.get(name, name)
    if known in MEASURES:
        return MEASURES[known]
    names = [*MEASURES, *ALIASES]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"unknown measure {name!r}{hint} Known: {', '.join(names)}; or pass a function of rows")


def asks(measure: Measure) -> tuple[str, ...]:
    """The parameters a measure must be given: those without a default, and known ones with one."""
    parameters = inspect.signature(measure).parameters.values()
    positional = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(p.name for p in positional if p.default is p.empty or p.name in INGREDIENTS)
