"""The Hessian of the loss times any vector."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from typing_extensions import Unpack

from torch_flowprune.gradients.differentiable import differentiable
from torch_flowprune.gradients.flow_source import FlowSource, LossOptions
from torch_flowprune.gradients.sharding import check_in_parts, in_shards
from torch_flowprune.gradients.sweeping import products_over
from torch_flowprune.inputs import (
    Ranks,
    as_batches,
    check_keywords,
    from_options,
    original,
    own_names,
    parameters_of,
    untouched,
    unwrapped,
)


def hessian_vector(
    model: nn.Module, data: object, v: Mapping[str, Tensor], **options: Unpack[LossOptions]
) -> dict[str, Tensor]:
    """The exact Hessian-vector product H·v, for the mean loss over all the data; the model is left as it was.

    It takes one sweep over the data (reverse over reverse). H is the Hessian with respect to all parameters that
    require a gradient, and those of ``v``.

    Args:
        model: any module; left as it was, see :func:`~torch_flowprune.flow`.
        data: what the loss is taken over: an iterable of ``(input, target)`` or dict batches, or one batch, see
            :func:`~torch_flowprune.flow`.
        v: tensors by parameter name, in the parameters' shapes; parameters that are left out count as 0.
        options: of :func:`~torch_flowprune.flow`: ``loss``, ``closure``, ``max_samples``, ``temperature``, ``mode``,
            ``progress``, ``max_memory``, ``offload``, ``autocast``, ``batch_size``, ``reduction``.

    Returns:
        Tensors by name, one for every parameter of H, in float32 or better.

    Raises:
        ValueError: for names that the model does not have, and for shapes that do not fit the parameter.

    See Also:
        :func:`~torch_flowprune.flow`: g, H·g and the rest over the same data.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> v = {"weight": torch.tensor([[1.0, 0.0]])}
    >>> fp.hessian_vector(model, batch, v, loss=torch.nn.functional.mse_loss)["weight"]
    tensor([[2., 4.]])
    """
    check_keywords(hessian_vector, options, LossOptions)
    source = from_options(FlowSource, options, data=data)
    ranks, model = Ranks.of(model), unwrapped(model)
    check_in_parts(model, source, {"Hg"}, ranks)
    with in_shards(model):
        named = _under_own_names(model, v)
        targets = differentiable(model, named, {"Hg"}, in_parts=True)
        for name, value in named.items():
            if value.shape != targets[name].parameter.shape:
                expected = tuple(targets[name].parameter.shape)
                raise ValueError(f"v[{name!r}] should have the parameter's shape {expected}, got {tuple(value.shape)}")
        with untouched(model, data, source.mode, source.functions) as rewind:
            for target in targets.values():
                target.parameter.requires_grad_(True)
            return products_over(model, targets, source, rewind, ranks).times(named, as_batches(data))


def _under_own_names(model: nn.Module, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the unpruned model; those of a pruned one are taken too."""
    if not isinstance(v, Mapping):
        raise TypeError(f"v should be a mapping of parameter names to tensors, got {type(v).__name__}")
    known = parameters_of(model)
    names, pruned = own_names(known, list(v)), {original(name): name for name in known}
    return {pruned.get(names[key], names[key]): value for key, value in v.items()}
