"""Where a model stands in its gradient flow.

How the norm of each layer moves, and how far its scores can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torch_flowprune.analysis.prediction import Prediction, cut_by, share_removed
from torch_flowprune.analysis.rank_correlation import laid_out, spearman
from torch_flowprune.gradients import Flow, FlowSource, ProposedCut, SweepOptions, halved_flow
from torch_flowprune.inputs import (
    Loss,
    Ranks,
    check_keywords,
    check_readable_again,
    from_options,
    parameters_of,
    unwrapped,
    without_nan,
)
from torch_flowprune.pruning import blank_figure
from torch_flowprune.scoring import (
    Candidates,
    Measure,
    PrunableUnits,
    UnitOptions,
    all_living,
    evaluate,
    lefts,
    measure_lookup,
    targets_of,
    totals,
)
from torch_flowprune.tables import InNotebooks, Table

Values: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class LayerDiagnosis:
    """The place in the flow of one parameter, group of channels or block; derivatives are by the time t of dθ/dt = −g.

    Attributes:
        name: the parameter's name, that of the group or the block, or "total".
        weights: how many weights the parameters have that the measure reads; the norms are theirs.
        theta_norm: ‖θ‖².
        theta_norm_rate: d‖θ‖²/dt = −2 θᵀg.
        theta_norm_acceleration: d²‖θ‖²/dt² = 2 (‖g‖² + θᵀHg).
        gradient_norm: ‖g‖².
        theta_Hg: θᵀHg.
        zero_share: the fraction of its unpruned units that score exactly 0; for these, model order decides, not the
            measure.
        stability: Spearman's correlation of their scores on two halves of the data; None if there is only one sample.

    See Also:
        :class:`~torch_flowprune.Diagnosis`: all layers together.
    """

    name: str
    weights: int
    theta_norm: float
    theta_norm_rate: float
    theta_norm_acceleration: float
    gradient_norm: float
    theta_Hg: float
    zero_share: float
    stability: float | None


@dataclass(frozen=True)
class Diagnosis(InNotebooks):
    """What :func:`diagnose` found.

    Attributes:
        method: the measure whose zeros and stability are shown.
        layers: one entry per parameter, in model order.
        total: the same over all parameters together.
        loss: the mean loss.
        samples: how many samples were read.
        prediction: the predicted cost of the proposed masks, or None.

    >>> import torch, torch_flowprune as fp
    >>> found = fp.diagnose(torch.nn.Linear(4, 2), (torch.randn(8, 4), torch.tensor([0, 1] * 4)))
    >>> found.layers[0].name, found.samples
    ('weight', 8)
    """

    method: str
    layers: tuple[LayerDiagnosis, ...]
    total: LayerDiagnosis
    loss: float
    samples: int
    prediction: Prediction | None = None

    def __str__(self) -> str:
        text = f"{self._summary()}\n{self.table()}"
        return text if self.prediction is None else f"{text}\n\n{self.prediction}"

    def _summary(self) -> str:
        return (
            f"loss {self.loss:.4g} over {self.samples:,} samples; zeros and stability are of the {self.method} scores"
        )

    def table(self) -> str:
        """A text table with one line per layer and one for the total."""
        return str(self._cells())

    def _cells(self) -> Table:
        header = ("parameter", "weights", "‖θ‖²", "d‖θ‖²/dt", "d²‖θ‖²/dt²", "‖g‖²", "θᵀHg", "zero", "stable")
        return Table(header, [_table_row(layer) for layer in (*self.layers, self.total)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for ``json``; nan becomes None."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a plot to ``path``: how each layer's norm changes, and how stable its scores are.

        Raises:
            ImportError: without matplotlib, an extra.
        """
        figure = blank_figure(11, 1.4 + 0.22 * len(self.layers))
        rate, stable = figure.subplots(1, 2, sharey=True)
        names = [layer.name for layer in self.layers]
        relative = [layer.theta_norm_rate / layer.theta_norm if layer.theta_norm else 0.0 for layer in self.layers]
        rate.barh(names, relative, color="#4477aa")
        rate.axvline(0, color="grey", linewidth=0.8)
        rate.set(xlabel="d‖θ‖²/dt over ‖θ‖²", title="how the norm moves")
        stable.barh(names, [layer.stability or 0.0 for layer in self.layers], color="#ee6677")
        stable.set(xlim=(min(0.0, *(layer.stability or 0.0 for layer in self.layers)), 1), xlabel="rank correlation")
        stable.set_title(f"{self.method} scores on two halves of the data")
        rate.invert_yaxis()
        rate.tick_params(axis="y", labelsize=7)
        figure.savefig(path, dpi=150)


class DiagnoseOptions(SweepOptions, UnitOptions, total=False):
    """What :func:`diagnose` takes besides its own words."""

    theta0: Mapping[str, Tensor] | None
    example_inputs: Any


def diagnose(
    model: nn.Module,
    data: object = None,
    loss: Loss | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    method: str | Measure = "loss_preservation",
    generator: torch.Generator | None = None,
    **options: Unpack[DiagnoseOptions],
) -> Diagnosis:
    """Per layer and in total: ‖θ‖², its first two time derivatives, ‖g‖², θᵀHg, and how stable the ranking is.

    Stability is Spearman's rank correlation between the scores on the even and the odd batches (or on the halves of a
    single batch). Near 1, the data is sufficient. Far below 1, other data would prune other units.

    Args:
        model: any module; left as it was. With a sharded one, make the same call on every rank.
        data: what the flow reads; it is read more than once.
        loss: ``loss(output, target)``, a mean over the batch; if left out, cross-entropy, or the model's own loss for
            dict batches.
        masks: proposed masks, by parameter name, which are not applied: the result of :func:`~torch_flowprune.predict`
            for them is added.
        method: the measure whose zeros and stability are shown.
        generator: the random generator for ``random``.
        options: keywords of :func:`~torch_flowprune.scores` for the units (``granularity``, ``parameters``,
            ``include``, ``exclude``, ``scored_by``, ``coupling``), and of :func:`~torch_flowprune.flow` (``closure``,
            ``max_samples``, ``theta0``, ``max_memory``, ...).

    Raises:
        ValueError, TypeError: as :func:`~torch_flowprune.flow` does.

    See Also:
        :func:`~torch_flowprune.compare`: what each measure does to the loss.
        :func:`~torch_flowprune.predict`: what one set of masks does to the loss.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> found = fp.diagnose(model, (torch.randn(8, 4), torch.tensor([0, 1] * 4)))
    >>> [layer.name for layer in found.layers], found.total.weights
    (['0.weight', '2.weight'], 48)
    """
    check_readable_again("a diagnosis reads its data several times", data)
    measure = measure_lookup.resolve(method)
    check_keywords(diagnose, options, DiagnoseOptions)
    source = from_options(FlowSource, options, data=data, loss=loss)
    units = from_options(PrunableUnits, options)
    candidates = units.of(unwrapped(model), source, shards=True)
    known = parameters_of(unwrapped(model))
    cut = ProposedCut() if masks is None else cut_by(known, masks)
    flows = halved_flow(source, model, measure_lookup.needs(measure), list(targets_of(candidates)), cut)

    def scored(at: Flow) -> Values:
        return dict(evaluate(at, measure, candidates, units.granularity, generator))

    scores, pair = scored(flows.whole), [scored(half) for half in flows.halves]
    layers = tuple(_layer(name, {name: one}, flows.whole, scores, pair) for name, one in candidates.items())
    assert flows.whole.loss is not None
    return Diagnosis(
        measure_lookup.name_of(method),
        layers,
        _layer("total", candidates, flows.whole, scores, pair),
        flows.whole.loss,
        flows.whole.samples,
        Prediction(**flows.expansions, removed_norm=share_removed(known, cut)) if flows.expansions else None,
    )


def _layer(name: str, among: Candidates, point: Flow, scores: Values, pair: Sequence[Values]) -> LayerDiagnosis:
    read = dict.fromkeys(parameter for candidate in among.values() for parameter in candidate.read)
    theta, g, Hg = ([point.tensors(kind)[one] for one in read] for kind in ("theta", "g", "Hg"))
    dot = Ranks.holding(theta).dot
    gradient_norm, theta_Hg, units = dot(g, g), dot(theta, Hg), sum(lefts(among))
    zeros = sum(totals(among, [_zeros(scores[one], candidate.alive()) for one, candidate in among.items()]))
    return LayerDiagnosis(
        name=name,
        weights=sum(map(torch.numel, theta)),
        theta_norm=dot(theta, theta),
        theta_norm_rate=-2 * dot(theta, g),
        theta_norm_acceleration=2 * (gradient_norm + theta_Hg),
        gradient_norm=gradient_norm,
        theta_Hg=theta_Hg,
        zero_share=zeros / units if units else 0.0,
        stability=spearman(*(laid_out(all_living(among, half), units) for half in pair)) if pair else None,
    )


def _zeros(scores: Tensor, alive: Tensor | None) -> Tensor:
    return scores == 0 if alive is None else (scores == 0) & alive


def _table_row(layer: LayerDiagnosis) -> tuple[str, ...]:
    numbers = (
        layer.theta_norm,
        layer.theta_norm_rate,
        layer.theta_norm_acceleration,
        layer.gradient_norm,
        layer.theta_Hg,
    )
    stable = "-" if layer.stability is None else f"{layer.stability:.3f}"
    return (
        layer.name,
        f"{layer.weights:,}",
        *(f"{number:.3g}" for number in numbers),
        f"{layer.zero_share:.1%}",
        stable,
    )
