"""What goes from a model's tensors, and the cut itself: names of tensors, their axes, and positions on these."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.shrinking.own_code import Edits
from torch_flowprune.channels.slices import Slice
from torch_flowprune.channels.tracing import Reading, canonical_names, module_path
from torch_flowprune.inputs import plain_name
from torch_flowprune.torch_internals import list_flat_weights

_CUT_BUFFERS = "cut_buffers"


class ShrinkError(RuntimeError):
    """The smaller model cannot be built, or does not compute what the masked one does. The model is as it was."""


@dataclass(frozen=True)
class Surgery:
    """What to do to a model.

    Attributes:
        keep: tensor -> axis -> (size,) bool.
        attributes: module path -> attribute -> value.
        code: module path -> what its code says instead.
        spans: module path -> dimension of what it is given -> (size,) bool, where its statistics are over channels that
            go: the positions that it still sees.
        directions: tensor -> the axes along which it is divided by its norm, so that what goes of it is not zero.
    """

    keep: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[str, Mapping[str, Any]]
    code: Mapping[str, Edits] = field(default_factory=dict)
    spans: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    directions: Mapping[str, Collection[int]] = field(default_factory=dict)

    def clear(self, name: str, tensor: Tensor) -> None:
        """Zeros in place of what goes of a parameter, but for one of which nothing is left: others may divide by it."""
        for axis, kept in self.keep.get(name, {}).items():
            if axis not in self.directions.get(name, ()) and kept.any():
                tensor.detach().index_fill_(axis, (~kept).nonzero().flatten().to(tensor.device), 0)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        for axis, kept in self.keep.get(name, {}).items():
            tensor = tensor.index_select(axis, kept.nonzero().flatten().to(tensor.device))
        return tensor

    def cut_all(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the model, pruned or not."""
        return {key: self.cut(plain_name(key, state), value) for key, value in state.items()}

    def coupling(self, coupling: Coupling) -> Coupling:
        """That of the smaller model: its units under the positions that they have there. Costs are not known of it."""
        slices = [(group, tuple(filter(None, map(self._slice, group.slices)))) for group in coupling.groups]
        groups = tuple(replace(g, slices=some) for g, some in slices if any(one.role == "producer" for one in some))
        branches = tuple(one for one in coupling.branches if not all(map(self._takes, one.masked)))
        return replace(coupling, groups=groups, branches=branches, costs=None)

    def _slice(self, one: Slice) -> Slice | None:
        """None where nothing of its parameter is left."""
        kept = self.keep.get(one.parameter, {}).get(one.axis)
        if kept is None or not kept.any():
            return one if kept is None else None
        return replace(one, index=(kept.cumsum(0) - 1)[one.index[kept[one.index].all(-1)]])

    def _takes(self, name: str) -> bool:
        """Whether nothing is left of a parameter."""
        return any(not bool(kept.any()) for kept in self.keep.get(name, {}).values())

    def with_code(self, more: Mapping[str, Edits]) -> Surgery:
        """The same, with more edits of code."""
        paths = (*self.code, *more)
        return replace(self, code={path: (*self.code.get(path, ()), *more.get(path, ())) for path in paths})

    def left_of(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks cut to size, of what they still mask: single weights and filters, whose channels live on."""
        small = {name: self.cut(name, mask) for name, mask in masks.items()}
        return {name: mask for name, mask in small.items() if not bool(mask.all())}

    def count(self) -> int:
        """How many positions of tensors go."""
        return sum(int((~kept).sum()) for axes in self.keep.values() for kept in axes.values())

    def shape(self, name: str, old: Sequence[int]) -> tuple[int, ...]:
        axes = self.keep.get(name, {})
        return tuple(int(axes[i].sum()) if i in axes else n for i, n in enumerate(old))


def surgery_keeping(coupling: Coupling, kept: Mapping[str, Tensor], model: nn.Module) -> Surgery:
    """What goes from the tensors of a model where these units are kept.

    Raises:
        ShrinkError: where nothing would be left of one.
    """
    directions: dict[str, set[int]] = {}
    for part in (part for group in coupling.groups for part in group.slices if part.role == "direction"):
        directions.setdefault(part.parameter, set()).add(part.axis)
    return Surgery(_kept_positions(coupling, kept, model), {}, directions=directions)


def _kept_positions(coupling: Coupling, kept: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> axis -> (size,) bool, for the axes that lose something."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    out: dict[str, dict[int, Tensor]] = {}
    for group in coupling.groups:
        for s in group.slices:
            gone = s.index[~kept[group.name]].reshape(-1)
            if len(gone):
                size = tensors[s.parameter].shape[s.axis]
                left = out.setdefault(s.parameter, {}).setdefault(
                    s.axis, torch.ones(size, dtype=torch.bool, device="cpu")
                )
                left[gone] = False
                if not left.any():
                    raise ShrinkError(
                        f"nothing would be left of {s.parameter}: all {size} positions of axis {s.axis} are "
                        "dead; keep at least one unit of each group"
                    )
    return out


def dead_labels(reading: Reading, surgery: Surgery) -> Tensor:
    """(labels,) bool: True for every label that is joined to a position that goes."""
    roots = torch.zeros(reading.axes.count, dtype=torch.bool, device="cpu")
    for b in reading.axes.blocks:
        kept = surgery.keep.get(b.name, {}).get(b.axis)
        if kept is not None:
            roots[reading.solution.root[b.start : b.start + b.size][~kept]] = True
    return roots[reading.solution.root]


def with_spans(surgery: Surgery, reading: Reading) -> Surgery:
    """The surgery, with the statistics that are taken over channels which go."""
    dead, spans = dead_labels(reading, surgery), dict[str, dict[int, Tensor]]()
    for node, (dim, labels) in reading.spans.items():
        if bool(dead[labels].any()):
            spans.setdefault(module_path(node), {})[dim] = ~dead[labels]
    return replace(surgery, spans=spans)


def operated(model: nn.Module, surgery: Surgery) -> nn.Module:
    """The model after surgery, changed in place. Tied tensors stay tied."""
    names = canonical_names(model)
    new: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                full = names[f"{path}.{name}" if path else name] if tensor is not None else ""
                if tensor is not None and full in surgery.keep:
                    if full not in new:
                        new[full] = _cut_tensor(surgery, full, tensor)
                    held[name] = new[full]
        if isinstance(module, nn.RNNBase):
            list_flat_weights(module)
    for path, values in surgery.attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)
    return model


def _cut_tensor(surgery: Surgery, name: str, tensor: Tensor) -> Tensor:
    small = surgery.cut(name, tensor.detach()).clone()
    if not isinstance(tensor, nn.Parameter):
        return small
    return nn.Parameter(small, requires_grad=tensor.requires_grad)


def note_cut_buffers(dense: nn.Module, small: nn.Module) -> None:
    """Which buffers are of another size now and in no state dict: a file has to have them besides."""
    before, loaded = dict(dense.named_buffers()), small.state_dict().keys()
    note_buffers(
        small,
        [
            name
            for name, buffer in small.named_buffers()
            if name not in loaded and name in before and buffer.shape != before[name].shape
        ],
    )


def note_buffers(small: nn.Module, names: Iterable[str]) -> None:
    """What :func:`cut_buffers` tells, on the modules, where it is copied and pickled with them."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        words = vars(small.get_submodule(path))
        words[_CUT_BUFFERS] = tuple(dict.fromkeys([*words.get(_CUT_BUFFERS, ()), leaf]))


def cut_buffers(model: nn.Module) -> list[str]:
    """The names of buffers that a shrink cut, and that are in no state dict."""
    return [
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in vars(module).get(_CUT_BUFFERS, ())
        if leaf in module._buffers
    ]
