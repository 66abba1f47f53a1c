"""Every measure at every sparsity, from one flow: what each would cost, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from torch_flowprune.analysis.held_out_loss import mean_loss
from torch_flowprune.analysis.held_out_metric import Metric, check_is_metric, measured_by
from torch_flowprune.analysis.rank_correlation import all_pairs, laid_out
from torch_flowprune.gradients import Flow, FlowOptions, FlowSource, flow_over, in_shards
from torch_flowprune.inputs import (
    Ranks,
    check_keywords,
    check_readable_again,
    from_options,
    plain_sequence,
    unwrapped,
    without_nan,
)
from torch_flowprune.masking import restored
from torch_flowprune.pruning import blank_figure, prune_to
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    PrunableUnits,
    Scores,
    UnitOptions,
    all_living,
    evaluate,
    lefts,
    measure_lookup,
    targets_of,
)
from torch_flowprune.selection import Allocation, AllocationOptions, fraction
from torch_flowprune.tables import InNotebooks, Table

DEFAULT_MEASURES = ("magnitude", "loss_preservation", "gradient_norm_preservation", "gradient_norm_increase", "random")


@dataclass(frozen=True)
class Outcome:
    """One measure at one sparsity.

    Attributes:
        method: the measure's name.
        sparsity: the fraction of units that are pruned, also if the target was a fraction of a cost.
        loss: the mean loss with these masks.
        change: this loss minus the loss without masks.
        predicted: −Σ θ·g over the pruned weights, on the scoring data: the first-order change.
        emptied: how many layers have nothing left.
        metric: the value of your ``metric=``.

    See Also:
        :class:`~torch_flowprune.Comparison`: all measures at all sparsities.
    """

    method: str
    sparsity: float
    loss: float
    change: float
    predicted: float
    emptied: int
    metric: float | None = None


@dataclass(frozen=True)
class Comparison(InNotebooks):
    """What :func:`compare` found.

    Attributes:
        loss: the loss before pruning.
        outcomes: one entry per measure and sparsity.
        correlation: Spearman's rank correlation of the scores of unpruned units, by pair of measures.
        samples: how many samples the loss was measured on.
        held_out: whether these samples were not those that the scores read.
        metric: the value of your ``metric=`` before pruning.

    >>> import torch, torch_flowprune as fp
    >>> model, batch = torch.nn.Linear(4, 2), (torch.randn(8, 4), torch.tensor([0, 1] * 4))
    >>> found = fp.compare(model, ["magnitude", "snip"], [0.5], batch)
    >>> best = min(found.outcomes, key=lambda outcome: outcome.loss)
    >>> best.method in ("magnitude", "snip"), best.sparsity
    (True, 0.5)
    """

    loss: float
    outcomes: tuple[Outcome, ...]
    correlation: dict[str, dict[str, float]]
    samples: int
    held_out: bool = True
    metric: float | None = None

    def __str__(self) -> str:
        return f"{self._summary()}\n{self.table()}\n\nrank correlation\n{self.correlation_table()}"

    def _summary(self) -> str:
        which = "held-out samples" if self.held_out else "samples, which the scores have seen,"
        metric = "" if self.metric is None else f", metric {self.metric:.4g},"
        return f"loss {self.loss:.4g}{metric} on {self.samples:,} {which} before pruning"

    def table(self) -> str:
        """A text table with one line per measure and sparsity."""
        return str(self._cells())

    def _cells(self) -> Table:
        header = ("method", "sparsity", "loss", "change", "predicted", "emptied")
        rows = [
            (o.method, f"{o.sparsity:.1%}", f"{o.loss:.4g}", f"{o.change:+.3g}", f"{o.predicted:+.3g}", str(o.emptied))
            for o in self.outcomes
        ]
        if self.metric is None:
            return Table(header, rows)
        return Table((*header, "metric"), [(*r, f"{o.metric:.4g}") for r, o in zip(rows, self.outcomes, strict=True)])

    def correlation_table(self) -> str:
        """The rank correlations as text."""
        names = list(self.correlation)
        rows = [(one, *(f"{self.correlation[one][other]:.2f}" for other in names)) for one in names]
        return str(Table(("", *names), rows))

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with one row per measure and sparsity.

        Raises:
            ImportError: without pandas.
        """
        import pandas as pd

        return pd.DataFrame([asdict(outcome) for outcome in self.outcomes])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for ``json``."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def plot(self, path: str | PathLike[str]) -> None:
        """Write to ``path`` the change of the loss over the sparsity, a line a measure, beside the rank correlations.

        Raises:
            ImportError: without matplotlib, an extra.
        """
        figure = blank_figure(12, 4.5)
        left, right = figure.subplots(1, 2)
        self._draw_changes(left)
        self._draw_correlation(right)
        figure.savefig(path, dpi=150)

    def _draw_changes(self, axes: Any) -> None:
        for name in dict.fromkeys(outcome.method for outcome in self.outcomes):
            points = [(outcome.sparsity, outcome.change) for outcome in self.outcomes if outcome.method == name]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="sparsity", ylabel=f"change of the {'held-out ' if self.held_out else ''}loss", yscale="symlog")
        axes.legend(frameon=False)

    def _draw_correlation(self, axes: Any) -> None:
        names = list(self.correlation)
        axes.imshow(
            [[self.correlation[one][other] for other in names] for one in names], cmap="coolwarm", vmin=-1, vmax=1
        )
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                axes.text(j, i, f"{self.correlation[one][other]:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title("rank correlation of the scores", fontsize=9)


class CompareOptions(FlowOptions, UnitOptions, AllocationOptions, total=False):
    """What :func:`compare` takes besides its own words; :func:`~torch_flowprune.global_prune` describes each."""


def compare(
    model: nn.Module,
    methods: str | Measure | Sequence[str | Measure] = DEFAULT_MEASURES,
    sparsities: float | Sequence[float] = (0.5, 0.75, 0.9),
    data: object = None,
    *,
    held_out: object = None,
    metric: Metric | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Prune by every measure to every sparsity, and measure the loss on held-out data; the model is left as it was.

    All scores come from one flow over ``data``.

    Args:
        model: any module; left as it was. With ``DistributedDataParallel`` or a sharded model, make the same call on
            every rank; scores and losses are over the data of all ranks.
        methods: one measure or several, each a name or a function.
        sparsities: in [0, 1], and no less than what the model already has.
        data: the data for the scores; it is read more than once.
        held_out: the data for the loss, at temperature 1 and in the model's own precision; ``data`` if left out.
        metric: an additional figure of merit: any function of ``(model, data)`` that returns a number, called with the
            held-out data, the model in eval mode, without gradients. Or a metric of torchmetrics or torcheval: a copy
            of it is updated with the model's logits and the target, batch by batch.
        generator: the random generator for ``random``.
        options: keywords of :func:`~torch_flowprune.global_prune`: which units (``granularity``, ...), how sparsity is
            distributed (``allocation``, ...), and what is differentiated (``loss``, ``closure``, ...).

    Raises:
        ValueError, TypeError: for bad arguments; the message says how to fix them.

    See Also:
        :func:`~torch_flowprune.sensitivity`: the loss layer by layer.
        :func:`~torch_flowprune.predict`: what one set of masks does to the loss.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> found = fp.compare(model, ["magnitude", "snip"], [0.25, 0.5], (torch.randn(8, 4), torch.tensor([0, 1] * 4)))
    >>> len(found.outcomes), found.correlation["snip"]["snip"]
    (4, 1.0)
    """
    ranks, inner = Ranks.of(model), unwrapped(model)
    resolved, levels = _resolved(methods), _levels(sparsities)
    check_readable_again("a comparison reads its data several times", data, held_out)
    check_keywords(compare, options, CompareOptions)
    check_is_metric(metric)
    source, units = from_options(FlowSource, options, data=data), from_options(PrunableUnits, options)
    allocation = from_options(Allocation, options)
    allocation.check_beside(*levels)
    candidates = units.of(inner, source, shards=True)
    needs = {"g", *(kind for measure in resolved.values() for kind in measure_lookup.needs(measure))}
    point = flow_over(source, model, tuple(needs), targets_of(candidates))
    scores = {
        name: evaluate(point, measure, candidates, units.granularity, generator) for name, measure in resolved.items()
    }
    for of_measure in scores.values():
        ranks.agree(of_measure.values())  # a random one has a seed a rank, where each has the whole model
    unseen = data if held_out is None else held_out
    evaluation = replace(source, data=unseen, temperature=1.0)
    before, samples = mean_loss(inner, evaluation, ranks)
    with in_shards(inner):
        dense = measured_by(metric, inner, unseen)
    outcomes = tuple(
        _outcome(inner, name, sparsity, scores[name], point, candidates, allocation, before, evaluation, ranks, metric)
        for name in scores
        for sparsity in levels
    )
    left = sum(lefts(candidates))
    laid = {name: laid_out(all_living(candidates, values), left) for name, values in scores.items()}
    return Comparison(before, outcomes, all_pairs(laid), samples, held_out is not None, dense)


def _resolved(methods: str | Measure | Sequence[str | Measure]) -> dict[str, Measure]:
    """The measures under the names they were asked by."""
    asked = [methods] if isinstance(methods, str) or callable(methods) else methods
    if not asked:
        raise ValueError(f"methods= is empty: name at least one measure, such as {DEFAULT_MEASURES[0]!r}")
    return measure_lookup.measures_by_name(asked)


def _levels(sparsities: float | Sequence[float]) -> list[float]:
    sparsities = plain_sequence(sparsities)
    asked = sparsities if isinstance(sparsities, Sequence) else [sparsities]
    if not asked:
        raise ValueError("sparsities= is empty: name at least one, such as [0.5, 0.9]")
    return [fraction(sparsity) for sparsity in asked]


def _outcome(
    model: nn.Module,
    name: str,
    sparsity: float,
    scores: Scores,
    point: Flow,
    found: Candidates,
    allocation: Allocation,
    before: float,
    evaluation: FlowSource,
    ranks: Ranks,
    metric: Metric | None,
) -> Outcome:
    with in_shards(model), restored(targets_of(found).values()):
        report = prune_to(model, found, scores, sparsity, point, allocation)
        after, _ = mean_loss(model, evaluation, ranks)
        value = measured_by(metric, model, evaluation.data)
    emptied = len(report.emptied)
    assert report.predicted_loss_change is not None
    return Outcome(name, report.sparsity, after, after - before, report.predicted_loss_change, emptied, value)
