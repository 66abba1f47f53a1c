"""Modules written for sizes that a class cannot state, by the class that they stand in for; users add their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.graphs import graft
from torch_flowprune.channels.shrinking.own_code import Edits, with_edits
from torch_flowprune.channels.shrinking.surgery import Surgery
from torch_flowprune.channels.shrinking.written.narrow_attention import NarrowAttention
from torch_flowprune.channels.shrinking.written.narrow_norms import NARROW_NORMS, narrowed

KeptRows = Mapping[str, Mapping[int, Tensor]]
Writer = Callable[[Any, KeptRows], nn.Module]


def _without_nested_tensors(encoder: nn.TransformerEncoder, kept: KeptRows) -> nn.TransformerEncoder:  # noqa: ARG001
    """Torch packs padded inputs where the first layer can take them so; a later one may not."""
    if any(isinstance(module, NarrowAttention) for module in encoder.modules()):
        encoder.use_nested_tensor = False
    return encoder


_WRITERS: dict[type[nn.Module], Writer] = {
    nn.MultiheadAttention: NarrowAttention.of,
    NarrowAttention: NarrowAttention.of,
    nn.TransformerEncoder: _without_nested_tensors,
    **dict.fromkeys((*NARROW_NORMS, *NARROW_NORMS.values()), narrowed),
}


def register(cls: type[nn.Module], writer: Writer | None) -> None:
    """Register how to update a module of your class when ``shrink`` cuts its tensors.

    ``shrink`` calls the writer before it tries anything else, and proves the result like any other. Use it if the sizes
    of a module are not in its attributes.

    Args:
        cls: the class; subclasses with their own forward are not included.
        writer: a function of the module, whose tensors and layers already have their new sizes, and of what was kept of
            each tensor (name -> axis -> bool). It returns the same module with updated attributes, or a replacement
            with parameters of the same names. None removes the registration.

    Raises:
        TypeError: if ``cls`` is not a module class.

    >>> import torch, torch_flowprune as fp
    >>> class Heads(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.split = {"heads": 4}
    ...         self.out = torch.nn.Linear(8, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(x.unflatten(-1, (self.split["heads"], -1)).relu().flatten(-2))
    >>> def narrower(module, kept):
    ...     heads = kept["out.weight"][1].view(module.split["heads"], -1).any(-1)
    ...     module.split = {"heads": int(heads.sum())}
    ...     return module
    >>> fp.channels.register(Heads, narrower)
    >>> fp.channels.register(Heads, None)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls should be a class of modules, got {cls!r}")
    if writer is None:
        _WRITERS.pop(cls, None)
    else:
        _WRITERS[cls] = writer


def _writer_of(module: nn.Module) -> Writer | None:
    """The writer of a module's class, or of one that it took its forward from."""
    kinds = (kind for kind in type(module).__mro__ if kind in _WRITERS)
    return next((_WRITERS[kind] for kind in kinds if kind.forward is type(module).forward), None)


def written(model: nn.Module, surgery: Surgery) -> nn.Module:
    """A model after surgery, with what was written for its new sizes in it; inner modules first."""
    for path in written_paths(model, surgery):
        module = model.get_submodule(path)
        writer = _writer_of(module)
        assert writer is not None
        new = writer(module, _keep_inside(surgery, path))
        if new is not module:
            new.written_for = f"{type(module).__module__}.{type(module).__qualname__}"  # type: ignore[assignment]
            model = graft(model, path, new)
    return _edited_inside(model, surgery.code)


def _edited_inside(model: nn.Module, code: Mapping[str, Edits]) -> nn.Module:
    """The model, with modules of the same classes whose code says other numbers."""
    for path, edits in code.items():
        module = model.get_submodule(path)
        module.__class__ = with_edits(type(module), edits)
    return model


def written_paths(model: nn.Module, surgery: Surgery) -> list[str]:
    """The modules that a writer is asked for: those in which something is cut."""
    return [
        path
        for path, module in reversed(list(model.named_modules()))
        if (writer := _writer_of(module)) is not None
        and (path in surgery.spans if writer is narrowed else _keep_inside(surgery, path))
    ]


def paths_of_written(model: nn.Module) -> list[str]:
    """The modules that stand where one of another class was."""
    return [path for path, module in model.named_modules() if "written_for" in vars(module)]


def written_anew(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """A dense model with written modules at these paths that have all of the dense ones' sizes.

    Raises:
        ValueError: where nothing is written for the class of a module.
    """
    for path in paths:
        module = model.get_submodule(path)
        writer = _writer_of(module)
        if writer is None:
            raise ValueError(
                f"{path or 'the model itself'} was written for {type(module).__name__}, and here no writer is "
                "registered for that class: call fp.channels.register first"
            )
        all_of_it = {
            name: {axis: torch.ones(n, dtype=torch.bool) for axis, n in enumerate(tensor.shape)}
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        new = writer(module, all_of_it)
        new.written_for = f"{type(module).__module__}.{type(module).__qualname__}"  # type: ignore[assignment]
        model = graft(model, path, new)
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        _without_nested_tensors(encoder, {})
    return model


def _keep_inside(surgery: Surgery, path: str) -> dict[str, Mapping[int, Tensor]]:
    prefix = f"{path}." if path else ""
    inside = {name.removeprefix(prefix): kept for name, kept in surgery.keep.items() if name.startswith(prefix)}
    return {**inside, **({"": surgery.spans[path]} if path in surgery.spans else {})}
