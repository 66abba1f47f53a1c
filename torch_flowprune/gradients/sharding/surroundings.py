"""What a module's forward depends on besides its parameters and arguments: buffers, randomness, autocast, norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.operators import sound_norms
from torch_flowprune.inputs import randomness, same_randomness
from torch_flowprune.torch_internals import version_of


class _Buffer(NamedTuple):
    module: nn.Module
    key: str
    tensor: Tensor
    value: Tensor
    version: int


class Surroundings:
    """As they are when this is made, before a call: for that call to be made again."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.draw_again = module, randomness(module)
        self.device = next((value.device for value in module.parameters()), torch.device("cpu"))
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.buffers = [
            _Buffer(one, key, tensor, tensor.detach().clone(), version_of(tensor))
            for one in module.modules()
            for key, tensor in one._buffers.items()
            if tensor is not None
        ]

    def keep_what_changed(self) -> None:
        """After the call: of buffers that it left alone no copy is needed."""
        self.buffers = [
            one
            for one in self.buffers
            if one.module._buffers.get(one.key) is not one.tensor or version_of(one.tensor) != one.version
        ]

    def restore(self) -> None:
        """For good: as if the call had not been made."""
        self.draw_again()
        with torch.no_grad():
            for module, key, tensor, value, _ in self.buffers:
                module._buffers[key] = tensor
                tensor.copy_(value)

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """Inside, the call may be made again; what it draws and writes then leaves no trace."""
        now = [module._buffers[key] for module, key, *_ in self.buffers]
        with same_randomness(self.module), self.around():
            try:
                for module, key, _, value, _ in self.buffers:
                    module._buffers[key] = value.clone()
                self.draw_again()
                yield
            finally:
                for (module, key, *_), tensor in zip(self.buffers, now, strict=True):
                    module._buffers[key] = tensor

    @contextmanager
    def around(self) -> Iterator[None]:
        """The autocast that was on, without its cache, which would hold whole weights; norms that can be trusted."""
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype, enabled, cache_enabled=False), sound_norms(self.device):
            yield
