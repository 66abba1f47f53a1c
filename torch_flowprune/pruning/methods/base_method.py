"""A measure as one of torch's pruning methods: the machinery behind the classes and functions of ``methods``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_flowprune.inputs import (
    Target,
    forget_caches,
    lasting,
    no_such_parameter,
    parameters_of,
    plain_number,
    real_tensor,
    wide,
)
from torch_flowprune.masking import all_or_nothing, check_can_mask, put_on
from torch_flowprune.scoring import Slices, Units, Weights, alive, granularity_of, measure_lookup, measures
from torch_flowprune.selection import lowest, to_prune
from torch_flowprune.torch_internals import set_tensor_name

_ANY_NUMBER = 1 << 62


class MeasureMethod(prune.BasePruningMethod):
    """A measure, a cut into units, and torch's way of applying both to one module."""

    measure: ClassVar[measures.Measure]
    PRUNING_TYPE: ClassVar[str]
    units: Units

    def __init__(self, amount: float, generator: torch.Generator | None = None) -> None:
        to_prune(amount, _ANY_NUMBER)
        self.amount = amount
        self.generator = generator

    @classmethod
    def reads(cls) -> set[str]:
        """What the measure reads: ``{"theta", "g"}``."""
        return set(measure_lookup.needs(cls.measure))

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask that removes the lowest of ``t`` on top of ``default_mask``; torch's containers call it.

        There ``t`` is either the weights themselves or the scores that were given, and torch does not say which. A
        measure that reads only ``theta`` takes it for weights (so a signed score loses its sign, as with
        ``L1Unstructured``); any other takes it for scores, and refuses weights where it can tell (they require a
        gradient).
        """
        own = self.reads() <= {"theta", "generator"}
        if t.requires_grad and not own:
            raise ValueError(self._way_out("reads more than the weights"))
        values = t.detach() if t.is_floating_point() or t.is_complex() else t.detach().float()
        return self._mask(self._evaluate({"theta": values}) if own else self._reduce(values), default_mask)

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """``t`` with zeros where the lowest go, as torch's method gives it; scores that are given are used signed."""
        if importance_scores is None or type(self).compute_mask is not MeasureMethod.compute_mask:
            pruned: Tensor = super().prune(t, default_mask, importance_scores)  # type: ignore[no-untyped-call]
            return pruned
        if (given := tuple(importance_scores.shape)) != tuple(t.shape):
            raise ValueError(f"importance_scores should have the tensor's shape {tuple(t.shape)}, got {given}")
        default = torch.ones_like(t) if default_mask is None else default_mask
        return t * self._mask(self._reduce(importance_scores.detach()), default)

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> MeasureMethod:
        """Prune the tensor ``name`` of ``module``; ``args`` and ``kwargs`` are the method's own.

        Returns the method, as torch's classes do.

        Raises:
            TypeError, ValueError: for bad arguments, before the module is touched.
        """
        method = cls(*args, **kwargs)
        target = _target_of(module, name)
        default = torch.ones_like(target.parameter, dtype=torch.bool) if target.mask is None else target.mask != 0
        mask = lasting(method._chosen(target, importance_scores, default))
        with all_or_nothing([target]):
            for owner, attribute in target.owners:
                set_tensor_name(method, attribute)
                put_on(owner, attribute, mask).add_pruning_method(method)
            forget_caches(module)
        return method

    def _chosen(self, target: Target, importance_scores: Tensor | None, default: Tensor) -> Tensor:
        """By a subclass's own ``compute_mask``, torch's way to write a method, where there is one."""
        if type(self).compute_mask is not MeasureMethod.compute_mask:
            given = target.theta if importance_scores is None else importance_scores.detach().to(default.device)
            return (self.compute_mask(given, default.to(target.parameter.dtype)) != 0) & default
        scores = self._own_scores(target) if importance_scores is None else self._given(importance_scores, target)
        return self._mask(scores, default)

    def _mask(self, scores: Tensor, default_mask: Tensor) -> Tensor:
        left = alive(self.units, default_mask)
        if (scores if left is None else scores[left]).isnan().any():
            raise ValueError(
                f"what {type(self).__name__} ranks by is nan in places, and cannot be ranked: look for nan in the "
                "scores, or in the weights that they are computed from"
            )
        (keep,) = lowest([scores], to_prune(self.amount, int(torch.count_nonzero(left))), [left]).keep
        return ((default_mask != 0) & self.units.mask(keep, default_mask.shape)).to(default_mask.dtype)

    def _evaluate(self, values: dict[str, Tensor]) -> Tensor:
        arguments: dict[str, Any] = {kind: self.units.rows(wide(value)) for kind, value in values.items()}
        if "generator" in self.reads():
            arguments["generator"] = self.generator or torch.default_generator
        return type(self).measure(**arguments)

    def _reduce(self, scores: Tensor) -> Tensor:
        return self.units.rows(wide(scores)).sum(-1)

    def _own_scores(self, target: Target) -> Tensor:
        """The measure on what the module itself holds: the masked weight and ``.grad``."""
        if missing := self.reads() - {"theta", "g", "generator"}:
            raise ValueError(self._way_out(f"needs {', '.join(sorted(missing))}, which a module does not hold", target))
        values = {"theta": target.theta}
        if "g" in self.reads():
            if target.parameter.grad is None:
                raise ValueError(
                    self._way_out(
                        f"reads .grad, which is None for {target.name!r}: run loss.backward() before, or pass scores",
                        target,
                    )
                )
            values["g"] = target.parameter.grad
        scores = self._evaluate(values)
        if not scores.isfinite().all():
            raise ValueError(
                f"the scores of {target.name!r} are not all finite: its weights or gradients hold nan or inf"
            )
        return scores

    def _given(self, scores: Tensor, target: Target) -> Tensor:
        if isinstance(self.units, Weights) and (other := granularity_of(scores)) not in (None, "weight"):
            raise ValueError(
                f"importance_scores of {target.name!r} are of units {other!r}, which lie in another order than the "
                f"weights that {type(self).__name__} prunes: compute scores with granularity='weight', or prune by "
                "these with fp.global_prune(model, scores=...)"
            )
        self._check_axis(scores, target)
        units = len(self.units.rows(target.parameter.detach()))
        value = given = real_tensor(scores, "importance_scores").detach().to(target.parameter.device)
        if value.shape == target.parameter.shape:
            value = self._reduce(value)
        if value.shape != (units,):
            shapes = " or ".join(str(shape) for shape in dict.fromkeys([tuple(target.parameter.shape), (units,)]))
            raise ValueError(
                f"importance_scores of {target.name!r} should have shape {shapes}, got {tuple(given.shape)}"
            )
        if value.isnan().any():
            raise ValueError(
                f"importance_scores of {target.name!r} hold nan, or a slice has infinities of both signs: no order can "
                "be told"
            )
        return value

    def _check_axis(self, scores: Tensor, target: Target) -> None:
        """An error where scores of filters would be taken for those of slices along another axis."""
        dim = getattr(self.units, "dim", None)
        if granularity_of(scores) == "filter" and dim is not None and dim % target.theta.dim() != target.output_axis:
            raise ValueError(
                f"importance_scores of {target.name!r} are of its filters, the slices along axis {target.output_axis}, "
                f"and {type(self).__name__} prunes those along dim={dim}: pass dim={target.output_axis}"
            )

    def _way_out(self, reason: str, target: Target | None = None) -> str:
        axis = "" if isinstance(self.units, Weights) or target is None or not target.output_axis else ", dim=1"
        name, kind = (
            measure_lookup.name_of(type(self).measure),
            "weight" if isinstance(self.units, Weights) else "filter",
        )
        return (
            f"{type(self).__name__} {reason}. Compute scores first: scores = fp.scores(model, {name!r}, data=loader, "
            f"granularity={kind!r}), "
            f"then pass importance_scores=scores['layer.weight']{axis}; or prune the whole model: "
            f"fp.global_prune(model, {name!r}, sparsity, granularity={kind!r}, data=loader)"
        )


class Unstructured(MeasureMethod):
    """Prunes single weights."""

    PRUNING_TYPE = "unstructured"
    units = Weights()


class Structured(MeasureMethod):
    """Prunes slices along one axis."""

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, dim: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__(amount, generator)
        dim = plain_number(dim)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim should be an int, the axis whose slices are pruned, got {dim!r}")
        self.dim = dim
        self.units = Slices(dim)


def _target_of(module: nn.Module, name: str) -> Target:
    target = next((target for target in parameters_of(module).values() if (module, name) in target.owners), None)
    if target is None:
        raise ValueError(no_such_parameter((module, name)))
    check_can_mask(target, name, factors=False)
    return target
