"""Pruning inside a training loop: one object that knows the model, the measure, the schedule and the round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torch_flowprune.gradients import Flow, FlowSource, LossOptions, flow_over
from torch_flowprune.inputs import Batch, check_options, from_options, unwrapped, wide
from torch_flowprune.masking import averaged_model, sync_masks
from torch_flowprune.pruning.report import Report
from torch_flowprune.pruning.route import prune
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    PrunableUnits,
    Scores,
    UnitOptions,
    evaluate,
    label,
    measures,
    targets_of,
)
from torch_flowprune.selection import Allocation, AllocationOptions, Goal, Schedule, fraction, gone_share, steps

_FROM_BACKWARD = {"theta", "theta0", "g", "g2", "generator"}


class PrunerOptions(LossOptions, UnitOptions, AllocationOptions, total=False):
    """What :class:`Pruner` takes besides its own words; :func:`~torch_flowprune.global_prune` describes each."""

    example_inputs: Any


class Pruner:
    """Prune a model round by round while it trains.

    Call :meth:`step` where a round ends: it prunes to the schedule's next sparsity, by scores taken over ``data``. Or
    call :meth:`track` after each ``loss.backward()``: the scores are then an exponential average over the minibatches
    since the last round, and cost no sweep. Everything that makes a run resumable is in :meth:`state_dict` (the masks
    are in the model's own).

    Args:
        model: the model that trains.
        method: a measure's name or function.
        sparsity: the sparsity after the last round.
        rounds: how many rounds.
        schedule: a schedule's name, a function of ``(rounds, start, target)``, or the sparsities themselves, one a
            round.
        alpha: the weight of the newest minibatch in the average; the paper's code has 0.8.
        theta0: the reference point, for measures that read it; the parameters as they are now if left out.
        generator: the source of randomness for ``random``.
        averages: averages of the model (EMA, SWA), brought in step with its masks after each round as
            :func:`~torch_flowprune.sync_masks` does; one made later may be appended to ``pruner.averages``.
        options: further arguments of :func:`~torch_flowprune.global_prune` (``granularity``, ``loss``, ``min_keep``,
            ...).

    Raises:
        ValueError, TypeError: for bad arguments, at once and not in the first round.

    Source: the training protocol of Lubana & Dick 2021 (their ``track_importance`` works for some measures only; this
    for all).

    >>> import torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> pruner = fp.Pruner(model, "loss_preservation", sparsity=0.75, rounds=2)
    >>> for _ in range(2):
    ...     model(torch.ones(3, 4)).square().sum().backward()
    ...     pruner.track()
    ...     report = pruner.step()
    >>> pruner.done, report.sparsity
    (True, 0.75)
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Measure = "magnitude",
        sparsity: float | None = None,
        *,
        rounds: int | None = None,
        schedule: str | Schedule | Sequence[float] = "exponential",
        alpha: float = 0.8,
        theta0: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        averages: Iterable[Any] = (),
        **options: Unpack[PrunerOptions],
    ) -> None:
        check_options("Pruner", options, PrunerOptions.__annotations__)
        self.model, self.method, self.measure = model, method, measures.resolve(method)
        self.alpha, self.generator = fraction(alpha, "alpha"), generator
        self.averages = list(averages)
        self._check_averages()
        if theta0 is None and "theta0" in measures.needs(self.measure):
            theta0 = _copy(unwrapped(model).state_dict())
        self.source = from_options(FlowSource, options, theta0=theta0)
        self.units = from_options(PrunableUnits, options)
        self.allocation = from_options(Allocation, options)
        self.round = 0
        self.tracked: dict[str, Tensor] = {}
        self.goals = _goals(sparsity, rounds, schedule, start=gone_share(self._candidates(), self.allocation.cost))

    @property
    def done(self) -> bool:
        """Whether every round has been pruned."""
        return self.round == len(self.goals)

    @property
    def next_sparsity(self) -> float:
        """What the next :meth:`step` prunes to.

        Raises:
            ValueError: when all rounds are done.
        """
        if self.done:
            raise ValueError(f"all {len(self.goals)} rounds are done: the model is at sparsity {self.goals[-1]:g}")
        return self.goals[self.round]

    def track(self, batch: Batch = None) -> None:
        """Take one minibatch into the average.

        Without ``batch`` after ``loss.backward()``: reads the parameters and their ``.grad`` (unscale it first if a
        ``GradScaler`` is in use). With ``batch`` the flow is taken over it, which any measure allows; those that read
        Hg need it.

        A minibatch whose gradients are not finite is left out: it is the overflow that a ``GradScaler`` skips too. A
        layer without a gradient was not used in the batch, and counts with zeros.

        Raises:
            ValueError: if no gradient is there at all, or the measure needs a batch.
        """
        found = self._candidates()
        if batch is None and self._reads_gradients() and _overflown(found):
            return
        scores = evaluate(self._point(found, batch), self.measure, found, self.units.granularity, self.generator)
        for name, score in scores.items():
            old = self.tracked.get(name)
            self.tracked[name] = score * self.alpha if old is None else torch.lerp(old, score, self.alpha)

    def step(self, data: object = None) -> Report:
        """Prune to the next sparsity by what was tracked, or else by scores over ``data``.

        Raises:
            ValueError: when all rounds are done, or there is nothing to score from.
        """
        goal = Goal(self.next_sparsity)
        self._check_averages()
        tracked = None
        if self.tracked and data is None:
            tracked = Scores(self.tracked, measures.name_of(self.method), label(self.units.granularity))
        source = replace(self.source, data=data)
        report = prune(self.model, self.measure, source, self.units, goal, self.allocation, tracked, self.generator)
        sync_masks(self.model, *self.averages)
        self.tracked = {}
        self.round += 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """The round, the tracked average, the reference point and the generator's state: plain values and tensors."""
        source = None if self.generator is None else self.generator.get_state()
        method = measures.name_of(self.method)
        state = {"method": method, "round": self.round, "goals": list(self.goals), "tracked": dict(self.tracked)}
        return {**state, "theta0": self.source.theta0, "generator": source}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if it is of another schedule or another measure.
        """
        own = measures.name_of(self.method)
        if state.get("method", own) != own:
            raise ValueError(f"this state is of a pruner by {state['method']}, and this one prunes by {own}")
        goals = tuple(state["goals"])
        if len(goals) != len(self.goals) or goals[-1] != self.goals[-1]:
            raise ValueError(
                f"this state is of a pruner with sparsities {list(goals)}, and this one has {list(self.goals)}"
            )
        self.goals = goals  # those between were counted from where that run began
        self.round, self.tracked = state["round"], dict(state["tracked"])
        self.source = replace(self.source, theta0=state["theta0"])
        if self.generator is not None and state.get("generator") is not None:
            self.generator.set_state(state["generator"].cpu())

    def _check_averages(self) -> None:
        """Before anything is pruned: an average of another model would be met with the model pruned."""
        for average in self.averages:
            averaged_model(self.model, average)

    def _candidates(self) -> Candidates:
        return self.units.of(unwrapped(self.model), self.source)

    def _point(self, found: Candidates, batch: Batch) -> Flow:
        needs = measures.needs(self.measure)
        if batch is not None:
            return flow_over(replace(self.source, data=batch), self.model, needs, targets_of(found))
        if beyond := set(needs) - _FROM_BACKWARD:
            raise ValueError(
                f"{measures.name_of(self.method)!r} reads {', '.join(sorted(beyond))}, which .grad does not hold: "
                "call track(batch)"
            )
        point = flow_over(self.source, self.model, (), targets_of(found))
        return _with_gradients(point, found) if self._reads_gradients() else point

    def _reads_gradients(self) -> bool:
        return not {"g", "g2"}.isdisjoint(measures.needs(self.measure))


def _with_gradients(point: Flow, found: Candidates) -> Flow:
    """The flow at one minibatch, with g read from ``.grad``; zeros where a layer was not used."""
    parameters = {name: target.parameter for name, target in targets_of(found).items()}
    if all(parameter.grad is None for parameter in parameters.values()):
        raise ValueError(
            f".grad of {', '.join(list(parameters)[:5])} is None: call track() after loss.backward() and before "
            "zero_grad()"
        )
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}
    g = {name: wide(grad.detach()) for name, grad in grads.items()}
    return Flow(theta=point.theta, theta0=point.theta0, g=g, g2={name: value.square() for name, value in g.items()})


def _overflown(found: Candidates) -> bool:
    """Whether some gradient is not finite; asked of the devices once."""
    grads = [target.parameter.grad for target in targets_of(found).values() if target.parameter.grad is not None]
    finite = [grad.detach().isfinite().all() for grad in grads]
    return bool(finite) and not torch.stack([flag.to(finite[0].device) for flag in finite]).all()


def _goals(
    sparsity: float | None, rounds: int | None, schedule: str | Schedule | Sequence[float], start: float
) -> tuple[float, ...]:
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        goals = [fraction(value) for value in schedule]
        if not goals or sorted(goals) != goals or sparsity not in (None, goals[-1]) or rounds not in (None, len(goals)):
            raise ValueError(
                f"schedule={list(schedule)} should be rising sparsities, one a round, the last of them sparsity= "
                "where that is given"
            )
        return tuple(goals)
    if sparsity is None:
        raise ValueError("give sparsity=, the share of all prunable units that is gone after the last round")
    return tuple(steps(schedule, 1 if rounds is None else rounds, start, fraction(sparsity)))


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
