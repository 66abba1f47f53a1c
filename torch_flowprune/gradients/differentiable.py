"""Which parameters a flow is taken over: what can be differentiated, and nothing left out without a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torch_flowprune.inputs import (
    Target,
    check_shapes,
    is_computed_on_access,
    is_sharded,
    original,
    parameters_of,
    wide,
)


def differentiable(
    model: nn.Module, also: Iterable[str], wanted: set[str], *, in_parts: bool = False
) -> dict[str, Target]:
    """All that require a gradient and are numbers with a point, and those named besides.

    Raises:
        ValueError: for unknown names, and, where derivatives are wanted, for parameters that have none.
    """
    known, also = parameters_of(model), set(also)
    if missing := also - set(known):
        raise ValueError(f"no such parameter: {', '.join(sorted(missing))}")
    if wanted:
        _check_real(known, also)
    targets = {
        name: target
        for name, target in known.items()
        if name in also or (target.parameter.requires_grad and target.parameter.is_floating_point())
        if wanted or name in also or not isinstance(target.parameter, UninitializedParameter)  # theta alone: no shape
    }
    check_shapes(targets.values())
    if wanted and not in_parts:
        _check_whole(targets)
    return targets


def _check_real(known: Mapping[str, Target], also: Iterable[str] = ()) -> None:
    """An error for complex parameters that require a gradient, and for any of ``also`` that have none."""
    odd = [
        name
        for name, target in known.items()
        if not target.parameter.is_floating_point() and (target.parameter.requires_grad or name in also)
    ]
    if odd:
        raise ValueError(
            f"{', '.join(odd)}: derivatives are of real numbers, not {known[odd[0]].parameter.dtype}; use a measure "
            "that reads only theta, leave it out with exclude=, or treat it as a constant: requires_grad_(False)"
        )


def _check_whole(targets: Mapping[str, Target]) -> None:
    sharded = [name for name, target in targets.items() if hasattr(target.parameter, "device_mesh")]
    if sharded:
        raise ValueError(
            f"{sharded[0]!r} is a shard (a DTensor), and this call takes whole parameters: make it before "
            "fully_shard or parallelize_module, or with the full state dict in a model that is not sharded; fp.flow "
            "and fp.hessian_vector take sharded models"
        )


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, embeddings that are set to give sparse gradients give dense ones: sums and products are of those."""
    sparse = [module for module in model.modules() if getattr(module, "sparse", False) is True]
    try:
        for module in sparse:
            vars(module)["sparse"] = False
        yield
    finally:
        for module in sparse:
            vars(module)["sparse"] = True


def check_opens(targets: Mapping[str, Target], wanted: set[str]) -> None:
    """Masks that let a gradient through are computed where the weight is read; torch's own are not."""
    if "gR" in wanted:
        raise ValueError("gR has no values under the masks: leave it out of needs=, or leave under_masks= out")
    for name, target in targets.items():
        if target.mask is None or is_sharded(target.mask):  # beside a shard, where no forward computes with it
            continue
        if not all(is_computed_on_access(*owner) for owner in target.owners):
            raise ValueError(
                f"the mask of {name!r} is one of torch's own, under which there is no gradient: "
                "fp.apply_masks(model, fp.masks(model)) converts it to this package's"
            )


def reference_of(state: Mapping[str, Tensor] | None, targets: Mapping[str, Target]) -> dict[str, Tensor] | None:
    """The values of a state dict for these parameters, in float32 or better.

    Raises:
        ValueError: for one that is missing, or has another shape.
    """
    if state is None:
        return None
    theta0 = {}
    for name, target in targets.items():
        value = state.get(name, state.get(original(name)))
        if value is None:
            raise ValueError(
                f"theta0 has no entry for {name!r}: pass a state dict of this model, taken at the reference point"
            )
        if value.shape != target.parameter.shape:
            raise ValueError(
                f"theta0[{name!r}] has shape {tuple(value.shape)}, the parameter {tuple(target.parameter.shape)}"
            )
        theta0[name] = wide(value.detach().to(target.parameter.device))
    return theta0
