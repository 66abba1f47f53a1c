"""Which numbers of a class make tensors of given shapes: found by building, not by name.

A number is first told by what becomes of the tensors when it is doubled. One that is left open (``n_inner=None``), or
that the class asks for and its config does not have (``head_dim``), is given the value with which nothing changes. Then
those are scaled whose tensors' axes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import islice, product
from math import inf, nextafter
from typing import TypeAlias

from torch_flowprune.channels.construction.constructors import Constructor, Shapes

Axis: TypeAlias = tuple[str, int]
Number: TypeAlias = int | float

_MOST_BUILT = 256
_IN_VAIN = 2
"""After so many values that change nothing, a number that is left open is none that sizes follow."""


@lru_cache(maxsize=8)
def fitted_numbers_of(constructor: Constructor) -> FittedNumbers:
    """Those of an equal constructor, where it was asked before: each shape that was built is remembered."""
    return FittedNumbers(constructor)


class FittedNumbers:
    """The numbers of a constructor, and the sizes that follow each."""

    def __init__(self, constructor: Constructor) -> None:
        self.constructor = constructor

    @cached_property
    def dense(self) -> Shapes:
        """With the numbers as they are; nothing, where the class cannot be built so."""
        return self.constructor.shapes({}) or {}

    @cached_property
    def explicit(self) -> dict[str, Number]:
        """What is left open, said as it is."""
        named = [name for name, value in self.constructor.numbers.items() if value is None]
        found = {name: self._said(name) for name in (*named, *self.constructor.read_besides())}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def values(self) -> dict[str, Number]:
        """All numbers that some size follows."""
        return {name: value for name, value in self._all.items() if self.following(name)}

    @cached_property
    def _all(self) -> dict[str, Number]:
        given = {name: value for name, value in self.constructor.numbers.items() if value is not None}
        return {**given, **self.explicit}

    def following(self, name: str) -> frozenset[Axis]:
        """The axes that change with a number alone."""
        return self._following[name]

    @cached_property
    def _following(self) -> dict[str, frozenset[Axis]]:
        return {name: self._changed_with(name, value) for name, value in self._all.items()}

    def _changed_with(self, name: str, value: Number) -> frozenset[Axis]:
        tries = [value * 2, value * 3] if type(value) is float else [value * 2, value * 3, value // 2, value + 1]
        for other in tries:
            shapes = self._shapes({name: other}) if other else None
            if shapes is not None:
                return frozenset(_changed_axes(self.dense, shapes))
        return frozenset()

    def fits(self, wanted: Shapes) -> Iterator[dict[str, Number]]:
        """Numbers with which the class has these shapes, those that change fewest first."""
        changed = _changed_axes(self.dense, wanted)
        if changed is None or not self.dense:
            return
        names = [name for name in self.values if self.following(name) & changed.keys()]
        options = [self._options(name, changed, names) for name in names]
        tried = sorted(islice(product(*options), _MOST_BUILT), key=lambda values: self._cost(names, values))
        for values in tried:
            numbers = {name: value for name, value in zip(names, values, strict=True) if value != self.values[name]}
            if self._shapes(numbers) == wanted:
                yield self._without_idle(numbers, wanted)

    def _cost(self, names: list[str], values: tuple[Number, ...]) -> int:
        return sum(value != self.values[name] for name, value in zip(names, values, strict=True))

    def _options(self, name: str, changed: Mapping[Axis, Fraction], names: list[str]) -> list[Number]:
        """As it is, where something else may be why its axes changed; and scaled as any of these is."""
        value, own = self.values[name], self.following(name) & changed.keys()
        made = list(dict.fromkeys(_scaled(value, changed[axis]) for axis in sorted(own)))
        others = frozenset[Axis]().union(*(self.following(other) for other in names if other != name))
        return made if made and own - others else [value, *made]

    def _without_idle(self, numbers: dict[str, Number], wanted: Shapes) -> dict[str, Number]:
        """What was left open is left so, where it comes to the same."""
        said = {**self._given, **numbers}
        for name in self._given:
            less = {other: value for other, value in said.items() if other != name}
            if name not in numbers and self.constructor.shapes(less) == wanted:
                said = less
        return said

    def _shapes(self, numbers: Mapping[str, Number]) -> Shapes | None:
        return self.constructor.shapes({**self._given, **numbers})

    @property
    def _given(self) -> dict[str, Number]:
        given: dict[str, Number] = self.__dict__.get("explicit", {})
        return given

    def _said(self, name: str) -> Number | None:
        """The value of a number that is left open: with it nothing changes, with its double something does."""
        in_vain = 0
        for value in self._candidates:
            shapes = self.constructor.shapes({name: value})
            if shapes is None or shapes == self.dense:
                if shapes is not None and self.constructor.shapes({name: 2 * value}) not in (None, self.dense):
                    return value
                in_vain += 1
            if in_vain >= _IN_VAIN:
                return None
        return None

    @cached_property
    def _candidates(self) -> list[int]:
        """Sizes that tensors have, and what these are in shares of a number."""
        lengths = sorted({size for shape in self.dense.values() for size in shape if size > 1}, reverse=True)
        whole = [n for n in self.constructor.numbers.values() if type(n) is int and n > 1]
        shares = [size // n for size in lengths for n in whole if size % n == 0 and size > n]
        return list(dict.fromkeys([*lengths, *shares]))


def _changed_axes(before: Shapes, after: Shapes) -> dict[Axis, Fraction]:
    """The axes that differ, and as what share of their size; nothing, where there are other tensors."""
    if before.keys() != after.keys() or any(len(before[name]) != len(shape) for name, shape in after.items()):
        return {}
    return {
        (name, axis): Fraction(new, old)
        for name, shape in after.items()
        for axis, (old, new) in enumerate(zip(before[name], shape, strict=True))
        if new != old
    }


def _scaled(value: Number, ratio: Fraction) -> Number:
    """A share of a number: whole where that is, else no less, as sizes are what such a ratio comes to, cut off.

    >>> _scaled(8, Fraction(3, 4)), _scaled(4, Fraction(5, 8))
    (6, 2.5)
    """
    made = Fraction(value) * ratio
    if type(value) is int and made.denominator == 1:
        return int(made)
    return float(made) if Fraction(float(made)) >= made else nextafter(float(made), inf)
