"""Modules whose parameters are gathered for a call, and when that call is over are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from torch_flowprune.gradients.sharding.calls import KeepsGraphError, UnitCall
from torch_flowprune.gradients.sharding.holders import Holders, Owner
from torch_flowprune.gradients.sharding.surroundings import Surroundings


class Unit:
    """A module whose parameters are whole only while it runs: it runs again wherever its derivative is taken.

    Where that would not be the same (it keeps part of the graph, writes to what it is given, reads tensors that it is
    not given), the parameters are gathered as part of the graph, and stay until that is gone.
    """

    def __init__(self, module: nn.Module, owners: Sequence[Owner]) -> None:
        self.module, self.holders, self.is_held = module, Holders(owners), False

    def around(self, forward: Callable[..., Any], share: Callable[[], float | None]) -> Callable[..., Any]:
        """The module's forward, under which its parameters are gathered."""

        @wraps(forward)
        def gathered_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and not self.is_held:
                surroundings = Surroundings(self.module)
                try:
                    return UnitCall(self.holders, forward, surroundings, share())(args, kwargs)
                except KeepsGraphError:
                    self.is_held = True
                    surroundings.restore()
            with self.holders.filled(self.holders.gathered(share())):
                return forward(*args, **kwargs)

        return gathered_forward
