"""How small a model can become, before anything is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from torch_flowprune.channels import LatencyTable
from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import check_options, from_options, unwrapped
from torch_flowprune.scoring import PrunableUnits, UnitOptions
from torch_flowprune.selection import Allocation, PerLayer


@dataclass(frozen=True)
class SizeRange:
    """The range of costs that pruning can reach.

    Attributes:
        cost: the name of the cost; ``"memory"`` is in bytes and ``"latency"`` in milliseconds.
        dense: the cost with all units.
        now: the cost with the units that are left.
        least: the cost with the fewest units that must stay.

    See Also:
        :func:`~torch_flowprune.range`: computes it, with an example.
    """

    cost: str
    dense: float
    now: float
    least: float

    @property
    def sparsity(self) -> float:
        """The largest fraction of the cost that can be removed."""
        return 1 - self.least / self.dense if self.dense else 0.0

    def __str__(self) -> str:
        unit = {"memory": " bytes", "latency": " ms"}.get(self.cost, "")
        return (
            f"{self.cost}: {self.least:,.10g} to {self.dense:,.10g}{unit}, now {self.now:,.10g}; at most "
            f"{self.sparsity:.1%} can be removed"
        )


class RangeOptions(UnitOptions, total=False):
    """What :func:`~torch_flowprune.range` takes besides its own words."""

    min_keep: PerLayer | None
    max_sparsity: PerLayer | None
    round_to: int
    uniform: bool


def size_range(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cost: str | LatencyTable = "flops",
    **options: Unpack[RangeOptions],
) -> SizeRange:
    """The range of costs that pruning can reach: from the model with all its units to the least that the bounds allow.

    Any target from ``least`` on can be met, to within the cost of the last unit; a target below is an error. Units are
    channels, unless ``granularity`` says otherwise. The model is left as it was. The name is in the package but not in
    its ``__all__``: ``from torch_flowprune import *`` does not replace Python's own ``range``.

    Args:
        model: any module, pruned or not.
        example_inputs: what the model is called with, as for :func:`~torch_flowprune.couple`.
        cost: ``"flops"``, ``"parameters"``, ``"memory"``, ``"latency"``, a :class:`LatencyTable`, or ``"units"``.
        options: keywords of :func:`~torch_flowprune.global_prune`: which units (``granularity``, ``include``,
            ``exclude``, ``coupling``, ...), and what each layer keeps (``min_keep``, ``max_sparsity``, ``round_to``,
            ``uniform``).

    Raises:
        ValueError, TypeError: for bad arguments, and for a model without removable channels.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes to a budget, with ``cost=``.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(fp.range(model, torch.randn(2, 3), cost="parameters"))
    parameters: 8 to 50, now 50; at most 84.0% can be removed
    """
    known = ["example_inputs", "cost", *RangeOptions.__annotations__]
    check_options("range", options, known)
    units = from_options(PrunableUnits, {"granularity": "channel", **options})
    bounds = from_options(Allocation, options, cost=cost)
    found = units.of(unwrapped(model), FlowSource(example_inputs=example_inputs))
    name = cost if isinstance(cost, str) else "latency"
    return SizeRange(name, *bounds.range_of(found))
