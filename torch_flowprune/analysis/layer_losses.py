"""What the held-out loss becomes where one layer alone is pruned, and the sparsities that add up to the least of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from torch_flowprune.analysis.held_out_loss import mean_loss
from torch_flowprune.gradients import FlowOptions, FlowSource, flow_over, in_shards
from torch_flowprune.inputs import Ranks, check_keywords, check_readable_again, from_options, unwrapped
from torch_flowprune.masking import restored
from torch_flowprune.pruning import prune_to
from torch_flowprune.scoring import Measure, PrunableUnits, UnitOptions, evaluate, lefts, measure_lookup, targets_of
from torch_flowprune.selection import Allocation, fraction


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found.

    Attributes:
        loss: the loss before pruning.
        units: how many units each layer has.
        losses: for each layer, the loss by the number of its pruned units, beginning with those pruned before.
        samples: how many samples the losses were measured on.

    >>> import torch, torch_flowprune as fp
    >>> found = fp.sensitivity(torch.nn.Linear(4, 2), "magnitude", (torch.randn(8, 4), torch.tensor([0, 1] * 4)))
    >>> sorted(found.losses["weight"])  # numbers of pruned weights
    [0, 2, 4, 6, 7]
    """

    loss: float
    units: dict[str, int]
    losses: dict[str, dict[int, float]]
    samples: int

    def allocation(self, sparsity: float) -> dict[str, float]:
        """A sparsity for each layer, ``round(sparsity · units)`` units in total, to pass as ``allocation=``.

        It assumes that losses of layers add up, and interpolates linearly between measured losses: the next step is
        taken in the layer where it costs least per unit (on the lower convex hull of its losses). Interactions between
        layers are ignored.

        Raises:
            ValueError: for a sparsity above those measured, or below what is already pruned.
        """
        total = round(fraction(sparsity) * sum(self.units.values()))
        gone = {name: min(found) for name, found in self.losses.items()}
        most = sum(max(found) for found in self.losses.values())
        if not sum(gone.values()) <= total <= most:
            raise ValueError(
                f"sparsity={sparsity} is {total:,} units, and the measured range is {sum(gone.values()):,} to "
                f"{most:,}: pass higher sparsities= to fp.sensitivity, or another target"
            )
        steps = [(slope, order, name, to) for order, name in enumerate(self.losses) for slope, to in self._hull(name)]
        for _, _, name, to in sorted(steps):
            gone[name] = min(to, gone[name] + total - sum(gone.values()))
        return {name: count / self.units[name] if self.units[name] else 0.0 for name, count in gone.items()}

    def _hull(self, name: str) -> Iterator[tuple[float, int]]:
        """The corners of the lower convex hull: what a unit costs on the way to each, and how many are gone there."""
        points = sorted(self.losses[name].items())
        while len(points) > 1:
            start, loss = points[0]
            slopes = [((cost - loss) / (count - start), -count) for count, cost in points[1:]]
            slope, to = min(slopes)
            yield slope, -to
            points = [point for point in points if point[0] >= -to]

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.4g} on {self.samples:,} samples; with this fraction of one layer pruned:"]
        for name, found in self.losses.items():
            parts = [f"{count / self.units[name]:.0%} {loss:.4g}" for count, loss in sorted(found.items())[1:]]
            lines.append(f"{name}: {', '.join(parts)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for ``json``."""
        return asdict(self)


class SensitivityOptions(FlowOptions, UnitOptions, total=False):
    """What :func:`sensitivity` takes besides its own words; :func:`~torch_flowprune.global_prune` describes each."""


def sensitivity(
    model: nn.Module,
    method: str | Measure = "magnitude",
    data: object = None,
    *,
    held_out: object = None,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    generator: torch.Generator | None = None,
    **options: Unpack[SensitivityOptions],
) -> Sensitivity:
    """Prune one layer at a time to each sparsity, and measure the loss on held-out data; the model is left as it was.

    This makes one pass over the held-out data per layer and sparsity, so use a few batches.

    Args:
        model: any module; left as it was. With a sharded one, make the same call on every rank.
        method: a measure's name or function, which ranks the units of each layer.
        data: the data for the scores; it is read more than once.
        held_out: the data for the loss; ``data`` if left out (the scores have then seen these samples).
        sparsities: of the layer, above what is already pruned.
        generator: the random generator for ``random``.
        options: keywords of :func:`~torch_flowprune.global_prune`: which units (``granularity``, ``include``, ...), and
            what is differentiated (``loss``, ``closure``, ...).

    Raises:
        ValueError, TypeError: for bad arguments; the message says how to fix them.

    See Also:
        :func:`~torch_flowprune.compare`: prunes whole models, by several measures.
        :func:`~torch_flowprune.global_prune`: accepts the result as ``allocation=``.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> found = fp.sensitivity(model, "snip", (torch.randn(8, 4), torch.tensor([0, 1] * 4)))
    >>> report = fp.global_prune(model, "magnitude", allocation=found.allocation(0.5))
    >>> report.pruned, report.units
    (24, 48)
    """
    check_keywords(sensitivity, options, SensitivityOptions)
    check_readable_again("the losses read their data several times", data, held_out)
    if not sparsities:
        raise ValueError("sparsities= is empty: name at least one, such as [0.5, 0.9]")
    ranks, inner, measure = Ranks.of(model), unwrapped(model), measure_lookup.resolve(method)
    source, units = from_options(FlowSource, options, data=data), from_options(PrunableUnits, options)
    candidates = units.of(inner, source, shards=True)
    point = flow_over(source, model, measure_lookup.needs(measure), targets_of(candidates))
    scores = evaluate(point, measure, candidates, units.granularity, generator)
    ranks.agree(scores.values())
    evaluation = replace(source, data=data if held_out is None else held_out, temperature=1.0)
    before, samples = mean_loss(inner, evaluation, ranks)

    def at(name: str, share: float) -> tuple[int, float]:
        with in_shards(inner), restored(targets_of(candidates).values()):
            report = prune_to(inner, candidates, scores, None, point, Allocation({name: share}))
            loss, _ = mean_loss(inner, evaluation, ranks)
        return next(layer.pruned for layer in report.layers if layer.name == name), loss

    gone = {name: len(one) - left for (name, one), left in zip(candidates.items(), lefts(candidates), strict=True)}
    losses = {
        name: {gone[name]: before}
        | dict(at(name, share) for share in map(fraction, sparsities) if round(share * len(one)) > gone[name])
        for name, one in candidates.items()
    }
    return Sensitivity(before, {name: len(one) for name, one in candidates.items()}, losses, samples)
