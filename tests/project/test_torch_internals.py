"""Torch's private names: each is there on this torch, does what it is used for, and is spelled in one file alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_flowprune import torch_internals as internals

PACKAGE = Path(__file__).parents[2] / "torch_flowprune"
HOME = PACKAGE / "torch_internals.py"
OF_EVERY_MODULE = {
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_load_from_state_dict",
}


class Named(internals.OperatorMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_every_module_has_the_registries():
    assert all(hasattr(nn.Module(), name) for name in OF_EVERY_MODULE)


def test_below_autograd_a_mode_sees_what_was_called_and_nothing_is_marked():
    x, layer = torch.ones(1, 2), nn.Linear(2, 2)
    with torch.no_grad(), internals.BelowAutograd(), Named() as mode:
        made = layer(x)
    assert mode.seen == [torch.ops.aten.linear.default]
    assert not made.is_inference()
    assert "bias" in [argument.name for argument in internals.schema_of(mode.seen[0]).arguments]
    assert internals.schema_of(len) is None


def test_a_mode_does_not_load_the_compiler():
    code = "import sys, torch_flowprune.gradients, torch_flowprune.channels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_a_function_transform_is_noticed():
    seen = []

    def function(x):
        seen.append(internals.in_function_transform())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    assert seen == [False, True]


@pytest.mark.parametrize("hardsigmoid", [*internals.HARDSIGMOIDS, internals.HARDSIGMOID_IN_PLACE])
def test_each_hardsigmoid_is_one(hardsigmoid):
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(hardsigmoid(x.clone()), nn.functional.relu6(x + 3) / 6)


def test_the_derivative_of_a_convolution():
    x, w = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    x.requires_grad_(), w.requires_grad_()
    y = nn.functional.conv1d(x, w)
    dy = torch.randn_like(y)
    dx, dw, db = internals.convolution_backward(dy, x, w, [4], [1], [0], [1], False, [0], 1, (True, True, True))
    expected = torch.autograd.grad(y, (x, w), dy)
    torch.testing.assert_close((dx, dw), expected)
    torch.testing.assert_close(db, dy.sum((0, 2)))


def test_the_derivative_of_a_batch_norm():
    x, norm = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), nn.BatchNorm1d(3).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(1, 2)
    y = norm(x)
    dy = torch.randn_like(y)
    given = (dy, x, norm.weight, norm.running_mean, norm.running_var, None, None, False, norm.eps, (True, True, True))
    torch.testing.assert_close(
        internals.batch_norm_backward(*given), torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)
    )


def test_an_unsafe_view_is_a_tensor_of_its_own_for_autograd():
    x = torch.randn(2, 3, requires_grad=True)
    view = internals.unsafe_view(x * 1, (6,))
    assert view.shape == (6,)
    assert not view._is_view()


def test_many_tensors_at_once():
    values = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
    ones = [torch.ones(1), torch.ones(2)]
    internals.foreach_add_(values, ones, alpha=2)
    internals.foreach_mul_(values, 2)
    internals.foreach_addcmul_(values, ones, ones, value=0.5)
    assert [value.tolist() for value in values] == [[6.5], [8.5, 10.5]]
    internals.foreach_copy_(values, ones)
    assert [value.tolist() for value in values] == [[1], [1, 1]]


def test_storages_are_told_apart():
    x, other = torch.zeros(4), torch.zeros(4)
    assert internals.storage_key(x.untyped_storage()) == internals.storage_key(x[1:].untyped_storage())
    assert internals.storage_key(x.untyped_storage()) != internals.storage_key(other.untyped_storage())


def test_a_hook_on_a_tensor_is_noticed():
    x = torch.ones(2, requires_grad=True)
    assert not internals.has_hooks(x)
    handle = x.register_hook(lambda grad: grad)
    assert internals.has_hooks(x)
    handle.remove()
    assert not internals.has_hooks(x)


@pytest.mark.parametrize(
    ("base", "kinds"),
    [
        (
            internals.AnyBatchNorm,
            (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d),
        ),
        (internals.AnyStatisticsNorm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)),
        (internals.AnyConvolution, (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.LazyConv2d)),
    ],
)
def test_the_kinds_have_their_base_class(base, kinds):
    assert all(issubclass(kind, base) for kind in kinds)
    assert not issubclass(nn.Linear, base)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_lists_its_weights(kind):
    layer = kind(2, 3)
    names = internals.names_of_flat_weights(layer)
    assert {name: id(value) for name, value in zip(names, getattr(layer, internals.FLAT_WEIGHTS), strict=True)} == {
        name: id(value) for name, value in layer.named_parameters()
    }
    layer._parameters["weight_hh_l0"] = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
    internals.list_flat_weights(layer)
    assert getattr(layer, internals.FLAT_WEIGHTS)[names.index("weight_hh_l0")] is layer.weight_hh_l0


def test_what_a_compiled_model_wraps_is_found():
    layer = nn.Linear(2, 2)
    assert internals.inside_compiled(torch.compile(layer, backend="eager")) is layer
    assert internals.inside_compiled(layer) is None


def test_hooks_of_a_tensor_run_for_another_that_has_their_registries():
    one, other, seen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), []
    handles = [
        one.register_hook(lambda gradient: seen.append(gradient.shape)),
        one.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.shape)),
    ]
    for kind in internals.HOOKS_OF_TENSORS:
        assert not getattr(other, kind)
        setattr(other, kind, getattr(one, kind))
    other.sum().backward()
    assert seen == [other.shape] * 2
    for handle in handles:
        handle.remove()
    other.sum().backward()
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_who_reads_a_graph_is_noticed():
    seen = []

    class Reading(nn.Module):
        def forward(self, x):
            seen.append(internals.is_read_as_a_graph())
            return x + 1

    model, x = Reading(), torch.ones(2)
    model(x)
    assert seen.pop() is False
    torch.jit.trace(model, x, check_trace=False)
    assert seen.pop() is True
    torch.func.vmap(model)(x)
    assert seen.pop() is True
    torch.export.export(model, (x,), strict=False)
    assert seen.pop() is True


def test_a_subclass_without_functions_computes_plain_tensors():
    class Own(Tensor):
        __torch_function__ = internals.NO_TORCH_FUNCTION

    assert type(torch.ones(2).as_subclass(Own) * 2) is Tensor


def test_the_names_that_wrappers_give():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for wrapped in (torch.compile(nn.Linear(2, 2)), checkpoint_wrapper(nn.Linear(2, 2))):
        assert set(dict(wrapped.named_children())) <= internals.NAMES_OF_WRAPPED


def test_who_runs_step_hooks():
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        def step(self):
            self.inner.step()

    inner, seen = torch.optim.SGD(nn.Linear(2, 2).parameters()), []
    inner.register_step_post_hook(lambda *_: seen.append(1))
    inner.step()
    assert seen == [1]
    assert internals.runs_step_hooks(inner)
    assert not internals.runs_step_hooks(Outer(inner))


@pytest.mark.parametrize("register", ["register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"])
def test_hooks_that_run_while_loading(register):
    layer = nn.Linear(2, 2)
    assert not internals.has_loading_hooks(layer)
    getattr(layer, register)(lambda *_: None)
    assert internals.has_loading_hooks(layer)


def test_what_was_compiled_is_found():
    model = nn.Linear(2, 2)
    assert internals.inside_compiled(torch.compile(model)) is model
    assert internals.inside_compiled(model) is None


def test_a_pruning_hook_names_its_tensor():
    layer = prune.random_unstructured(nn.Linear(2, 2), "bias", 1)
    (hook,) = layer._forward_pre_hooks.values()
    assert internals.tensor_name(hook) == "bias"
    internals.set_tensor_name(hook, "weight")
    with pytest.raises(ValueError, match="has to be pruned before"):
        prune.remove(layer, "bias")  # torch looks for hooks by the name


def test_nested_values():
    nested = {"a": torch.ones(1), "b": [torch.ones(2), "text"]}
    assert [len(leaf) for leaf in internals.registered_leaves(nested)] == [1, 2, 4]
    assert internals.tree_map(len, nested) == {"a": 1, "b": [2, 4]}
    assert internals.tree_map_only(Tensor, len, nested) == {"a": 1, "b": [2, "text"]}


def test_nested_values_are_taken_apart_and_put_together():
    leaves, structure = internals.tree_flatten({"a": 1, "b": [2, None]})
    assert leaves == [1, 2, None]
    assert internals.tree_unflatten([3, 4, 5], structure) == {"a": 3, "b": [4, 5]}
    assert structure != internals.tree_flatten({"a": 1, "b": (2, None)})[1]


def test_each_is_used():
    """By some module, or by the file itself: what nobody imports goes."""
    imported = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "torch_flowprune.torch_internals"
        for alias in node.names
    }
    assert sorted(internals.__all__) == sorted(imported)


def test_no_other_file_spells_one():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    ours = {name for path, tree in trees.items() if path != HOME for name in defined(tree)} - spelled(trees[HOME])
    spelled_out = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, tree in trees.items()
        if path != HOME
        for name in spelled(tree) - ours - OF_EVERY_MODULE
    }
    assert spelled_out == set()


def spelled(tree):
    """Private names as a file uses them: attributes of others, and what it imports from torch and in which modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not of_self(node):
            names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names.add(str(getattr(node.args[1], "value", "")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            names |= {*node.module.split("."), *(alias.name for alias in node.names)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def defined(tree):
    """Private names that a file defines: functions, attributes of ``self``, and the keys of a class's namespace."""
    nodes = list(ast.walk(tree))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and of_self(node)}
    keys = {getattr(key, "value", "") for node in nodes if isinstance(node, ast.Dict) for key in node.keys}
    return functions | attributes | keys


def of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_lbfgs_counts_its_parameters_anew():
    layers = [nn.Linear(2, 2), nn.Linear(1, 1)]
    optimizer = torch.optim.LBFGS(layers[0].parameters())
    optimizer.step(lambda: layers[0](torch.ones(1, 2)).square().sum())
    optimizer.param_groups[0]["params"][:] = layers[1].parameters()
    internals.forget_flat_size(optimizer)
    assert optimizer._numel() == 2
    internals.forget_flat_size(torch.optim.SGD(layers[0].parameters()))
