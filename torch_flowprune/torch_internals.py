"""Every private name of torch that the package uses, once, with what it is for.

A private name may change in any release, and a test has each on the oldest and the newest torch. Not here are the
registries of a module (``_parameters``, ``_buffers``, ``_modules``, ``_forward_pre_hooks``, ``_forward_hooks``) and
``_load_from_state_dict``: private by their looks, and what every extension of ``nn.Module`` is written against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

# These go through nested values as ``torch.export`` does, users' own registered classes among them.
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten
from torch.utils._pytree import tree_leaves as registered_leaves

__all__ = [
    "FLAT_WEIGHTS", "HARDSIGMOIDS", "HARDSIGMOID_IN_PLACE", "HOOKS_OF_TENSORS", "NAMES_OF_WRAPPED", "NO_TORCH_FUNCTION",
    "SAME_WIDTHS", "AnyBatchNorm", "AnyConvolution", "AnyDropout", "AnyStatisticsNorm", "BelowAutograd",
    "MemoryWeakRef", "OperatorMode", "ShardedParameter", "batch_norm_backward", "convolution_backward",
    "differentiate", "foreach_add_", "foreach_addcmul_", "foreach_copy_", "foreach_mul_", "forget_flat_size",
    "forward_hooks_of_sharding", "fused_weight_norm", "has_hooks", "has_loading_hooks", "in_function_transform",
    "inside_compiled", "is_read_as_a_graph", "keep_where_positive", "list_flat_weights", "made_of_operators",
    "names_of_flat_weights", "past_modes", "registered_leaves", "runs_step_hooks", "schema_of",
    "semi_structured_sizes", "set_tensor_name", "sharded_parameters", "storage_key", "tensor_name", "to_copy",
    "tree_flatten", "tree_map", "tree_map_only", "tree_unflatten", "unsafe_view", "version_of",
]  # fmt: skip

# -- operators, as they run ------------------------------------------


class MemoryWeakRef(StorageWeakRef):
    """Whether a tensor's memory is still there. Torch's compiler may make one empty, which complains when it goes."""

    def __init__(self, memory: torch.UntypedStorage) -> None:
        super().__init__(memory)  # type: ignore[no-untyped-call]

    def __del__(self) -> None:
        if "_free_weak_ref" in vars(self):
            super().__del__()  # type: ignore[no-untyped-call]


class OperatorMode(TorchDispatchMode):
    """Sees every operator that runs inside; torch's public modes see the functions that called them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: newer torch would import its compiler for that, a hundred times the time of a small model's graph."""
        return False


# Autograd left out, and nothing marked as `inference_mode` would mark it: the model may keep what is made inside.
BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd


def made_of_operators(function: Any) -> FunctionType:
    """A copy of a function of ``torch.nn.functional`` that hands itself to no mode: the mode sees what it calls."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def past_modes(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of (context, saved tensors, gradients) that no mode looks at, but while hidden blocks run again.

    Run inside of a mode of torch's functions, it would ask it for every tensor's shape.
    """

    def past(ctx: Any, *gradients: Any) -> Any:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return backward(ctx, saved, *gradients)

    return past


def in_function_transform() -> bool:
    """Whether ``torch.func`` (grad, vmap, ...) is at work, under which no autograd function of ours may run."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_read_as_a_graph() -> bool:
    """Whether somebody reads a graph off the code that runs: a compiler, a trace, a mode, derivatives forward."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or in_function_transform()
        or bool(torch._C._is_tracing())
        or torch.autograd.forward_ad._current_level >= 0
    )


# What a subclass of tensors says to be none to torch's functions: its operators run, and give plain tensors.
NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl


def schema_of(target: Any) -> Any:
    """An operator's statement of its arguments: names, defaults, what is written to; None for what has none."""
    return getattr(target, "_schema", None)


# All that ``hardsigmoid`` is called by: ``nn.Hardsigmoid`` and others go past the public function.
HARDSIGMOIDS: tuple[Any, ...] = (functional.hardsigmoid, torch._C._nn.hardsigmoid)
HARDSIGMOID_IN_PLACE: Any = torch._C._nn.hardsigmoid_

# What ``torch.nn.utils.weight_norm`` and the parametrization of this name compute weights by.
fused_weight_norm: Callable[..., Tensor] = torch._weight_norm

# Derivatives by themselves, which autograd else takes of the forward, and a view that autograd takes for a new tensor.
convolution_backward: Callable[..., Any] = torch.ops.aten.convolution_backward
batch_norm_backward: Callable[..., Any] = torch.ops.aten.native_batch_norm_backward
unsafe_view: Callable[..., Any] = torch.ops.aten._unsafe_view
# ``relu``'s derivative: of (value, key, 0) the value where the key is over 0, else 0, whatever the value is.
keep_where_positive: Callable[..., Any] = torch.ops.aten.threshold_backward.default
# What `.to(dtype)` is to a dispatch mode: the same values in another type.
to_copy: Callable[..., Any] = torch.ops.aten._to_copy

# One call for many tensors, as torch's optimizers make: on an accelerator the calls are what takes the time.
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_addcmul_: Callable[..., None] = torch._foreach_addcmul_
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_mul_: Callable[..., None] = torch._foreach_mul_


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with modes left on: that one is an operator too, and modes are off inside operators.

    A block that is checkpointed runs again inside, and has to run as it did the first time.
    """
    engine = torch.autograd.Variable._execution_engine
    kept = retain_graph or create_graph
    return engine.run_backward(
        tuple(outputs), tuple(vectors), kept, create_graph, tuple(inputs), True, accumulate_grad=False
    )


# -- tensors ------------------------------------------


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells storages apart: each call of ``untyped_storage`` wraps one anew, and empty ones share a data_ptr."""
    return storage._cdata  # type: ignore[no-any-return]


# How often a tensor has been written to. The getter itself: it is asked for at every access to a masked weight.
version_of: Callable[[Tensor], int] = Tensor._version.__get__  # type: ignore[attr-defined]


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody waits for the tensor's gradient."""
    return bool(tensor._backward_hooks)


# What waits for a tensor's gradient: functions of the gradient, and of the tensor once it holds it.
HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")


# -- modules ------------------------------------------

# The base classes that all kinds have in common, lazy and synchronised ones and those of other libraries among them.
AnyBatchNorm = nn.modules.batchnorm._BatchNorm
AnyStatisticsNorm = nn.modules.batchnorm._NormBase  # batch norms, and instance norms
AnyConvolution = nn.modules.conv._ConvNd
AnyDropout = nn.modules.dropout._DropoutNd

# The attribute of ``nn.MultiheadAttention`` without which torch's fused kernels for inference leave a module alone.
SAME_WIDTHS = "_qkv_same_embed_dim"

# Recurrent layers keep a list of their weights beside the registry, and compute with that.
FLAT_WEIGHTS = "_flat_weights"


def names_of_flat_weights(layer: nn.RNNBase) -> list[str]:
    """The names of a recurrent layer's weights, in the order of its list."""
    return layer._flat_weights_names


def list_flat_weights(layer: nn.RNNBase) -> None:
    """Make a recurrent layer's list of weights again."""
    layer._init_flat_weights()


# Under what names compiled, checkpointed and sharded modules are held by what wraps them.
NAMES_OF_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def inside_compiled(model: nn.Module) -> Any:
    """The module that ``torch.compile`` wrapped; None for one that is not compiled."""
    return model._modules["_orig_mod"] if "_orig_mod" in model._modules else None  # noqa: SIM401 - scripted: no get


def has_loading_hooks(module: nn.Module) -> bool:
    """Whether somebody's functions run before or after the module loads a state."""
    return bool(module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)


def tensor_name(hook: Any) -> str:
    """The tensor that a hook of ``torch.nn.utils.prune`` masks; torch's own functions find hooks by it.

    Of any other hook an empty name.
    """
    return getattr(hook, "_tensor_name", "")


def set_tensor_name(hook: Any, name: str) -> None:
    """Make a hook the one of this tensor, as torch's ``apply`` does."""
    hook._tensor_name = name


def forward_hooks_of_sharding(module: Any) -> set[int]:
    """The numbers of the hooks by which it gathers a module's parameters before a forward, and frees them after."""
    state = module._get_fsdp_state()
    two = state._pre_forward_hook_handle, state._post_forward_hook_handle
    return {one.id for handle in two for one in getattr(handle, "handles", (handle,))}


class ShardedParameter(NamedTuple):
    """The ranks that ``fully_shard`` cut it over, along which axis, its size before on each, how it was laid then."""

    parameter: nn.Parameter
    mesh: Any
    axis: int
    size: torch.Size
    before: Any
    in_fewer_digits: bool
    on_host: bool


def sharded_parameters(module: Any) -> list[ShardedParameter]:
    """Those that are gathered when this module runs."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.6 has one, or none
    return [
        ShardedParameter(
            one.sharded_param,
            one.mesh_info.mesh,
            one.fsdp_placement.dim,
            one._orig_size,
            getattr(one, "_unsharded_dtensor_spec", None),
            one.mp_policy.param_dtype not in (None, one.sharded_param.dtype),
            one.offload_to_cpu,
        )
        for group in filter(None, groups)
        for one in group.fsdp_params
    ]


# -- kernels for sparse tensors ------------------------------------------


def semi_structured_sizes(dtype: torch.dtype) -> tuple[int, int] | None:
    """What rows and columns of a 2:4 weight are multiples of, for the kernels that torch uses; None for no kernel."""
    cutlass = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    kind: Any = (
        torch.sparse.SparseSemiStructuredTensorCUTLASS if cutlass else torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    )
    found = kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    return None if found is None else (found.sparse_min_rows, found.sparse_min_cols)


# -- optimizers ------------------------------------------


def runs_step_hooks(optimizer: Any) -> bool:
    """Whether hooks run after the optimizer's steps.

    ``Optimizer.__init__`` sees to it; a wrapper that is an ``Optimizer`` by name alone may take hooks and run none.
    """
    return bool(getattr(type(optimizer).step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")


def forget_flat_size(optimizer: torch.optim.Optimizer) -> None:
    """``LBFGS`` counts its parameters once: it counts anew when they have been replaced."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None
