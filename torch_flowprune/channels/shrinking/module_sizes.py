"""Sizes that a model's modules state in attributes, brought in line with smaller tensors.

Attributes (``in_channels``, ``num_heads``) are found by name for torch's own layers, and by value where the graph shows
that an operator of the module was given the old size. Nothing found by value is trusted: ``shrink`` runs the result
against the masked model, and tries another reading where several attributes of a module have the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations, islice
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from torch_flowprune.channels.shrinking.graphs import RESIZERS
from torch_flowprune.channels.shrinking.own_code import attributes_compared, attributes_of_parts_read, own_class
from torch_flowprune.channels.shrinking.surgery import Surgery
from torch_flowprune.channels.tracing import Reading, Value, flat, module_path, operator_name
from torch_flowprune.inputs import parameters_and_factors
from torch_flowprune.torch_internals import AnyConvolution, AnyStatisticsNorm

_WEIGHTS = ("weight_ih", "weight_hh")  # of the input and of the state, as all recurrent layers and cells call them

Attributes = dict[str, dict[str, Any]]


def attribute_plans(model: nn.Module, reading: Reading, dead: Tensor, sure: Attributes) -> list[Attributes]:
    """Plans to try, likeliest first: torch's own layers are certain, other modules' attributes are matched by value."""
    every = _matched_attributes(model, reading, dead)
    widths = _only(every, lambda path, name: _is_width(name))
    doubtful = _doubtful_names(model, widths)
    plans = [_only(widths, partial(_is_meant, model, left_out)) for left_out in _subsets(doubtful)]
    plans += [every, {}]
    if checked := _checked_attributes(model, reading, dead):
        plans = [{p: {**plan.get(p, {}), **checked.get(p, {})} for p in {**plan, **checked}} for plan in plans] + plans
    distinct: list[Attributes] = []
    for matched in plans:
        plan = changed_attributes(model, {p: {**matched.get(p, {}), **sure.get(p, {})} for p in {**sure, **matched}})
        if plan not in distinct:
            distinct.append(plan)
    return distinct


def changed_attributes(model: nn.Module, attributes: Attributes) -> Attributes:
    """Without those that a module states already."""
    changed = {
        path: {k: v for k, v in values.items() if getattr(model.get_submodule(path), k) != v}
        for path, values in attributes.items()
    }
    return {path: values for path, values in changed.items() if values}


def _is_meant(model: nn.Module, left_out: Collection[tuple[type, str]], path: str, name: str) -> bool:
    return (type_before_parametrizations(model.get_submodule(path)), name) not in left_out


def _only(attributes: Attributes, accepts: Callable[[str, str], bool]) -> Attributes:
    kept = {path: {k: v for k, v in values.items() if accepts(path, k)} for path, values in attributes.items()}
    return {path: values for path, values in kept.items() if values}


def _doubtful_names(model: nn.Module, attributes: Attributes) -> list[tuple[type, str]]:
    """(class, attribute) where another attribute of the same module had the same value, so that either may be meant."""
    doubtful: dict[tuple[type, str], None] = {}
    for path, values in attributes.items():
        module = model.get_submodule(path)
        old = [getattr(module, name) for name in values]
        for name in values:
            if old.count(getattr(module, name)) > 1:
                doubtful[type_before_parametrizations(module), name] = None
    return list(doubtful)


def _subsets(items: Sequence[Any], most: int = 5) -> list[set[Any]]:
    """The empty set first, then the smallest; a trial is a run of the model, so not many."""
    return [
        set(some) for some in islice(chain.from_iterable(combinations(items, n) for n in range(len(items) + 1)), most)
    ]


def _is_width(name: str) -> bool:
    """Names that sizes of channels go by; others (window_size, num_tokens) are matched only if these do not do."""
    return any(
        part in name
        for part in ("head", "dim", "chan", "feat", "group", "width", "hidden", "inner", "chs", "planes", "split")
    )


def layer_attributes(
    model: nn.Module, reading: Reading, dead: Tensor, surgery: Surgery, names: Mapping[str, str]
) -> Attributes:
    """What torch's own layers have to state, changed or not."""
    groups = {(module_path(n), what): int((~dead[labels]).sum()) for (n, what), labels in reading.counts.items()}
    computed = _computed_weights(model)
    plan: Attributes = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        held = {name: (names.get(f"{path}.{name}" if path else name, ""), tensor) for name, tensor in own}
        held |= computed.get(id(module), {})
        shapes = {name: surgery.shape(full, tensor.shape) for name, (full, tensor) in held.items()}
        changed = any(full in surgery.keep for full, _ in held.values())
        count = {what: n for (at, what), n in groups.items() if at == path}
        values = _sizes_of_layer(module, shapes, count) if changed else _sizes_of_bare_norm(path, module, reading, dead)
        values = {k: v for k, v in values.items() if hasattr(module, k)}
        if values:
            plan[path] = values
    return plan


def _computed_weights(model: nn.Module) -> dict[int, dict[str, tuple[str, Tensor]]]:
    """By the layer's id: of each weight that it computes the name and value of the largest factor, which has its shape.

    A length (``weight_g``) is smaller than a direction.
    """
    found: dict[int, dict[str, tuple[str, Tensor]]] = {}
    for target in sorted(parameters_and_factors(model).values(), key=lambda one: one.parameter.numel()):
        for layer, name in target.owners:
            if layer._parameters.get(name) is not target.parameter:
                found.setdefault(id(layer), {})[name] = target.name, target.parameter
    return found


def _sizes_of_layer(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], count: Mapping[str, int]
) -> dict[str, Any]:
    """The attributes of a layer that its tensors' shapes determine."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _sizes_of_recurrent(module, shapes)
    weight = shapes.get("weight") or shapes.get("running_mean") or ()
    if isinstance(module, AnyConvolution):
        groups = count.get("groups", module.groups)
        out, into = (1, 0) if module.transposed else (0, 1)
        sizes = {0: weight[0], 1: weight[1] * groups}
        return {"out_channels": sizes[out], "in_channels": sizes[into], "groups": groups}
    if len(weight) == 1:
        sizes_of_vectors = dict.fromkeys(("num_features", "num_channels", "num_parameters"), weight[0])
        return {**sizes_of_vectors, "normalized_shape": weight, **count}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if len(weight) == 2:
        # a transposed linear layer (transformers' Conv1D) has its sizes in attributes of other names
        return {"out_features": weight[0], "in_features": weight[1], "nf": weight[1], "nx": weight[0]}
    return {}


def _sizes_of_bare_norm(path: str, module: nn.Module, reading: Reading, dead: Tensor) -> dict[str, Any]:
    """Of a norm without a tensor of its own: what is left of the channels that it is called with."""
    called = reading.traced["eval"].calls.get(path, ())
    value = reading.values.get(called[0]) if called and called[0] is not None else None
    if not isinstance(module, AnyStatisticsNorm) or not isinstance(value, Value):
        return {}
    channels = [labels for labels in value.dims[:2] if len(labels) == module.num_features]
    return {"num_features": int((~dead[channels[-1]]).sum())} if channels else {}


def _sizes_of_recurrent(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A gate's rows stand under one another; the first layer's weights tell the sizes of all."""
    of_input, of_state = (next(shape for name, shape in shapes.items() if name.startswith(kind)) for kind in _WEIGHTS)
    rows = next(getattr(module, name) for name in shapes if name.startswith(_WEIGHTS[1])).shape[0]
    width = int(getattr(module, "hidden_size", 0))
    sizes = {"input_size": of_input[1], "hidden_size": of_state[0] * width // rows}
    return sizes | ({"proj_size": of_state[1]} if getattr(module, "proj_size", 0) else {})


def _matched_attributes(model: nn.Module, reading: Reading, dead: Tensor) -> Attributes:
    """Integers (and integers in tuples) that equal a size which shrinks in an operator of a module's forward.

    Those of the module, and those that its code reads of its parts.
    """
    plan: Attributes = {}
    for path, sizes in changed_sizes(reading, dead).items():
        module = model.get_submodule(path) if path else model
        for holder, name in _attributes_read(module):
            value = vars(module.get_submodule(holder)).get(name)
            new = _matched(value, sizes)
            if not name.startswith("_") and _is_changed(new, value):
                plan.setdefault(".".join(filter(None, (path, holder))), {})[name] = new
    return plan


def _checked_attributes(model: nn.Module, reading: Reading, dead: Tensor) -> Attributes:
    """Those that a module's code holds a size against which shrinks, of what it is called with or computes."""
    kinds: dict[str, Any] = {path: own_class(type(module)) for path, module in model.named_modules()}
    checked = {path: attributes_compared(kind) for path, kind in kinds.items()}
    seen: dict[str, list[Any]] = {path: [*reading.traced["eval"].calls.get(path, ())] for path in checked}
    for node in reading.values:
        seen.get(module_path(node), []).append(node)
    plan: Attributes = {}
    for path, names in checked.items():
        nodes = seen[path] if names else []
        sizes = _shrinking_sizes((v for node in nodes if node for v in flat(reading.values.get(node))), dead)
        held = {name: vars(model.get_submodule(path)).get(name) for name in names}
        new = {name: _matched(value, sizes) for name, value in held.items()}
        if changed := {name: value for name, value in new.items() if _is_changed(value, held[name])}:
            plan[path] = changed
    return plan


def _shrinking_sizes(values: Iterable[Value], dead: Tensor) -> dict[int, int]:
    """Old size -> new size of the dimensions that shrink; of several of one size that of the first."""
    sizes: dict[int, int] = {}
    for labels in (labels for value in values for labels in value.dims):
        alive = int((~dead[labels]).sum())
        if alive != len(labels):
            sizes.setdefault(len(labels), alive)
    return sizes


def _attributes_read(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The path of a part, or of the module itself as nothing, and the name of an attribute."""
    yield from (("", name) for name in vars(module))
    parts = dict(module.named_modules())
    kind: Any = own_class(type(module))
    for *names, name in attributes_of_parts_read(kind):
        if ".".join(names) in parts:
            yield ".".join(names), name


def _matched(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return sizes.get(value, value)
    if (
        isinstance(value, (tuple, list))
        and type(value) in (tuple, list)
        and value
        and all(type(v) is int for v in value)
    ):
        new = [sizes.get(v, v) for v in value]
        return tuple(new) if isinstance(value, tuple) else new
    return value


def _is_changed(new: Any, value: Any) -> bool:
    """What is no size was handed on as it is, a tensor that the module kept among it."""
    return new is not value and new != value


def changed_sizes(reading: Reading, dead: Tensor) -> dict[str, dict[int, int]]:
    """Module path -> old size -> new size, for the dimensions that operators with numbers of their own see in it."""
    sizes: dict[str, dict[int, int]] = {}
    for node, values in reading.values.items():
        if node.op != "call_function" or operator_name(node) not in RESIZERS:
            continue
        operands = [v for n in node.all_input_nodes for v in flat(reading.values.get(n))]
        for value in [*flat(values), *operands]:
            for labels in value.dims:
                alive = int((~dead[labels]).sum())
                if alive != len(labels):
                    sizes.setdefault(module_path(node), {}).setdefault(len(labels), alive)
    return sizes
