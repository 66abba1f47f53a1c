"""Whatever knew a model before it was shrunk knows the smaller one after, or nothing is changed.

What can be refused is worked out first, from the old model and the surgery alone: the state of every optimizer, cut as
its parameters are. Then the smaller model takes over: gradients and attributes of its parameters, optimizers, the zeros
that they hold, and pruners.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_flowprune.channels.shrinking.handing_over.optimizer_state import check_nothing_beside, cut_state
from torch_flowprune.channels.shrinking.surgery import Surgery
from torch_flowprune.inputs import parameters_of, unwrapped
from torch_flowprune.masking import held_by, holders
from torch_flowprune.torch_internals import HOOKS_OF_TENSORS, forget_flat_size

Optimizers: TypeAlias = Optimizer | Iterable[Optimizer]

_LEFT_BEHIND: WeakSet[nn.Module] = WeakSet()


def is_left_behind(model: nn.Module) -> bool:
    """Whether an optimizer of this model went on with a smaller one: its parameters train no more."""
    return model in _LEFT_BEHIND


class Follower(Protocol):
    """What goes on with the smaller model, and averages of it, such as a :class:`~torch_flowprune.Pruner`."""

    averages: list[Any]

    def following(self, model: nn.Module, surgery: Surgery) -> Callable[[nn.Module], None]:
        """An error if it cannot; else the function to call with the smaller model. Nothing is changed yet."""


@dataclass(frozen=True)
class Handover:
    """What is to be handed on to a smaller model.

    Attributes:
        model: the one before.
        before: its parameters by name.
        surgery: what is cut from them.
        optimizers: theirs, those inside others too.
        states: of each parameter in them, the state after the cut.
        go_on: what makes a pruner go on with the smaller model.
    """

    model: nn.Module
    before: Mapping[str, nn.Parameter]
    surgery: Surgery
    optimizers: Sequence[Optimizer]
    states: Mapping[tuple[int, str], Any]
    go_on: Callable[[nn.Module], None] | None

    @classmethod
    def planned(
        cls, model: nn.Module, surgery: Surgery, optimizer: Optimizers | None, pruner: Follower | None
    ) -> Handover:
        """Everything that may be refused, without a change.

        Raises:
            ShrinkError: for an optimizer's state that cannot be cut.
            ValueError: for an optimizer, or a pruner, of another model.
        """
        before = _parameters_inside(model)
        optimizers = [] if optimizer is None else list(_with_inner(_listed(optimizer)))
        names = {parameter: name for name, parameter in before.items()}
        for one in optimizers:
            _check_is_its_model(one, names)
        states = {
            (id(one), name): cut_state(one, parameter, names, surgery)
            for one in optimizers
            for name, parameter in before.items()
            if parameter in one.state
        }
        for one in optimizers:
            check_nothing_beside(one, names, surgery)
        go_on = None if pruner is None else pruner.following(unwrapped(model), surgery)
        if optimizers:
            _warn_untrained(before, optimizers)
        return cls(model, before, surgery, optimizers, states, go_on)

    def warn_left_behind(self) -> None:
        """An optimizer whose zeros are held, and which was not given, goes on with parameters that nothing reads."""
        if left := holders(unwrapped(self.model)) - set(self.optimizers):
            warnings.warn(
                f"keep_zeros holds zeros of this model for {len(left)} optimizer(s) that shrink was not given: each "
                "keeps the old parameters, and trains nothing; pass all of them, optimizer=",
                UserWarning,
                stacklevel=3,
            )

    def to(self, small: nn.Module) -> None:
        """The smaller model takes over."""
        after = _parameters_inside(small)
        for name, old in self.before.items():
            if name in after and after[name] is not old:
                self._mark(name, old, after[name])
                _wait_on(old, after[name], shared=bool(self.optimizers) or small is self.model)
        for optimizer in self.optimizers:
            self._train(optimizer, after, small)
        if self.go_on is not None:
            self.go_on(small)
        if self.optimizers and small is not self.model:
            _LEFT_BEHIND.add(unwrapped(self.model))

    def _mark(self, name: str, old: nn.Parameter, new: nn.Parameter) -> None:
        """The gradient, and what users and optimizers keep in attributes of a parameter."""

        def cut(value: Any) -> Any:
            alike = isinstance(value, Tensor) and value.shape == old.shape
            return self.surgery.cut(name, value.detach()).clone() if alike else value

        new.grad = cut(old.grad)
        vars(new).update({key: cut(value) for key, value in vars(old).items()})

    def _train(self, optimizer: Optimizer, after: Mapping[str, nn.Parameter], small: nn.Module) -> None:
        """New parameters in the groups themselves, which schedulers and LBFGS hold; those that are gone drop out."""
        names = {parameter: name for name, parameter in self.before.items()}
        heirs = {parameter: after.get(name) for parameter, name in names.items()}
        for group in optimizer.param_groups:
            _go_on_in(group, heirs)
        for parameter in [one for one in optimizer.state if one in names]:
            optimizer.state.pop(parameter)
        for name, new in after.items():
            if (id(optimizer), name) in self.states:
                optimizer.state[new] = self.states[id(optimizer), name]
        forget_flat_size(optimizer)
        for memory in held_by(optimizer, unwrapped(self.model)):
            cut = {name: self.surgery.cut(name, mask) for name, mask in memory.latest.items() if name in after}
            memory.follow(unwrapped(small), cut)


def _go_on_in(group: dict[str, Any], heirs: Mapping[nn.Parameter, nn.Parameter | None]) -> None:
    """A group of an optimizer holds the heirs of its parameters (None: there is none), and has a name for each."""
    left = [heirs.get(one, one) for one in group["params"]]
    if "param_names" in group:
        told = zip(group["param_names"], left, strict=True)
        group["param_names"][:] = [name for name, one in told if one is not None]
    group["params"][:] = [one for one in left if one is not None]


def _wait_on(old: nn.Parameter, new: nn.Parameter, *, shared: bool) -> None:
    """Hooks wait for the gradient of the new parameter. Where the old one trains no more, handles take off both."""
    for kind in HOOKS_OF_TENSORS:
        if hooks := getattr(old, kind):
            setattr(new, kind, hooks if shared else hooks.copy())


def _parameters_inside(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: target.parameter for name, target in parameters_of(unwrapped(model)).items()}


def _listed(optimizer: Optimizers) -> list[Optimizer]:
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer should be a torch.optim.Optimizer or several of them, got {one!r}")
    return given


def _with_inner(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """And the optimizers that wrappers drive, before their wrappers."""
    for one in optimizers:
        yield from _with_inner(value for value in vars(one).values() if isinstance(value, Optimizer))
        yield one


def _held(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _check_is_its_model(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    if not any(parameter in names for parameter in _held(optimizer)):
        raise ValueError(
            f"optimizer= has a {type(optimizer).__name__} without any parameter of this model: it trains another, such "
            "as the model before an earlier shrink"
        )


def _warn_untrained(before: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    trained = {id(parameter) for one in optimizers for parameter in _held(one)}
    if left_out := [name for name, one in before.items() if one.requires_grad and id(one) not in trained]:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(
            f"no optimizer given to shrink trains {', '.join(left_out[:5])}{more}: pass all of them, optimizer=[one, "
            "other], or the one left out keeps the old parameters",
            UserWarning,
            stacklevel=4,
        )
