"""What stands where a module of a removed branch was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.shrinking.graphs import graft

Argument = int | str
"""Of a call: by its position, or its keyword."""


@dataclass(frozen=True)
class StandInSpec:
    """What is known of a module that is no more, as JSON takes it.

    Attributes:
        reads: the argument whose tensor is handed on, or whose sizes zeros have.
        sizes: for zeros, the axes (negative, from the last) that have sizes of their own; None: it is handed on.
        gives: what the module gave, where that was a tuple or a list: ``"value"``, None, or an argument for each part.
        as_list: whether it was a list.
        names: of the arguments that its class takes by position.
    """

    reads: Argument
    sizes: Mapping[int, int] | None = None
    gives: tuple[Argument | None, ...] | None = None
    as_list: bool = False
    names: tuple[str, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether it takes one tensor, and hands it on."""
        return len(self.names) == 1 and self.reads == 0 and self.sizes is None and self.gives is None

    def to_dict(self) -> dict[str, Any]:
        words = asdict(self)
        sizes = None if self.sizes is None else [[axis, size] for axis, size in self.sizes.items()]
        return {**words, "sizes": sizes, "gives": self.gives and [*self.gives], "names": [*self.names]}

    def argument(self, which: Argument, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Of a call, by position or by keyword, whichever way it is given; None where it is not."""
        at = which if isinstance(which, int) else self.names.index(which) if which in self.names else len(args)
        name = which if isinstance(which, str) else self.names[which] if which < len(self.names) else ""
        return args[at] if at < len(args) else kwargs.get(name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StandInSpec:
        """Of :meth:`to_dict`, from JSON or not.

        Raises:
            ValueError: for anything else.
        """
        try:
            sizes = None if data["sizes"] is None else {int(axis): int(size) for axis, size in data["sizes"]}
            gives = None if data["gives"] is None else tuple(data["gives"])
            return cls(data["reads"], sizes, gives, bool(data["as_list"]), tuple(data["names"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"a description should say what stands in a module's place as fp.describe does: got {data!r}"
            ) from error


HANDED_ON = StandInSpec(0, names=("input",))
"""Of an ``nn.Identity``."""

VALUE = "\0value"
"""Stands for the tensor itself in what a module gives; no argument is called so."""


class StandIn(nn.Module):
    """Stands in for a module of a removed branch: returns one of its inputs, or zeros, in the form of the original.

    :func:`~torch_flowprune.shrink` puts it there; you need not make one.
    """

    def __init__(self, standing: StandInSpec) -> None:
        super().__init__()
        self.standing = standing.to_dict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The input that the branch would add to, or zeros, for any call that the original takes."""
        standing = StandInSpec.from_dict(self.standing)
        value = standing.argument(standing.reads, args, kwargs)
        if standing.sizes is not None:
            value = _zeros_of_shape(value, standing.sizes)
        if standing.gives is None:
            return value
        parts = [
            value if one == VALUE else None if one is None else standing.argument(one, args, kwargs)
            for one in standing.gives
        ]
        return parts if standing.as_list else tuple(parts)

    def extra_repr(self) -> str:
        """Whether it hands on an input, or returns zeros."""
        return "hands on" if self.standing["sizes"] is None else "zeros"


def _zeros_of_shape(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    shape = list(tensor.shape)
    for axis, size in sizes.items():
        shape[axis] = size
    return tensor.new_zeros(shape)


def _stand_in_for(module: nn.Module, standing: StandInSpec) -> nn.Module:
    """With the plain attributes of the module, which code around it may read."""
    made = nn.Identity() if standing.is_identity else StandIn(standing)
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(made) and isinstance(value, (bool, int, float, str)):
            setattr(made, name, value)
    return made.train(module.training)


def with_stand_ins(model: nn.Module, standings: Mapping[str, StandInSpec]) -> nn.Module:
    """The model, with these in the places of modules, path -> what is known of them."""
    for path, standing in standings.items():
        model = graft(model, path, _stand_in_for(model.get_submodule(path), standing))
    return model
