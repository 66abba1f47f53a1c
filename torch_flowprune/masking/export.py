"""What exporters and quantisers are given: a copy without masks that computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.inputs import call, check_keywords, example_of, parameters_of, tree_leaves, untouched, unwrapped
from torch_flowprune.masking.carrier import factors, permanent, same_bits
from torch_flowprune.masking.dense import dense_copy


def export_ready(model: nn.Module, example_inputs: Any = None, **unknown: Never) -> nn.Module:
    """A copy of the model with its masks made permanent, checked to be equal, to quantise, script or export.

    Some tools look at a module's exact class, its code or the names of its tensors, and do not recognise a masked
    layer: quantisation leaves it in float, TorchScript refuses it, and exporters keep the mask in the graph. The copy
    has ordinary modules with zeros. You can continue to train the model.

    Args:
        model: any module, pruned by this package or by torch's own functions; it stays as it is.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of them. If given,
            outputs in eval mode are compared too.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        The copy, in the train or eval mode of the model.

    Raises:
        ValueError: if masks cannot be made permanent, see :func:`~torch_flowprune.remove`, or if the copy differs.

    See Also:
        :func:`~torch_flowprune.remove`: makes masks permanent in place.
        :func:`~torch_flowprune.export`: writes a file and compares it.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(4, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> plain = fp.export_ready(layer, torch.ones(1, 4))
    >>> type(plain) is torch.nn.Linear, int((plain.weight == 0).sum()), fp.masks(layer).keys()
    (True, 4, dict_keys(['weight']))
    """
    check_keywords(export_ready, unknown)
    inner = unwrapped(model)
    dense, _ = dense_copy(inner)
    _check_tensors(inner, dense)
    if example_inputs is not None:
        _check_outputs(inner, dense, example_inputs)
    return dense


def _check_tensors(model: nn.Module, dense: nn.Module) -> None:
    """Every parameter of the copy against what the model's owner of it reads; every buffer."""
    copies = dict(chain(dense.named_parameters(), dense.named_buffers()))
    for name, value in _read(model):
        if name not in copies or not same_bits(value, copies.pop(name)):
            raise ValueError(_differs(name))
    if copies:
        raise ValueError(_differs(", ".join(list(copies)[:5])))


def _differs(what: str) -> str:
    return (
        f"the copy is not equal to the model: {what} differs, so the model computes it anew when it is read or copied; "
        "fp.remove the masks of the model itself"
    )


def _read(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters as a forward reads them, those that torch's functions masked as theirs does, and buffers."""
    known = parameters_of(model)
    masks = {id(target.mask) for target in known.values()}
    for name, target in known.items():
        module, attribute = target.owners[0]
        stale = target.mask is not None and attribute in module.__dict__  # torch's, until its next forward
        yield name, permanent(*factors(module, attribute)) if stale else getattr(module, attribute)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in masks)


def _check_outputs(model: nn.Module, dense: nn.Module, example_inputs: Any) -> None:
    theirs, ours = (tree_leaves(_output(one, example_inputs)) for one in (model, dense))
    for one, other in zip(theirs, ours, strict=True):
        if isinstance(one, Tensor) and not torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(_differs(f"the output, by up to {(one - other).abs().max().item():.3g},"))


def _output(model: nn.Module, example_inputs: Any) -> Any:
    device = next(model.parameters()).device
    with untouched(model), torch.no_grad():
        return call(model, example_of(None, example_inputs, device))
