"""Whole experts of a mixture removed, with their rows of the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.gradients import FlowSource, flow_over
from torch_flowprune.inputs import Closure, Loss, as_batches, check_keywords, example_of, parameters_of, unwrapped, wide
from torch_flowprune.masking import masks
from torch_flowprune.pruning.experts.expert_blocks import (
    ExpertBlock,
    Undo,
    cut_experts,
    expert_blocks,
    outputs_of,
    parameters_in,
    state_experts,
    without_experts,
)
from torch_flowprune.scoring import Measure, measure_lookup
from torch_flowprune.selection import fraction


@dataclass(frozen=True)
class RemovedExperts:
    """What :func:`remove_experts` did.

    Attributes:
        kept: for each block the experts that are kept, by their numbers before.
        scores: for each block the score of every expert.
        left: blocks that look like experts but were left unchanged, with the reason.

    See Also:
        :func:`~torch_flowprune.remove_experts`: has an example.
    """

    kept: dict[str, tuple[int, ...]]
    scores: dict[str, tuple[float, ...]]
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {len(kept)} of {len(self.scores[name])} experts left" for name, kept in self.kept.items()]
        return "\n".join([*lines, *(f"{name}: left, {reason}" for name, reason in self.left.items())])


def remove_experts(
    model: nn.Module,
    method: str | Measure = "loss_preservation",
    sparsity: float = 0.5,
    *,
    example_inputs: Any = None,
    data: object = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    include: str | Sequence[str] = "*",
    scores: Mapping[str, Tensor] | None = None,
    **unknown: Never,
) -> RemovedExperts:
    """Remove the experts with the lowest scores from every block of a mixture, in place, with their router rows.

    A unit is one expert: all its weights, and its row of the router. The same number is removed from each block,
    because one number in the config says how many there are. The result computes what the dense model computes when its
    router gives −∞ for the removed experts. Each block is tested for this on the example, and left unchanged if it
    fails.

    Args:
        model: a model without masks, with experts in a ``ModuleList`` or ``ModuleDict``, or as rows of
            three-dimensional parameters, and beside them a router with one row per expert.
        method: a measure's name or a function of rows, with one expert per row.
        sparsity: the fraction of each block's experts to remove; at least one expert is kept.
        example_inputs: what the model is called with to test the result; if left out, the inputs of the first batch.
        data: the batches to score on, see :func:`~torch_flowprune.flow`.
        loss, closure: the loss that gradients are of: ``loss(output, target)``, or ``closure(model, batch)``, see
            :func:`~torch_flowprune.flow`.
        include: globs of the blocks' names.
        scores: a number for each expert by the block's name, instead of a measure, for example how often each is
            picked.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        Which experts are kept, the scores, and which blocks were left unchanged.

    Raises:
        ValueError: if there are no experts, if the model has masks, or if no block can be cut; the model is as it was.

    See Also:
        :func:`~torch_flowprune.shrink`: removes channels; experts need no call of it.

    >>> import torch, torch_flowprune as fp
    >>> class Mixture(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate = torch.nn.Linear(4, 6)
    ...         self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))
    ...
    ...     def forward(self, x):
    ...         shares = self.gate(x).softmax(-1)
    ...         return sum(share[:, None] * e(x) for share, e in zip(shares.unbind(1), self.experts))
    >>> model = Mixture()
    >>> print(fp.remove_experts(model, "magnitude", 0.5, example_inputs=torch.randn(5, 4)))
    : 3 of 6 experts left
    >>> model.gate
    Linear(in_features=4, out_features=3, bias=True)
    """
    check_keywords(remove_experts, unknown)
    source, inner = FlowSource(data, loss, closure, example_inputs=example_inputs), unwrapped(model)
    globs = [include] if isinstance(include, str) else list(include)
    blocks = [one for one in expert_blocks(inner) if any(fnmatchcase(one.name, glob) for glob in globs)]
    if not blocks:
        raise ValueError(
            "no experts were found: they are looked for in a ModuleList, a ModuleDict or three-dimensional parameters "
            "beside a router with a row for each"
        )
    if masks(inner):
        raise ValueError(
            "this model has masks: remove experts before you prune anything else, or call fp.remove(model) first"
        )
    example = _example(inner, data, example_inputs)
    ranked = _given(scores, blocks) if scores is not None else _measured(model, blocks, method, source)
    share = fraction(sparsity)
    done, undone = RemovedExperts({}, {}), list[Undo]()
    try:
        for block in blocks:
            gone = min(round(share * block.count), block.count - 1)
            keep = torch.ones(block.count, dtype=torch.bool)
            keep[ranked[block.name].argsort(stable=True)[:gone]] = False
            undo, reason = _tried(inner, block, keep, example)
            undone.append(undo)
            if reason:
                done.left[block.name] = reason
            else:
                done.kept[block.name] = tuple(keep.nonzero().flatten().tolist())
                done.scores[block.name] = tuple(ranked[block.name].tolist())
        _check_any(done)
    except BaseException:
        for undo in reversed(undone):
            undo()
        raise
    if not done.left:
        state_experts(inner, blocks[0].count, len(next(iter(done.kept.values()))))
    return done


def _check_any(done: RemovedExperts) -> None:
    if not done.kept:
        raise ValueError(f"no block can be cut: {'; '.join(f'{name}: {why}' for name, why in done.left.items())}")


def _example(model: nn.Module, data: object, example_inputs: Any) -> Any:
    """Of a batch that is a dict all of it: models with a decoder read their labels."""
    if example_inputs is None and data is not None:
        batch = next(iter(as_batches(data)))
        example_inputs = batch if isinstance(batch, Mapping) else None
    return example_of(data, example_inputs, next(model.parameters()).device)


def _tried(model: nn.Module, block: ExpertBlock, keep: Tensor, example: Any) -> tuple[Undo, str]:
    """The block cut; or as it was, with what is against it."""
    expected = without_experts(model, block, keep, example)
    if expected is None:
        return Undo(), "nothing that looks like its router is multiplied with what it reads"
    undo = cut_experts(block, keep)
    try:
        found = outputs_of(model, example)
        reason = (
            "" if _same_output(found, expected) else "what is left is not the model whose router never picks the others"
        )
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = f"what is left does not run ({' '.join(str(error).split())[:120]})"
    if reason:
        undo()
    return undo, reason


def _same_output(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return False
    size = max(float(expected.abs().max()), 1e-30)
    return bool((found - expected).abs().max() <= size * torch.finfo(expected.dtype).eps ** 0.5)


def _measured(
    model: nn.Module, blocks: Sequence[ExpertBlock], method: str | Measure, source: FlowSource
) -> dict[str, Tensor]:
    measure = measure_lookup.resolve(method)
    asked = measure_lookup.needs(measure)
    held = parameters_in(blocks)
    names = {target.parameter: name for name, target in parameters_of(unwrapped(model)).items()}
    wanted = [names[p] for p in names if p in held]
    kinds = [kind for kind in asked if kind not in ("theta", "generator")]
    point = flow_over(source, model, kinds, wanted)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    found = {}
    for block in blocks:
        of = {
            kind: block.rows_of({p: wide(dict(point.tensors(kind))[names[p]].detach()) for p in held if p in names})
            for kind in asked
            if kind != "generator"
        }
        found[block.name] = measure(**of, **({"generator": generator} if "generator" in asked else {})).cpu()
    return found


def _given(scores: Mapping[str, Tensor], blocks: Sequence[ExpertBlock]) -> dict[str, Tensor]:
    found = {}
    for block in blocks:
        if block.name not in scores or len(scores[block.name]) != block.count:
            raise ValueError(
                f"scores= should have a number for each of the {block.count} experts of {block.name!r}, got "
                f"{scores.get(block.name)!r}"
            )
        found[block.name] = torch.as_tensor(scores[block.name], device="cpu").double()
    return found
