"""Dead channels physically removed: the same classes, smaller tensors, and outputs that are proved equal.

`shrink` slices parameters, buffers and optimizer state, and sets the attributes that state sizes (`out_channels`,
`num_heads`).
The result is run against the masked model before anything is handed out: in float64, in eval and in train mode, with
affine parameters and running statistics shaken, so that defaults of zero and one hide nothing. If the two differ, the
model is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.coupling import arguments_of, coupling_of, reading_of
from torch_flowprune.channels.groups import Coupling, living_channels
from torch_flowprune.channels.rules import RULES
from torch_flowprune.channels.shrinking.equivalence import ShrinkError, Trial, first_line, tolerance_of
from torch_flowprune.channels.shrinking.exported_module import (
    argument_names,
    free_sizes,
    graft,
    recorded_calls,
    resized_graph,
)
from torch_flowprune.channels.shrinking.module_sizes import Surgery, attribute_plans, changed_sizes
from torch_flowprune.channels.tracing import Reading, canonical_names, export, read, twin
from torch_flowprune.inputs import parameters_of
from torch_flowprune.masking import dense_copy, remove, write_zeros


def shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    coupling: Coupling | None = None,
    reading: Reading | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
    graph: bool = True,
) -> nn.Module:
    """A smaller model without the dead channels of this one; its outputs are checked to be the masked model's.

    A channel is dead where the masks leave nothing of its unit.

    Args:
        model: the pruned model; left as it was unless ``inplace``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of them; a batch of two
            samples or more.
        masks: by parameter name, True = kept; those on the model if left out, and where there are none, exact zeros.
        coupling, reading: of the model without masks, where they are at hand or written by hand; else read from it.
        kwargs: keyword arguments of the model's forward, besides.
        optimizer: goes on with the smaller parameters, its state (momentum) sliced along.
        inplace: change this model instead of a copy.
        graph: where a module's own code cannot take the new sizes (``reshape(B, N, C)`` with C read off its input),
            replace it by its exported graph, resized. With False, or in place, that is an error.

    Returns:
        The smaller model.

    Raises:
        ShrinkError: if no smaller model computes what the masked one does; model and optimizer are as they were.
        ValueError: if a coupling does not fit the model.

    >>> import torch_flowprune as fp
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=torch.ones(2, 3))
    >>> shrink(model, torch.ones(2, 3))[0].out_features
    4
    """
    before = {name: target.parameter for name, target in parameters_of(model).items()}
    dense, found = dense_copy(model)
    names = canonical_names(dense)
    given = {names[k]: v.bool() for k, v in {**found, **(masks or {})}.items()}
    write_zeros(dense, given)
    args, keywords = arguments_of(dense, example_inputs, kwargs)
    reading = reading or reading_of(dense, args, keywords)
    coupling = coupling or coupling_of(reading)
    coupling.check_fits({**dict(dense.named_parameters()), **dict(dense.named_buffers())})
    kept = living_channels(coupling, given or {n: p != 0 for n, p in dense.named_parameters()})
    surgery = Surgery(_kept_positions(coupling, kept, dense), {})
    if surgery.keep:
        trial = Trial(dense, given, surgery, args, keywords, tolerance_of(reading))
        small, surgery = _attempt(_Bench(dense, reading, surgery, trial, args, keywords), graph and not inplace)
    else:
        small = dense
    if inplace:
        write_zeros(remove(model), given)
        small = _operated(model, surgery)
    if optimizer is not None:
        _hand_over(optimizer, before, small, surgery)
    return small


@dataclass
class _Bench:
    """What the attempts at one shrinking share: the dense model, its labels, what is to go, and the trial to pass."""

    dense: nn.Module
    reading: Reading
    surgery: Surgery
    trial: Trial
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    graphs: dict[str, tuple[Reading, Tensor, list[str]]] = field(default_factory=dict)

    @cached_property
    def dead(self) -> Tensor:
        return _dead_labels(self.reading, self.surgery)

    @cached_property
    def calls(self) -> dict[str, tuple[Any, Any]]:
        paths = [p for p in changed_sizes(self.reading, self.dead) if p]
        return recorded_calls(twin(self.dense).eval(), self.args, self.kwargs, paths)

    def build(self, model: nn.Module, surgery: Surgery, replaced: Collection[str] = ()) -> nn.Module:
        """`model`, a copy of the dense one, after surgery, with the modules at some paths replaced by their graphs."""
        small = _operated(model, surgery)
        for path in replaced:
            module = small.get_submodule(path)
            small = graft(small, path, resized_graph(module, *self.graph_of(path)))
        return small

    def graph_of(self, path: str) -> tuple[Reading, Tensor, list[str]]:
        """The labelled graph of one module of the dense model, and what is dead in it."""
        if path not in self.graphs:
            module = self.dense.get_submodule(path)
            args, kwargs = self.calls[path] if path else (self.args, self.kwargs)
            try:
                reading = read(
                    module, args, kwargs, RULES, export(module, args, kwargs, False, free_sizes(module, args, kwargs))
                )
            except Exception:  # noqa: BLE001 - code that fixes its sizes: the graph is then for the example's
                reading = read(module, args, kwargs, RULES, export(module, args, kwargs, False))
            keep = {
                n.removeprefix(f"{path}."): k
                for n, k in self.surgery.keep.items()
                if n.startswith(f"{path}." if path else "")
            }
            self.graphs[path] = (
                reading,
                _dead_labels(reading, Surgery(keep, {})),
                argument_names(module, args, kwargs),
            )
        return self.graphs[path]

    def tried(self, surgery: Surgery, replaced: Collection[str] = ()) -> tuple[Exception | None, nn.Module]:
        """The trial's model after surgery, and what is wrong with it."""
        small = self.trial.model
        try:
            small = self.build(copy.deepcopy(self.trial.model), surgery, replaced)
            self.trial.check(small)
        except Exception as e:  # noqa: BLE001 - whatever foreign code raises, this surgery does not fit
            return e, small
        return None, small

    def replacements(self, surgery: Surgery) -> list[str] | None:
        """Modules to replace by their graphs so that the model passes: found from where it fails, kind by kind."""
        replaced: list[str] = []
        while True:
            error, small = self.tried(surgery, replaced)
            if error is None:
                return replaced
            more = _outermost([*replaced, *self.blamed(error, small)])
            if set(more) <= set(replaced):
                return None
            replaced = more

    def blamed(self, error: BaseException, small: nn.Module) -> list[str]:
        """The innermost module in the traceback that states sizes which shrink, and all of its class that do."""
        modules = dict(small.named_modules())
        sized = {p: modules[p] for p in changed_sizes(self.reading, self.dead) if p in modules and p}
        paths = {id(m): p for p, m in sized.items()}
        found = None
        trace = error.__traceback__
        while trace is not None:
            found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
            trace = trace.tb_next
        return [p for p, m in sized.items() if type(m) is type(sized[found])] if found else []


def _outermost(paths: Sequence[str]) -> list[str]:
    """Without repeats, and without paths inside others."""
    return [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{q}.") for q in paths)]


def _attempt(bench: _Bench, graph: bool) -> tuple[nn.Module, Surgery]:
    """The first way that passes: the modules' own code, then some modules as graphs, then all of the model as one."""
    names = canonical_names(bench.dense)
    plans = [
        replace(bench.surgery, attributes=a)
        for a in attribute_plans(bench.dense, bench.reading, bench.dead, bench.surgery, names)
    ]
    errors = []
    for plan in plans:
        error, _ = bench.tried(plan)
        if error is None:
            return bench.build(copy.deepcopy(bench.dense), plan), plan
        errors.append(f"{type(error).__name__}: {first_line(error)}")
    if not graph:
        raise ShrinkError(f"the model's own code does not take the smaller sizes: {errors[0]}")
    replaced = bench.replacements(plans[0])
    if replaced is not None:
        return bench.build(copy.deepcopy(bench.dense), plans[0], replaced), plans[0]
    error, _ = bench.tried(bench.surgery, [""])
    if error is not None:
        raise ShrinkError(
            f"neither the model's code ({errors[0]}) nor its graph ({first_line(error)}) takes the smaller sizes"
        )
    return bench.build(copy.deepcopy(bench.dense), bench.surgery, [""]), bench.surgery


# -- what is dead ------------------------------------------


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


def _dead_labels(reading: Reading, surgery: Surgery) -> Tensor:
    """(labels,) bool: True for every label that is joined to a position that goes."""
    roots = torch.zeros(reading.axes.count, dtype=torch.bool, device="cpu")
    for b in reading.axes.blocks:
        kept = surgery.keep.get(b.name, {}).get(b.axis)
        if kept is not None:
            roots[reading.solution.root[b.start : b.start + b.size][~kept]] = True
    return roots[reading.solution.root]


# -- surgery ------------------------------------------


def _operated(model: nn.Module, surgery: Surgery) -> nn.Module:
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
    for path, values in surgery.attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)
    return model


def _cut_tensor(surgery: Surgery, name: str, tensor: Tensor) -> Tensor:
    small = surgery.cut(name, tensor.detach()).clone()
    if not isinstance(tensor, nn.Parameter):
        return small
    parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = surgery.cut(name, tensor.grad).clone()
    return parameter


def _hand_over(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], small: nn.Module, surgery: Surgery
) -> None:
    """The optimizer goes on with the new parameters; state of a parameter's shape is cut as the parameter was."""
    after = dict(small.named_parameters())
    successor = {old: (name, after[name]) for name, old in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [successor[p][1] if p in successor else p for p in group["params"]]
    for old, (name, new) in successor.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                k: surgery.cut(name, v).clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                for k, v in state.items()
            }
