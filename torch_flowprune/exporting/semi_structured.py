"""Linear layers that were pruned to 2:4 given to torch's kernels for it, layer by layer checked."""

from __future__ import annotations

from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from typing_extensions import Never

from torch_flowprune.inputs import check_keywords, parameters_of
from torch_flowprune.masking import export_ready
from torch_flowprune.torch_internals import semi_structured_sizes

_KEPT, _BLOCK = 2, 4


def to_semi_structured(model: nn.Module, *, strict: bool = True, **unknown: Never) -> nn.Module:
    """A copy whose 2:4-pruned linear layers run on torch's semi-structured kernels (``to_sparse_semi_structured``).

    The copy is for inference. Zeros in blocks alone make nothing faster. These kernels do, on NVIDIA GPUs since Ampere
    and for large layers.

    Args:
        model: pruned with ``granularity="2:4"``, on a GPU and in the precision for inference; it stays as it is.
        strict: whether a layer that is pruned to 2:4 but not supported by the kernels is an error; else it stays dense.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        The copy.

    Raises:
        ValueError: with the reason for each layer (a CPU, or a dtype, shape or pattern that the kernels do not
            support), or if no linear layer is pruned to 2:4.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes to 2:4, with ``granularity="2:4"``.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(64, 64)
    >>> report = fp.global_prune(layer, granularity="2:4")
    >>> fp.to_semi_structured(layer)  # on a CPU
    Traceback (most recent call last):
    ValueError: ...weight is on cpu: the kernels run on CUDA devices, so move the model there first...
    """
    check_keywords(to_semi_structured, unknown)
    masked = {name: target.owners for name, target in parameters_of(model).items() if target.mask is not None}
    paths = {name: path for path, module in model.named_modules() if (name := f"{path}.weight".lstrip(".")) in masked}
    linear = [name for name, path in paths.items() if isinstance(model.get_submodule(path), nn.Linear)]
    dense = export_ready(model)
    values = {name: dense.get_submodule(paths[name]).weight.detach() for name in linear}  # type: ignore[operator]
    blocks = {name: value for name, value in values.items() if _is_semi_structured(value)}
    if not blocks:
        raise ValueError(
            f"no linear layer is pruned to {_KEPT}:{_BLOCK}: global_prune(model, granularity='{_KEPT}:{_BLOCK}') does "
            "it; masks have to be on the model, so call this before remove"
        )
    odd = {name: reason for name, value in blocks.items() if (reason := _why_no_kernel(value))}
    if odd and (strict or len(odd) == len(blocks)):
        told = "; ".join(f"{name} {reason}" for name, reason in list(odd.items())[:5])
        raise ValueError(f"torch's 2:4 kernels do not take {len(odd)} of {len(blocks)} layers: {told}; {_remedy(odd)}")
    for name in blocks.keys() - odd.keys():
        module = dense.get_submodule(paths[name])
        module.weight = nn.Parameter(to_sparse_semi_structured(values[name]), requires_grad=False)
    return dense.eval()


def _is_semi_structured(value: Tensor) -> bool:
    """Whether of every four neighbours in a row two are zero at least."""
    if value.dim() != 2 or value.shape[1] % _BLOCK:
        return False
    return bool(((value != 0).view(-1, _BLOCK).sum(-1) <= _KEPT).all())


def _why_no_kernel(value: Tensor) -> str:
    """What of a weight torch's kernels do not take; empty where they do."""
    if value.device.type != "cuda":
        return f"is on {value.device}: the kernels run on CUDA devices, so move the model there first"
    sizes = semi_structured_sizes(value.dtype)
    if not sizes:
        return f"is {value.dtype}: the kernels take float16, bfloat16 and int8 (and float32 by CUTLASS)"
    if any(size < least or size % least for size, least in zip(value.shape, sizes, strict=True)):
        return f"has shape {tuple(value.shape)}: expected multiples of {sizes[0]} rows and {sizes[1]} columns"
    return ""


def _remedy(odd: dict[str, str]) -> str:
    if all("CUDA" in reason for reason in odd.values()):
        return "on a CPU there are none, and zeros are multiplied like any other number"
    return "strict=False leaves these dense; or prune others with include=, or model.half()"
