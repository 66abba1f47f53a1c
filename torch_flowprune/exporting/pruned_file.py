"""A pruned model, masked or shrunk, as one safetensors file, from which this package goes on.

The tensors have the names of the unpruned model, and zeros where it is pruned, so that other loaders read the file of a
masked model. The metadata say which of the zeros are masked, and what the model is beside its tensors.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels import canonical_names, made_like, own_description
from torch_flowprune.inputs import (
    check_folder,
    check_keywords,
    has_words,
    is_mask,
    mask_of,
    original,
    plain_name,
    plain_tensors,
    read_tensors,
    shards_of,
    unwrapped,
    with_names_of_state,
    write_tensors,
)
from torch_flowprune.masking import dense_copy, load_state_dict, pack, state_dict, unpack


@dataclass(frozen=True)
class PrunedFile:
    """What such a file holds.

    Attributes:
        tensors: by name, as they are in the file.
        masks: by parameter name, True = kept.
        architecture: what the model says of its sizes and of modules that were replaced; None in a file of another
            writer.
        facts: what else the writer said of it.
        tied: further names of tensors that have several.
        path: where it was read from.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tied: Collection[str] = ()
    path: str = "the file"

    @property
    def masks_apart(self) -> bool:
        """Whether masks are tensors of their own, which a loader that does not know them refuses."""
        return any(is_mask(name, self.tensors) for name in self.tensors)

    @classmethod
    def of(cls, model: nn.Module, facts: Mapping[str, Any] | None = None) -> PrunedFile:
        """Of a pruned model, masked or shrunk.

        Where zeros in a weight would not do what its mask does (standardised kernels), masks are tensors of the file,
        and a loader that does not know them refuses it.
        """
        source = with_names_of_state(unwrapped(model))
        if shards_of(source):
            raise ValueError(
                "save_pruned writes whole tensors to one file, and this model is sharded: fp.load_state_dict its full "
                "state dict into a model that is not sharded and save that, or save the shards with "
                "torch.distributed.checkpoint"
            )
        said = own_description(source)
        try:
            dense, found = dense_copy(source)
        except ValueError:  # a mask that cannot be made permanent
            dense, found, state = source, {}, state_dict(source)
        else:
            state = dense.state_dict()
        if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ValueError(
                f"the state dict holds values that are no tensors ({', '.join(odd[:5])}): save it with torch.save"
            )
        buffers = dict(dense.named_buffers())
        tensors = _on_host({**state, **{name: buffers[name] for name in said["beside"]}})
        tied = [name for name, first in canonical_names(dense).items() if name != first and name in tensors]
        return cls(tensors, {name: mask.cpu() for name, mask in found.items()}, said, dict(facts or {}), tied)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> PrunedFile:
        """Any safetensors file; one of another writer has tensors alone.

        Raises:
            ValueError: for a file that is none, or is damaged.
        """
        if not has_words(path):
            return cls(plain_tensors(path), path=str(path))
        tensors, known = read_tensors(path, "pruned model", "fp.save_pruned")
        try:
            found = _whole_again(tensors, known.get("kept", {}))
            found |= {name: _mask_of(tensors[name], bits) for name, bits in known.get("masks", {}).items()}
            return cls(tensors, found, dict(known["architecture"]), known["facts"], path=str(path))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or holds no pruned model: {error}") from error

    def write(self, path: str | PathLike[str], *, kept_only: bool = False) -> None:
        """To a file; the same model gives the same bytes."""
        known = {"architecture": self.architecture, "facts": self.facts}
        if kept_only:
            shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
            once = {name: value for name, value in self.tensors.items() if name not in self.tied}
            write_tensors(path, _kept_values(once, self.masks), {**known, "kept": shapes})
        else:
            bits = {name: _mask_as_text(self.tensors[name], mask) for name, mask in self.masks.items()}
            write_tensors(path, self.tensors, {"masks": bits, **known})

    def load_into(self, model: nn.Module) -> nn.Module:
        """The model with these weights, masks and sizes; see :func:`load_pruned`."""
        if self.architecture is None:
            return load_state_dict(model, self.tensors)
        inner = with_names_of_state(unwrapped(model))
        values = {plain_name(k, self.tensors): v for k, v in self.tensors.items() if not is_mask(k, self.tensors)}
        made = made_like(inner, values, self.architecture, self.path)
        beside = self.architecture["beside"]
        state = {name: value for name, value in self.tensors.items() if name not in beside}
        for name, mask in self.masks.items():
            state[original(name)] = state.pop(name)
            state[mask_of(name)] = mask
        load_state_dict(made, state, lift_masks=True)
        buffers = dict(made.named_buffers())
        for name in beside:
            if name in buffers:  # some are made when they are first needed
                buffers[name].copy_(self.tensors[name])
        return model if made is inner else made


def save_pruned(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    kept_only: bool = False,
    facts: Mapping[str, Any] | None = None,
    **unknown: Never,
) -> PrunedFile:
    """Write a pruned model, masked or shrunk, to one safetensors file, which :func:`load_pruned` reads.

    The file has the unpruned model's names, with zeros where weights are masked. So the unpruned model's own loader
    reads the file of a masked model; :func:`load_pruned` also applies the masks, so that pruned weights stay pruned. Of
    a shrunk model the file also says the sizes, so that :func:`load_pruned` makes a dense model smaller. The same model
    gives the same bytes.

    With ``kept_only=True`` the file has no zeros: for a masked weight it holds the kept values, in order, and the mask,
    one bit per weight. At a sparsity of 90 % it is about an eighth of the dense file. Only :func:`load_pruned` and the
    command line read it.

    Args:
        model: the pruned model, or the result of :func:`~torch_flowprune.shrink`, fine-tuned or not; it stays as it is.
        path: the file.
        kept_only: leave out the zeros under masks, and all names but the first of a tied tensor. (Masks that cannot be
            made permanent, of standardised kernels, are always written beside whole weights.)
        facts: plain values to keep in the metadata, by name.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        What was written.

    Raises:
        ShrinkError: for a shrunk model with exported graphs in it, which no constructor makes.
        TypeError: for what is no model, facts that JSON does not take, or an unknown keyword.
        ValueError: if the state dict holds a value that is not a tensor.
        FileNotFoundError: if the folder of the path does not exist.
        ImportError: without safetensors, an extra.

    See Also:
        :func:`~torch_flowprune.load_pruned`: reads it back.
        :func:`~torch_flowprune.describe`: the architecture of a shrunk model alone.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(4, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = fp.save_pruned(layer, f"{folder}/half.safetensors")
    ...     again = fp.load_pruned(torch.nn.Linear(4, 2), f"{folder}/half.safetensors")
    >>> list(written.tensors), int(fp.masks(again)["weight"].sum())
    (['weight', 'bias'], 4)
    """
    check_keywords(save_pruned, unknown)
    check_folder(path)
    _check_facts(facts)
    made = PrunedFile.of(model, facts)
    made.write(path, kept_only=kept_only)
    return made


def load_pruned(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Load a file of :func:`save_pruned`, :func:`~torch_flowprune.export` or the command line into a model.

    Args:
        model: a new model of the dense architecture, or one like that in the file; it gets the weights, the masks and
            the sizes of the file, in place.
        path: the file; a file of another writer is loaded as it is.

    Returns:
        The model.

    Raises:
        TypeError: for what is no model, or no path.
        ValueError: if the file is damaged or of another model; nothing is loaded then.
        FileNotFoundError: if there is no such file.
        ImportError: without safetensors, an extra.

    See Also:
        :func:`~torch_flowprune.save_pruned`: writes such a file.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.ones(2, 3)
    >>> report = fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = fp.save_pruned(fp.shrink(model, x), f"{folder}/small.safetensors")
    ...     dense = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    ...     fp.load_pruned(dense, f"{folder}/small.safetensors")[0]
    Linear(in_features=3, out_features=4, bias=True)
    """
    unwrapped(model)
    return PrunedFile.read(path).load_into(model)


def _check_facts(facts: Any) -> None:
    if facts is not None and not isinstance(facts, Mapping):
        raise TypeError(f"facts should be plain values by name, got {facts!r}")
    try:
        json.dumps(facts)
    except TypeError as error:
        raise TypeError(f"facts should be plain values by name, which JSON takes: {error}") from error


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor alone in its memory: loaders want a tied weight under each of its names."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _kept_values(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what is masked the kept values and the packed mask, under torch's names for the two; all else as it is."""
    written = {name: value for name, value in tensors.items() if name not in masks}
    for name, mask in masks.items():
        written |= {original(name): tensors[name][mask], mask_of(name): pack(mask)}
    return written


def _whole_again(tensors: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Undo :func:`_kept_values`, in place; returns the masks."""
    found = {}
    for name, shape in shapes.items():
        mask = found[name] = unpack(tensors.pop(mask_of(name)), torch.Size(shape))
        kept = tensors.pop(original(name))
        if kept.shape != (int(mask.sum()),):
            raise ValueError(f"{name} should have {int(mask.sum())} kept values, got {kept.numel()}")
        tensors[name] = torch.zeros(mask.shape, dtype=kept.dtype).masked_scatter_(mask, kept)
    return found


def _mask_as_text(value: Tensor, mask: Tensor) -> str:
    """A mask as text: empty where the zeros of the tensor tell it, else its packed bits."""
    return "" if torch.equal(value != 0, mask) else base64.b64encode(pack(mask).numpy().tobytes()).decode()


def _mask_of(value: Tensor, bits: str) -> Tensor:
    if not bits:
        return value != 0
    return unpack(torch.frombuffer(bytearray(base64.b64decode(bits)), dtype=torch.uint8), value.shape)
