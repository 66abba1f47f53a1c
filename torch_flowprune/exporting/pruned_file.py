"""A pruned model as one safetensors file that any loader reads, and from which this package goes on.

The tensors have the names of the unpruned model, and zeros where it is pruned. The metadata say which of the zeros are
masked, and of a shrunk model what was changed of the dense one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels import describe, rebuild
from torch_flowprune.inputs import is_mask, mask_of, original, plain_name, with_names_of_state, write_tensors
from torch_flowprune.masking import dense_copy, load_state_dict, masks, pack, state_dict, unpack

_KEY = "torch_flowprune"


@dataclass(frozen=True)
class PrunedFile:
    """What such a file holds.

    Attributes:
        tensors: by name, as they are in the file.
        masks: by parameter name, True = kept.
        architecture: how a shrunk model differs from the dense one; None where it does not.
        facts: what else the writer said of it.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def loads_anywhere(self) -> bool:
        """Whether the names and shapes are those of the unpruned model, so that its own loader takes them."""
        return self.architecture is None and not any(is_mask(name, self.tensors) for name in self.tensors)

    @classmethod
    def of(cls, model: nn.Module, shrunk: nn.Module | None = None, **facts: Any) -> PrunedFile:
        """Of a pruned model, or of the smaller one that was made of it.

        Where zeros in a weight would not do what its mask does (standardised kernels), masks are tensors of the file,
        and a loader that does not know them refuses it.
        """
        source = with_names_of_state(model if shrunk is None else shrunk)
        try:
            dense, found = dense_copy(source)
        except ValueError:  # a mask that cannot be made permanent
            tensors, found = _on_host(state_dict(source)), {}
        else:
            tensors = _on_host(dense.state_dict())
        architecture = None if shrunk is None else describe(model, shrunk)
        return cls(tensors, {name: mask.cpu() for name, mask in found.items()}, architecture, facts)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> PrunedFile:
        """Any safetensors file; one of another writer has tensors alone.

        Raises:
            ValueError: for a file that is none, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                said = (file.metadata() or {}).get(_KEY, "{}")
            known = json.loads(said)
            found = _whole_again(tensors, known.get("kept", {}))
            found |= {name: _mask_of(tensors[name], bits) for name, bits in known.get("masks", {}).items()}
            return cls(tensors, found, known.get("architecture"), known.get("facts", {}))
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or not a file of pruned weights: {error}") from error

    def write(self, path: str | PathLike[str], *, kept_only: bool = False) -> None:
        """To a file; the same model gives the same bytes."""
        known = {"architecture": self.architecture, "facts": self.facts}
        if kept_only:
            shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
            write_tensors(path, _kept_values(self.tensors, self.masks), {**known, "kept": shapes})
        else:
            bits = {name: _mask_as_text(self.tensors[name], mask) for name, mask in self.masks.items()}
            write_tensors(path, self.tensors, {"masks": bits, **known})

    def load_into(self, model: nn.Module) -> nn.Module:
        """The model with these weights, masks and sizes; see :func:`load_pruned`."""
        if self.architecture is not None and masks(model):
            raise ValueError(
                f"this {type(model).__name__} is pruned, and the file is of a shrunk model: expected a new, dense one; "
                "fp.remove makes the masks of this one permanent"
            )
        tensors = dict(self.tensors)
        for name, mask in self.masks.items():
            tensors[original(name)] = tensors.pop(name)
            tensors[mask_of(name)] = mask
        if self.architecture is not None:
            self._check_sizes(model, self.architecture)
            rebuild(model, self.architecture)
        return load_state_dict(model, tensors)

    def _check_sizes(self, model: nn.Module, architecture: Mapping[str, Any]) -> None:
        """Before the model is given other sizes, or loses modules: a copy that has them holds what the file does."""
        rebuilt = rebuild(dense_copy(model)[0], architecture)
        expected = {name: list(value.shape) for name, value in rebuilt.state_dict().items()}
        names = {plain_name(name, self.tensors): name for name in self.tensors if not is_mask(name, self.tensors)}
        actual = {name: list(self.tensors[key].shape) for name, key in names.items()}
        if odd := [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]:
            raise ValueError(
                f"this file is of another model than {type(model).__name__}: {', '.join(odd[:5])} should be there, "
                "with the sizes of a shrunk one"
            )


def save_pruned(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    shrunk: nn.Module | None = None,
    kept_only: bool = False,
    **facts: Any,
) -> PrunedFile:
    """Write a pruned model as safetensors: the unpruned model's names, zeros in the weights, masks in the metadata.

    The unpruned model's own loader reads the file. :func:`load_pruned` also applies the masks, so that pruned weights
    stay pruned. The same model gives the same bytes.

    With ``kept_only=True`` the file has no zeros: for a masked weight it holds the kept values, in order, and the mask,
    one bit per weight. At a sparsity of 90 % it is about an eighth of the dense file. Only :func:`load_pruned` and the
    command line read it.

    Args:
        model: the pruned model; it stays as it is.
        path: the file.
        shrunk: the smaller model that :func:`~torch_flowprune.shrink` made of it, to be written instead.
        kept_only: leave out the zeros under masks. (Masks that cannot be made permanent, of standardised kernels, are
            always written beside whole weights.)
        facts: plain values to keep in the metadata.

    Returns:
        What was written.

    Raises:
        ShrinkError: for a shrunk model with exported graphs in it, which no constructor makes.
        ImportError: without safetensors, an extra.

    See Also:
        :func:`~torch_flowprune.load_pruned`: reads it back.
        :func:`~torch_flowprune.save_shrunk`: a shrunk model in one file.

    >>> import tempfile, torch_flowprune as fp
    >>> layer = nn.Linear(4, 2)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save_pruned(layer, f"{folder}/half.safetensors")
    ...     again = load_pruned(nn.Linear(4, 2), f"{folder}/half.safetensors")
    >>> list(written.tensors), int(fp.masks(again)["weight"].sum())
    (['weight', 'bias'], 4)
    """
    made = PrunedFile.of(model, shrunk, **facts)
    made.write(path, kept_only=kept_only)
    return made


def load_pruned(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Load a file of :func:`save_pruned`, :func:`~torch_flowprune.export` or the command line into a model.

    Args:
        model: a new model of the dense architecture; it gets the weights and the masks, and the sizes if the file is of
            a shrunk model, in place.
        path: the file; a file of another writer is loaded as it is.

    Returns:
        The model.

    Raises:
        ValueError: if the file is damaged or of another model; the model is as it was.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.ones(2, 3)
    >>> report = fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save_pruned(model, f"{folder}/small.safetensors", shrunk=fp.shrink(model, x))
    ...     dense = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    ...     load_pruned(dense, f"{folder}/small.safetensors")[0]
    Linear(in_features=3, out_features=4, bias=True)
    """
    return PrunedFile.read(path).load_into(model)


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
