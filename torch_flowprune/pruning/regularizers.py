"""Penalties that bring channels near zero while a model trains, so that little is lost when they are pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torch_flowprune.channels import Coupling
from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import Pattern, parameters_of, unwrapped, wide
from torch_flowprune.masking import all_fitting
from torch_flowprune.scoring import Candidates, PrunableUnits


class GroupLasso:
    """A penalty for the loss: strength · Σ √n · ‖θ_unit‖₂ over coupled channels, n the number of a channel's weights.

    The gradient has the same length however small a channel is, until it is zero, so whole channels are driven to zero.
    With ``scored_by="scale"`` the sum is over γ of the channels' norms: the ℓ1 penalty of network slimming. The penalty
    is in float32 or better.

    Args:
        coupling: the result of :func:`~torch_flowprune.couple` for the model that trains.
        strength: the factor, a tensor or a number; you can change this attribute during training.
        scored_by: which weights of a channel: ``"group"``, all that is coupled to it; ``"producer"``, those that
            compute it; ``"norm"``, γ and β of its norms; ``"scale"``, γ alone.
        exclude: name globs, module types or modules of producers whose channels are not penalised.

    Raises:
        ValueError: when called with a model that the coupling does not fit.

    Source: Yuan & Lin 2006 (the group lasso); Liu et al. 2017 (network slimming, γ alone).

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes the channels afterwards, with ``granularity="channel"``.

    >>> import torch, torch_flowprune as fp
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(3, 4)
    >>> penalty = fp.regularizers.GroupLasso(fp.couple(model, x), strength=1e-3)
    >>> loss = model(x).square().mean() + penalty(model)
    >>> loss.backward()
    """

    def __init__(
        self,
        coupling: Coupling,
        strength: float | Tensor,
        scored_by: str = "group",
        exclude: Pattern | list[Pattern] | None = None,
    ) -> None:
        self.strength = strength
        self._units = PrunableUnits("channel", scored_by=scored_by, exclude=exclude, coupling=coupling)
        self._known: WeakKeyDictionary[nn.Module, tuple[list[torch.Size], Candidates]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[GroupLasso], tuple[object, ...]]:
        """What models it has seen does not go along into a copy or a pickle."""
        return type(self), (self._units.coupling, self.strength, self._units.scored_by, self._units.exclude)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of the current model, differentiable."""
        model = unwrapped(model)
        shapes = [parameter.shape for parameter in model.parameters()]
        if model not in self._known or self._known[model][0] != shapes:  # not seen, or shrunk since
            self._known[model] = shapes, self._units.of(model, FlowSource())
        units = self._known[model][1].values()
        used = _used(model, {target.name for unit in units for target in unit.targets})
        rows = [wide(unit.rows(used)) for unit in units]
        lengths = [math.sqrt(row.shape[-1]) * torch.linalg.vector_norm(row, dim=-1).sum() for row in rows]
        return torch.stack([length.to(lengths[0].device) for length in lengths]).sum() * self.strength


class GrowingDecay:
    """A penalty: strength / 2 · Σ θ² over the weights that a mask would remove; :meth:`step` raises the strength.

    The weights to prune are chosen first and brought to zero slowly, while the rest of the model adapts.

    Args:
        masks: by parameter name, True where a weight is kept, for example the masks of a pruned copy
            (``fp.masks(copy)``).
        by: what each :meth:`step` adds to the strength.
        most: the highest strength.

    Attributes:
        strength: the current factor; it begins at 0.

    Raises:
        ValueError: for a negative ``by`` or ``most``, and when called with a model that the masks do not fit.

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization".

    See Also:
        :func:`~torch_flowprune.masks`: masks of a pruned copy.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Linear(4, 2)
    >>> decay = fp.regularizers.GrowingDecay({"weight": torch.tensor([[True] * 4, [False] * 4])}, by=0.1)
    >>> decay.step()
    >>> bool(torch.isclose(decay(model), 0.05 * model.weight[1].square().sum()))
    True
    """

    def __init__(self, masks: Mapping[str, Tensor], by: float, most: float = 1.0) -> None:
        if not masks:
            raise ValueError("masks= is empty: expected masks by parameter name, of the weights that will be pruned")
        if not (by >= 0 and most >= 0):
            raise ValueError(
                f"by= and most= should be at least 0, got {by} and {most}: a negative strength makes weights grow"
            )
        self.masks, self.by, self.most, self.strength = dict(masks), by, most, 0.0

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of the current model, differentiable."""
        model = unwrapped(model)
        fitting = all_fitting(parameters_of(model), self.masks)
        used = _used(model, set(fitting))
        parts = [wide(torch.where(mask, 0, used[name])).square().sum() for name, mask in fitting.items()]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum() * (self.strength / 2)

    def step(self) -> None:
        """Raise the strength; call it after as many optimizer steps as you like."""
        self.strength = min(self.strength + self.by, self.most)


def _used(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Parameters as the forward uses them, by name: masked where they are, and with their graph."""
    known = parameters_of(model)
    owners = {name: known[name].owners[0] for name in names}
    return {name: getattr(module, attribute) for name, (module, attribute) in owners.items()}
