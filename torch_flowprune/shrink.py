"""Dead channels physically removed: the same classes, smaller tensors, and outputs that are proved equal.

`shrink` slices parameters, buffers and optimizer state, and sets the attributes that state sizes (`out_channels`,
`num_heads`).
The result is run against the masked model before anything is handed out: in float64, with affine parameters and running
statistics shaken, so that defaults of zero and one hide nothing. If the two differ, the model is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torch_flowprune.coupling import Coupling, alive, coupling_of, reading_of
from torch_flowprune.exported import ExportedModule, argument_names, free_sizes, graft, recorded_calls, resized_graph
from torch_flowprune.graph import Reading, canonical_names, operator_name, read, twin
from torch_flowprune.resize import Surgery, attribute_plans, changed_sizes
from torch_flowprune.rules import RULES

__all__ = ["ShrinkError", "Surgery", "describe", "rebuild", "shrink"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class ShrinkError(RuntimeError):
    """The smaller model could not be built, or does not compute what the masked one does. The model is as it was."""


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
    """A smaller model without the dead channels of this one; its outputs are those of the masked model.

    A channel is dead where the masks leave nothing of its unit (see `coupling.alive`).

    masks: parameter name -> bool, True = kept. By default those that pruning left on the model (`weight_mask`), and
    where there are none, what is exactly zero counts as masked.
    coupling, reading: of the model without masks, where they are at hand (`coupling.reading_of`); else read from it.
    optimizer: its parameters are replaced by the new ones and its state (momentum) is sliced along.
    inplace: change this model; otherwise it stays as it was and a copy is returned.
    graph: where a module's own code can not take the new sizes (`reshape(B, N, C)` with C read off its input),
    replace the module by its exported graph, resized (`exported.ExportedModule`). With False, or in place, that is an
    error.

    Raises ShrinkError; the model, and the optimizer, are then as they were.
    """
    before = dict(model.named_parameters())
    dense, found = dense_copy(model)
    names = canonical_names(dense)
    given = {names[k]: v.bool() for k, v in {**found, **(masks or {})}.items()}
    apply_masks(dense, given)
    reading = reading or reading_of(dense, example_inputs, kwargs)
    coupling = coupling or coupling_of(reading)
    kept = alive(coupling, given or {n: p != 0 for n, p in dense.named_parameters()})
    surgery = Surgery(kept_positions(coupling, kept, dense), {})
    if surgery.keep:
        trial = Trial(dense, given, surgery, example_inputs, kwargs or {}, tolerance_of(reading))
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        small, surgery = attempt(Bench(dense, reading, surgery, trial, args, kwargs or {}), graph and not inplace)
    else:
        small = dense
    if inplace:
        take_out_masks(model)
        apply_masks(model, given)
        small = operated(model, surgery)
    if optimizer is not None:
        hand_over(optimizer, before, small, surgery)
    return small


@dataclass
class Bench:
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
        return dead_labels(self.reading, self.surgery)

    @cached_property
    def calls(self) -> dict[str, tuple[Any, Any]]:
        paths = [p for p in changed_sizes(self.reading, self.dead) if p]
        return recorded_calls(twin(self.dense).eval(), self.args, self.kwargs, paths)

    def build(self, model: nn.Module, surgery: Surgery, replaced: Collection[str] = ()) -> nn.Module:
        """`model`, a copy of the dense one, after surgery, with the modules at some paths replaced by their graphs."""
        small = operated(model, surgery)
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
                reading = read(module, args, kwargs, RULES, free_sizes(module, args, kwargs))
            except Exception:  # code that fixes its sizes: the graph is then for the example's
                reading = read(module, args, kwargs, RULES)
            keep = {
                n.removeprefix(f"{path}."): k
                for n, k in self.surgery.keep.items()
                if n.startswith(f"{path}." if path else "")
            }
            self.graphs[path] = (reading, dead_labels(reading, Surgery(keep, {})), argument_names(module, args, kwargs))
        return self.graphs[path]

    def tried(self, surgery: Surgery, replaced: Collection[str] = ()) -> tuple[Exception | None, nn.Module]:
        """The trial's model after surgery, and what is wrong with it."""
        small = self.trial.model
        try:
            small = self.build(copy.deepcopy(self.trial.model), surgery, replaced)
            self.trial.check(small)
        except Exception as e:  # whatever foreign code raises, this surgery does not fit
            return e, small
        return None, small

    def replacements(self, surgery: Surgery) -> list[str] | None:
        """Modules to replace by their graphs so that the model passes: found from where it fails, kind by kind."""
        replaced: list[str] = []
        while True:
            error, small = self.tried(surgery, replaced)
            if error is None:
                return replaced
            more = outermost([*replaced, *self.blamed(error, small)])
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


def outermost(paths: Sequence[str]) -> list[str]:
    """Without repeats, and without paths inside others."""
    return [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{q}.") for q in paths)]


def attempt(bench: Bench, graph: bool) -> tuple[nn.Module, Surgery]:
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


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


# -- what is dead ------------------------------------------


def kept_positions(coupling: Coupling, kept: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> axis -> (size,) bool, for the axes that lose something."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    out: dict[str, dict[int, Tensor]] = {}
    for group in coupling.groups:
        for s in group.slices:
            gone = s.index[~kept[group.name]].reshape(-1)
            if len(gone):
                size = tensors[s.parameter].shape[s.axis]
                left = out.setdefault(s.parameter, {}).setdefault(s.axis, torch.ones(size, dtype=torch.bool))
                left[gone] = False
                if not left.any():
                    raise ShrinkError(
                        f"nothing would be left of {s.parameter}: all {size} positions of axis {s.axis} are "
                        "dead; keep at least one unit of each group"
                    )
    return out


def dead_labels(reading: Reading, surgery: Surgery) -> Tensor:
    """(labels,) bool: True for every label that is joined to a position that goes."""
    roots = torch.zeros(reading.axes.count, dtype=torch.bool)
    for b in reading.axes.blocks:
        kept = surgery.keep.get(b.name, {}).get(b.axis)
        if kept is not None:
            roots[reading.solution.root[b.start : b.start + b.size][~kept]] = True
    return roots[reading.solution.root]


# -- surgery ------------------------------------------


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
                        new[full] = cut_tensor(surgery, full, tensor)
                    held[name] = new[full]
    for path, values in surgery.attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)
    return model


def cut_tensor(surgery: Surgery, name: str, tensor: Tensor) -> Tensor:
    small = surgery.cut(name, tensor.detach()).clone()
    if not isinstance(tensor, nn.Parameter):
        return small
    parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = surgery.cut(name, tensor.grad).clone()
    return parameter


def hand_over(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], small: nn.Module, surgery: Surgery
) -> None:
    """The optimizer goes on with the new parameters; state of a parameter's shape is cut as the parameter was."""
    after = dict(small.named_parameters())
    successor = {}
    for name, old in before.items():
        plain = name if name in after else name.removesuffix("_orig")
        successor[old] = (plain, after[plain])
    for group in optimizer.param_groups:
        group["params"] = [successor[p][1] if p in successor else p for p in group["params"]]
    for old, (name, new) in successor.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                k: surgery.cut(name, v).clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                for k, v in state.items()
            }


def dense_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy without pruning's masks (they are multiplied in), and the masks by the name of their parameter."""
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    dense = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    return dense, take_out_masks(dense)


def take_out_masks(model: nn.Module) -> dict[str, Tensor]:
    """Ends torch's pruning on a model as `torch.nn.utils.prune.remove` does; what the masks were."""
    masks = {}
    for path, module in model.named_modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            name = getattr(hook, "_tensor_name", None)
            if name is None or not hasattr(module, f"{name}_mask"):
                continue
            masks[f"{path}.{name}" if path else name] = getattr(module, f"{name}_mask").detach().bool()
            hook.remove(module)
            del module._forward_pre_hooks[key]
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


# -- proof ------------------------------------------


def tolerance_of(reading: Reading) -> float | None:
    """None for the default; wider where the model itself casts to a precision below float64."""
    for node in reading.programs["eval"].graph.nodes:
        if operator_name(node) in ("to", "_to_copy", "type_as") and any(
            d in (torch.float32, torch.float16, torch.bfloat16) for d in [*node.args, *node.kwargs.values()]
        ):
            return 1e-4
    return None


class Trial:
    """A shaken float64 copy of the masked model and its outputs, to hold smaller models against."""

    def __init__(
        self,
        dense: nn.Module,
        masks: Mapping[str, Tensor],
        surgery: Surgery,
        inputs: Any,
        kwargs: Mapping[str, Any],
        tolerance: float | None,
    ) -> None:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        for dtype in (torch.float64, torch.float32):
            self.model = shaken(copy.deepcopy(dense).to(dtype).eval(), surgery)
            apply_masks(self.model, masks)
            self.args, self.kwargs = tree_map(partial(cast, dtype=dtype), (args, dict(kwargs)))
            self.tolerance = max(tolerance or 0.0, TOLERANCE[dtype])
            try:
                self.expected = self.outputs(self.model)
                return
            except Exception as e:  # a model whose code insists on its own precision
                error = e
        raise ShrinkError(f"the model does not run on the example inputs: {first_line(error)}") from error

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """What the model gives, in the precision of the trial, with random numbers always the same."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            out = model(*tree_map(copy_tensor, self.args), **tree_map(copy_tensor, self.kwargs))
        return [t for t in tree_leaves(out) if isinstance(t, Tensor)]

    def check(self, small: nn.Module) -> None:
        found = self.outputs(small.eval())
        for a, b in zip(self.expected, found, strict=True):
            if a.shape != b.shape:
                raise ShrinkError(f"the smaller model's output has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
            error = relative_error(a, b)
            if not error <= self.tolerance:
                raise ShrinkError(f"the smaller model's output differs from the masked model's by {error:.1e}")


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def copy_tensor(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |a|; nan where either is not finite."""
    if not a.numel() or not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("nan")
    a, b = a.detach(), b.detach()
    scale = a.abs().max()
    return float((a - b).abs().max() / scale) if scale > 0 else float(b.abs().max())


def shaken(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Vectors (affine parameters, layer scales) and running statistics moved off their defaults; what goes is zero."""
    generator = torch.Generator().manual_seed(0)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(t.shape, generator=generator) * (high - low) + low).to(t)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.numel() and p.numel() == max(p.shape, default=1):
                p.mul_(uniform(p, 0.5, 1.5)).add_(uniform(p, -0.1, 0.1))
                for axis, kept in surgery.keep.get(name, {}).items():
                    p.index_fill_(axis, (~kept).nonzero().flatten().to(p.device), 0)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(uniform(b, -0.2, 0.2))
            elif name.endswith("running_var"):
                b.mul_(uniform(b, 0.5, 1.5))
    return model


# -- architecture ------------------------------------------


def describe(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """The architecture of `small` as a change of `dense`, as JSON takes it: the shapes and attributes that differ."""
    if any(isinstance(m, ExportedModule) for m in small.modules()):
        raise ShrinkError(
            "an exported graph has no dense constructor to be rebuilt from; save it with torch.save or torch.export"
        )
    tensors, attributes = dict(named_tensors(dense)), dict[str, dict[str, Any]]()
    shapes = {n: list(t.shape) for n, t in named_tensors(small) if t.shape != tensors[n].shape}
    for path, module in small.named_modules():
        old = vars(dense.get_submodule(path))
        changed = {k: v for k, v in vars(module).items() if is_size(v) and is_size(old.get(k)) and v != old[k]}
        if changed:
            attributes[path] = changed
    return {"shapes": shapes, "attributes": attributes}


def rebuild(dense: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """`dense` (changed in place) with the sizes of a description; `load_state_dict` then fills it."""
    names = canonical_names(dense)
    new: dict[str, Tensor] = {}
    for name in description["shapes"]:
        path, _, leaf = name.rpartition(".")
        module = dense.get_submodule(path)
        held = module._parameters if leaf in module._parameters else module._buffers
        old = held[leaf]
        assert old is not None
        if names[name] not in new:
            empty = old.detach().new_zeros(description["shapes"][name])
            new[names[name]] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        held[leaf] = new[names[name]]  # type: ignore[assignment]
    for path, values in description["attributes"].items():
        module = dense.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, type(getattr(module, name))(value))
    return dense


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_size(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(type(v) is int for v in value)
    return type(value) is int
