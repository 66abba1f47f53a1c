"""Pruning inside a training loop: one object that knows the model, the measure, the schedule and the round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torch_flowprune.channels import Coupling, Surgery
from torch_flowprune.gradients import Flow, FlowSource, LossOptions, flow_over, point_of
from torch_flowprune.inputs import Batch, HeldUnits, OneBatch, from_options, unwrapped
from torch_flowprune.masking import averaged_model, sync_masks
from torch_flowprune.pruning.reports import Report
from torch_flowprune.pruning.route import GivenScores, prune, scored_units
from torch_flowprune.pruning.training import pruner_state
from torch_flowprune.pruning.training.backward_gradients import BackwardGradients, overflown
from torch_flowprune.pruning.training.last_seen import LastSeen
from torch_flowprune.pruning.training.pruner_checks import (
    check_can_follow,
    check_is_known,
    check_kind,
    check_pruner_words,
    check_scores,
    copied_state,
    weight_of_newest,
)
from torch_flowprune.pruning.training.rounds import Rounds
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    Origin,
    PrunableUnits,
    Scores,
    UnitOptions,
    counted_from,
    evaluate,
    label,
    measure_lookup,
    targets_of,
)
from torch_flowprune.selection import Allocation, AllocationOptions, Goal, Schedule

_FROM_BACKWARD = {"theta", "theta0", "g", "g2", "generator"}


class PrunerOptions(LossOptions, UnitOptions, AllocationOptions, total=False):
    """What :class:`Pruner` takes besides its own words; :func:`~torch_flowprune.global_prune` describes each."""

    example_inputs: Any


class Pruner:
    """Prune a model round by round while it trains.

    Call :meth:`step` at the end of each round: it prunes to the schedule's next sparsity, by scores over ``data``. Or
    call :meth:`track` after each ``loss.backward()``: the scores are then an exponential average over the minibatches
    since the last round, and need no pass over data. :meth:`state_dict` holds everything that is needed to resume,
    except for the masks, which are in the model's own state dict. Between rounds, :func:`~torch_flowprune.shrink` can
    make the model smaller: pass it ``pruner=``, and the pruner continues with the smaller model. Its sparsities stay
    fractions of the model that it began with.

    Args:
        model: the model that trains.
        method: a measure's name or function.
        sparsity: the sparsity after the last round, of all units that the model has when the pruner is made.
        amount: instead of ``sparsity``, what every round prunes of the units that are left: a fraction (float) or a
            number (int).
        rounds: how many rounds.
        schedule: a schedule's name, a function of ``(rounds, start, target)``, or a list of sparsities, one per round.
        alpha: the weight of the newest minibatch in the average, above 0; the paper's code has 0.8. The average is
            corrected for its start: after one minibatch it equals that minibatch's scores.
        theta0: the reference point, for measures that read it; the current parameters if left out.
        generator: the random generator for ``random``.
        averages: averages of the model (EMA, SWA), which get its masks after each round, as by
            :func:`~torch_flowprune.sync_masks`. Append averages that are made later to ``pruner.averages``.
        scores: scores computed earlier, for rounds without tracked gradients and without data.
        options: further arguments of :func:`~torch_flowprune.global_prune` (``granularity``, ``loss``, ``min_keep``,
            ...).

    Raises:
        ValueError, TypeError: at once, for bad arguments and a sparsity that cannot be reached. (Channels without
            ``example_inputs`` or ``coupling`` are known only with the first data.)

    Source: the training protocol of Lubana & Dick 2021, whose ``track_importance`` supports only some measures.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes in one call.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
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
        amount: float | None = None,
        rounds: int | None = None,
        schedule: str | Schedule | Sequence[float] = "exponential",
        alpha: float = 0.8,
        theta0: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        averages: Iterable[Any] = (),
        scores: GivenScores | None = None,
        **options: Unpack[PrunerOptions],
    ) -> None:
        check_pruner_words(Pruner, options, PrunerOptions)
        self.model, self.method, self.measure = model, method, measure_lookup.resolve(method)
        self._reads_gradients = bool({"g", "g2"} & set(measure_lookup.needs(self.measure)))
        self.alpha, self.generator = weight_of_newest(alpha), generator
        check_kind(generator)
        self.averages = list(averages)
        self._check_averages()
        if theta0 is None and "theta0" in measure_lookup.needs(self.measure):
            theta0 = copied_state(unwrapped(model))
        self.source = from_options(FlowSource, options, theta0=theta0)
        own = {"granularity": scores.granularity} if isinstance(scores, Scores) else {}
        self.scores, self.units = scores, from_options(PrunableUnits, {**own, **options})
        self.units = scored_units(unwrapped(model), self.units, scores)
        self.allocation = from_options(Allocation, options)
        self.asked = Rounds(sparsity, amount, rounds, schedule)
        self.round, self.minibatches, self.tracked = 0, 0, dict[str, Tensor]()
        self.goals: tuple[float, ...] = ()
        self._held: dict[str, HeldUnits] = {}
        self._origins: dict[str, Origin] = {}
        self._layers = self.units.layers(unwrapped(model))
        self._gradients, self._seen = BackwardGradients(), LastSeen()
        if not self.units.are_read or self.units.coupling or self.source.example_inputs is not None:
            check_scores(scores, self._candidates(), self.units.granularity)  # else the first data show the channels

    @property
    def done(self) -> bool:
        """Whether every round has been pruned."""
        return self.round == self.asked.count

    @property
    def next_sparsity(self) -> float:
        """The sparsity that the next :meth:`step` prunes to.

        Raises:
            ValueError: when all rounds are done, or before the first data if only data can show what is prunable.
        """
        if not self.goals:
            raise ValueError(
                "channels are found with an example input, and none is known yet: pass example_inputs= or coupling="
            )
        if self.done:
            raise ValueError(f"all {len(self.goals)} rounds are done: the model is at sparsity {self.goals[-1]:g}")
        return self.goals[self.round]

    def track(self, batch: Batch = None) -> None:
        """Add one minibatch to the average of scores.

        Without ``batch``, call it after ``loss.backward()``: it reads the parameters and their ``.grad`` (with a
        ``GradScaler``, unscale the gradients first). With ``batch``, the flow over this batch is computed, which works
        for every measure; measures that read Hg need it.

        A minibatch with gradients that are not finite is skipped, as a ``GradScaler`` skips it. A layer without a
        gradient was not used in the batch, and counts as zero.

        Raises:
            ValueError: if there are no gradients or all were tracked before, if the measure needs a batch, or if the
                model is not the one that the pruner knows.
        """
        found = self._seen.of(unwrapped(self.model), lambda: self._candidates(batch))
        if batch is None and self._reads_gradients and overflown(found):
            return
        scores = evaluate(self._point(found, batch), self.measure, found, self.units.granularity, self.generator)
        self.minibatches += 1
        weight = self.alpha / (1 - (1 - self.alpha) ** self.minibatches)  # an average from the first minibatch on
        for name, score in scores.items():
            old = self.tracked.get(name)
            self.tracked[name] = score if old is None else torch.lerp(old, score, weight)

    def step(self, data: object = None) -> Report:
        """Prune to the next sparsity, by scores over ``data``, else by the tracked scores, else by ``scores``.

        Raises:
            ValueError: when all rounds are done, if there is nothing to score from, or if the model is not the one that
                the pruner knows.
        """
        found = self._candidates(data)
        self._check_averages()
        begun = self.goals[self.round - 1] if self.round else None
        goal, by = Goal(self.next_sparsity, final=self.goals[-1], begun=begun), self.scores if data is None else None
        if self.tracked and data is None:
            by = Scores(self.tracked, measure_lookup.name_of(self.method), label(self.units.granularity))
        source = replace(self.source, data=data)
        report = prune(self.model, self.measure, source, self.units, goal, self.allocation, by, self.generator, found)
        sync_masks(self.model, *self.averages)
        self.tracked, self.minibatches = {}, 0
        self.round += 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume, except for the masks, as plain values and tensors.

        The settings, the tracked scores, the round, the reference point, the generator's state, and what was shrunk.
        With a sharded model, call it on every rank.
        """
        return {
            "method": measure_lookup.name_of(self.method),
            "granularity": label(self.units.granularity),
            "asked": self.asked.to_dict(),
            "round": self.round,
            "goals": list(self.goals),
            "layers": {name: origin.to_dict() for name, origin in self._origins.items()},
            "coupling": pruner_state.coupling_to_save(self.units.coupling, self._origins),
            "costs": pruner_state.costs_to_save(self._origins),
            "tracked": pruner_state.of_all_ranks(self.tracked, self._held),
            "minibatches": self.minibatches,
            "theta0": self.source.theta0,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            ValueError: if the state is of another measure, granularity, schedule, set of layers or version, or of a
                round that this pruner does not have. The pruner is then unchanged.
        """
        words = measure_lookup.name_of(self.method), label(self.units.granularity), self.asked
        pruner_state.check_words(state, *words, random=self.generator is not None)
        origins = pruner_state.saved_origins(state, self._origins, self.allocation.targets)
        if state["coupling"] is not None:
            self.units = replace(self.units, coupling=Coupling.from_dict(state["coupling"]))
        self._origins, self.goals = origins, tuple(state["goals"])  # counted from where that run began
        self._seen.forget()
        self.round, self.minibatches = state["round"], state["minibatches"]
        self.tracked = pruner_state.of_this_rank(state["tracked"], self._held)
        self.source = replace(self.source, theta0=state["theta0"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())

    def _check_averages(self) -> None:
        """Before anything is pruned: an average of another model would be met with the model pruned."""
        for average in self.averages:
            averaged_model(self.model, average)

    def following(self, model: nn.Module, surgery: Surgery) -> Callable[[nn.Module], None]:
        """What makes this pruner continue with a smaller model: :func:`~torch_flowprune.shrink` calls it.

        Raises:
            ValueError: if it is a pruner of another model, or its units do not survive in the smaller model.
        """
        check_can_follow(self.model, model, self.scores)
        found = {name: getattr(one, "left", one) for name, one in self._candidates().items()} if self._origins else {}
        origins = {name: self._origins[name].after(one, surgery) for name, one in found.items()}
        coupling = None if self.units.coupling is None else surgery.coupling(self.units.coupling)
        picked = list(self._layers)
        theta0 = None if self.source.theta0 is None else surgery.cut_all(self.source.theta0)

        def go_on(small: nn.Module) -> None:
            self.model, self._origins = small, origins
            self.units = replace(self.units.on(unwrapped(small), picked), coupling=coupling)
            self.source = replace(self.source, theta0=theta0)
            self._layers = self.units.layers(unwrapped(small))
            self._seen.forget()

        return go_on

    def _candidates(self, data: object = None) -> Candidates:
        """Those of the model as it is, which has to be the one that is known, counted as they were."""
        inner = unwrapped(self.model)
        check_is_known(inner, self.units, self._layers)
        self.units = self.units.read(inner, self.source if data is None else replace(self.source, data=data))
        found = self.units.of(inner, self.source, shards=True)
        self._held = {name: one.shard for name, one in found.items() if one.shard is not None}
        if not self._origins:
            self.goals = self.asked.goals(found, self.allocation)
            self._origins = {name: Origin.of(one) for name, one in found.items()}
        return counted_from(self._origins, found)

    def _point(self, found: Candidates, batch: Batch) -> Flow:
        needs = measure_lookup.needs(self.measure)
        if batch is not None:
            return flow_over(replace(self.source, data=OneBatch(batch)), self.model, needs, targets_of(found))
        if beyond := set(needs) - _FROM_BACKWARD:
            raise ValueError(
                f"{measure_lookup.name_of(self.method)!r} reads {', '.join(sorted(beyond))}, which .grad does not "
                "hold: call track(batch)"
            )
        point = point_of(self.source, targets_of(found))
        return self._gradients.read(point, found, squares="g2" in needs) if self._reads_gradients else point
