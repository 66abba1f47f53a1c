"""theta, g, Hg of a model over data, computed once, leaving no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.gradients.batches import Reduction
from torch_flowprune.gradients.differentiable import check_opens, differentiable, reference_of
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sharded_synflow import synaptic_gradient_in_parts
from torch_flowprune.gradients.sharding import check_in_parts, in_shards, is_in_parts, theta_of
from torch_flowprune.gradients.sweeping import MOMENTS, Products, products_over
from torch_flowprune.gradients.synflow import synaptic_gradient
from torch_flowprune.inputs import (
    Batch,
    BatchDim,
    BatchSize,
    Closure,
    ComparedByValue,
    Loss,
    Ranks,
    Target,
    as_batches,
    check_keywords,
    check_readable_again,
    gradients_under_masks,
    settle,
    untouched,
    unwrapped,
    wide,
)

Named = dict[str, Tensor]

_DERIVATIVES = ("g", "g2", "g2_sample", "Hg", "gR", *MOMENTS, "diagH")
INGREDIENTS = ("theta", "theta0", "generator", *_DERIVATIVES)
"""What a measure may read: what is at hand, and what a flow computes."""


@dataclass(frozen=True, eq=False)
class Flow(ComparedByValue):
    """One point of the gradient flow dθ/dt = −g: tensors by parameter name, or None where not requested.

    All tensors are float32 or better, shaped like their parameter, and on the parameter's device (or on the host with
    ``offload``; :meth:`tensors` brings them back one by one). ``theta`` shares the storage of float32 parameters: clone
    it for a snapshot that survives a training step.

    Attributes:
        theta: the parameters as the forward uses them (masked where pruned).
        theta0: the given reference point.
        g: gradient of the mean loss, as in training. The lookup of an embedding's ``padding_idx`` has no gradient; if
            the table is also the output's weight, g and Hg of this row come from the output alone.
        g2: sample-weighted mean over batches of the squared batch gradients.
        g2_sample: mean over samples of the squared sample gradients.
        Hg: the Hessian-vector product H·g: the Hessian of the mean loss times g, over the same data.
        x2: mean over samples and positions of the squared input that each weight multiplies (0 for padding), for
            weights that are operands of products and convolutions.
        x1: the same mean of the input's absolute value.
        x0: the fraction of samples and positions where the input is not zero.
        diagH: diagonal of the Hessian: the mean over probes of z·Hz for random signs z, with new signs for each batch.
        diagH_error: its standard error over the probes; nan for a single one.
        gR: gradient of the synaptic-flow objective, in float64 (accurate to float32 for float32 convolutions on a CPU).
        loss: the mean loss, or None if no data was read.
        samples, counted: how many samples were read, and how they were counted (None if no data was read).

    >>> import torch, torch_flowprune as fp
    >>> fp.flow(torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))).Hg["weight"].shape
    torch.Size([2, 3])
    """

    theta: Named
    theta0: Named | None = None
    g: Named | None = None
    g2: Named | None = None
    g2_sample: Named | None = None
    Hg: Named | None = None
    gR: Named | None = None
    x2: Named | None = None
    x1: Named | None = None
    x0: Named | None = None
    diagH: Named | None = None
    diagH_error: Named | None = None
    loss: float | None = None
    samples: int = 0
    counted: str | None = None

    def tensors(self, kind: str) -> Mapping[str, Tensor]:
        """The tensors of one kind (``"g"``) by parameter name, or an error that says how to get what is missing."""
        if kind not in INGREDIENTS or kind == "generator":
            known = ", ".join(sorted({*INGREDIENTS} - {"generator"}))
            raise ValueError(f"a flow has no {kind!r}: it has {known}")
        values: Named | None = getattr(self, kind)
        if values is None:
            raise ValueError(
                f"this flow has no {kind!r}: compute it with needs=({kind!r},), or for 'theta0' pass theta0="
            )
        apart = any(value.device != self.theta[name].device for name, value in values.items())
        return _Fetched(values, self.theta) if apart else values


@dataclass(frozen=True, eq=False)
class _Fetched(Mapping[str, Tensor]):
    """Tensors kept on the host, each brought to its parameter's device when it is read."""

    on_host: Named
    parameters: Named

    def __getitem__(self, name: str) -> Tensor:
        return self.on_host[name].to(self.parameters[name].device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.on_host)

    def __len__(self) -> int:
        return len(self.on_host)


def flow(
    model: nn.Module,
    data: object = None,
    *,
    loss: Loss | None = None,
    needs: Sequence[str] = ("g", "Hg"),
    closure: Closure | None = None,
    parameters: Iterable[str] = (),
    theta0: Mapping[str, Tensor] | None = None,
    max_samples: int | None = None,
    temperature: float = 1.0,
    mode: str = "eval",
    example_inputs: Any = None,
    progress: bool | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    autocast: torch.dtype | None = None,
    batch_size: BatchSize | None = None,
    batch_dim: BatchDim = 0,
    reduction: Reduction | None = None,
    check: bool | None = None,
    probes: int = 32,
    under_masks: bool = False,
    **unknown: Never,
) -> Flow:
    """θ and the derivatives of the loss that ``needs`` names, exact, over all the data; the model is left as it was.

    They are taken with respect to every parameter that requires a gradient, and those in ``parameters`` (so a frozen
    model can be scored). The Hessian-vector product H·g is exact (reverse over reverse), with g and H over the same
    samples: two sweeps over the data, or one if the data is a single batch.

    Args:
        model: any module; unwrapped if compiled or data-parallel. With ``DistributedDataParallel``, make the same call
            on every rank, each with its own part of the data; the flow is over all parts. Likewise under
            ``fully_shard`` and tensor parallelism, where tensors are DTensors.
        data: an iterable of ``(input, target)`` or dict batches, or one batch. Batches are moved to the model's device.
            A tuple as input is spread over the model's arguments; a list is one argument, unless the model needs
            several. From a dict the model gets the keys that its signature takes.
        loss: ``loss(output, target)``, with the output as the model returns it; torch's own losses get the logits of a
            dict or an object that has ``logits`` or ``out``. If left out: cross-entropy for targets that are classes,
            or the model's own loss for dict batches.
        needs: any of ``g``, ``g2``, ``g2_sample``, ``Hg``, ``gR``, ``x2``, ``x1``, ``x0``, ``diagH``.
        closure: ``closure(model, batch) -> loss`` for anything else; it replaces ``loss`` and ``temperature``.
        parameters: names of parameters to include even if they are frozen.
        theta0: a state dict of the reference point (the initialisation, for instance).
        max_samples: read exactly this many samples (the last batch is cut).
        temperature: the output is divided by it before the loss.
        mode: batch norm and dropout while scoring: "eval" (as in the paper), or "train", for untrained networks.
        example_inputs: inputs that show the shape that ``gR`` needs, if no ``data`` is given.
        progress: True or False; None shows a bar on a terminal, once a sweep has taken two seconds.
        max_memory: memory for a sweep, beyond model and data, in bytes or as ``"2GB"``. Batches that would need more
            are run in parts, with the same result. Where there is room, graphs are kept for the second sweep, which is
            then faster.
        offload: keep the sums of the derivatives on the host, for models whose θ, g and H·g do not fit on the device
            together.
        autocast: ``torch.bfloat16`` runs the model in mixed precision; sums are in float32.
        batch_size: how many samples a batch has: a number or a function of the batch. If left out, it is read from
            inputs and target where they agree, along ``batch_dim`` or in lists of samples.
        batch_dim: the axis along which samples lie; a tensor without that many axes has them along its first. Like the
            ``in_dims`` of ``torch.vmap`` it may be nested as the batch is, with None for what all samples share: ``(1,
            0)`` for inputs with time first, ``((0, None), 0)`` for a mask beside the inputs, ``{"mask": None}``.
        reduction: how the loss reduces a batch: the ``"mean"`` over its samples, their ``"sum"``, the mean over
            positions of the target that are not ignored (``"token"``), or a function of a batch that returns how many
            terms its loss is the mean of. The flow is that of the mean over all the data; batches and their parts are
            weighted accordingly. None infers it from the loss: torch's cross-entropy is a mean over positions, with
            class weights if it has them; the loss that a language model returns is a mean over tokens, if it is
            recognised as one; a loss with ``reduction="sum"`` is a sum; all others count as means over samples, and a
            warning says so where several batches contradict this.
        under_masks: for a pruned model, also compute derivatives of pruned weights: the slope of the loss along a
            weight that is 0 now, by which :func:`~torch_flowprune.regrow` chooses. Without it they are 0 there.
        check: compare H·g with the change of g along g, on two samples in float64, and warn about layers where they
            differ, because an operator hides from autograd what its gradient depends on. None checks from 16 batches
            on, where it costs little.
        probes: how many random vectors ``diagH`` is estimated from, with one Hessian-vector product each; the seed is
            torch's.
        unknown: no other keyword is accepted; the error names the one meant.

    Raises:
        ValueError: for empty or one-shot data, a loss that is not one finite number, an unknown name.

    See Also:
        :func:`~torch_flowprune.hessian_vector`: H·v along any v.
        :func:`~torch_flowprune.scores`: scores computed from a flow.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Linear(3, 2)
    >>> f = fp.flow(model, (torch.ones(4, 3), torch.tensor([0, 1, 0, 1])), needs=("g",))
    >>> f.g["weight"].shape, f.samples
    (torch.Size([2, 3]), 4)
    """
    check_keywords(flow, unknown)
    source = FlowSource(
        data, loss, closure, theta0, max_samples, temperature, mode, example_inputs, progress, max_memory, offload,
        autocast, batch_size, batch_dim, reduction, check, probes, under_masks,
    )  # fmt: skip
    return flow_over(source, model, needs, [parameters] if isinstance(parameters, str) else parameters)


def point_of(source: FlowSource, targets: Mapping[str, Target]) -> Flow:
    """The parameters themselves, and where they began: what needs no sweep."""
    theta = {name: wide(theta_of(target)) for name, target in targets.items()}
    return Flow(theta=theta, theta0=reference_of(source.theta0, targets))


def flow_over(source: FlowSource, model: nn.Module, needs: Sequence[str], parameters: Iterable[str] = ()) -> Flow:
    """:func:`flow` with its words as one value, which the calls that take a flow hand on."""
    ranks, model, parameters = Ranks.of(model), unwrapped(model), list(parameters)
    wanted = derivatives_in(needs)
    if "theta0" in needs and source.theta0 is None:
        raise ValueError(
            "this measure reads theta0, the parameters at a reference point: pass theta0=, a state dict taken at "
            "initialisation"
        )
    check_in_parts(model, source, wanted, ranks)
    with in_shards(model):
        return _flow_in_shards(source, model, wanted, parameters, ranks)


def _flow_in_shards(
    source: FlowSource, model: nn.Module, wanted: set[str], parameters: Sequence[str], ranks: Ranks
) -> Flow:
    targets = differentiable(model, parameters, wanted, in_parts=True)
    point = point_of(source, targets)
    if not wanted:
        return point
    if source.under_masks:
        check_opens(targets, wanted)
    opened = gradients_under_masks() if source.under_masks else nullcontext()
    with untouched(model, source.data, source.mode, source.functions) as rewind, opened:
        for target in targets.values():
            target.parameter.requires_grad_(True)
        if "gR" in wanted:
            settle(model, "eval")  # the objective has no batch to take statistics of
            point = replace(point, gR=_synaptic(source, model, targets, point.theta))
            settle(model, source.mode)
            rewind()  # the example may have drawn from the loader, whose order both sweeps share
        if wanted - {"gR"}:
            data = as_batches(source.data)  # or an error, before anything is said of the model
            sweeps = products_over(model, targets, source, rewind, ranks)
            fields = _swept(sweeps, data, wanted - {"gR"})
            point = replace(point, **fields, counted=source.counting)
            source.warn_of_fewer(point.samples, sweeps.ranks)
    return point


def _synaptic(source: FlowSource, model: nn.Module, targets: Mapping[str, Target], theta: Named) -> Named:
    if is_in_parts(model):
        return synaptic_gradient_in_parts(model, targets, theta, source)
    return synaptic_gradient(model, targets, theta, source.example(model))


def _swept(sweeps: Products, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
    """What the data give: the diagonal takes a sweep of its own."""
    others = wanted - {"diagH"}
    fields = sweeps.run(data, others) if others else {}
    if "diagH" not in wanted:
        return fields
    if others:
        check_readable_again("diagH takes a sweep of its own", data)
        sweeps.rewind()
    return {**sweeps.diagonal(data, sweeps.source.probes), **fields}


def derivatives_in(needs: Sequence[str]) -> set[str]:
    """What of it takes the loss; H·g takes g.

    Raises:
        ValueError: for what a flow has not.
    """
    wanted = {needs} if isinstance(needs, str) else set(needs)
    unknown = wanted - set(INGREDIENTS)
    if unknown:
        raise ValueError(f"needs= names {', '.join(map(repr, sorted(unknown)))}; a flow has {', '.join(_DERIVATIVES)}")
    wanted &= set(_DERIVATIVES)
    return wanted | {"g"} if "Hg" in wanted else wanted
