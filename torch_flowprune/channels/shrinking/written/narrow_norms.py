"""Norms of fewer channels than their statistics are over: what torch's own classes cannot state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.shrinking.own_code import forward_over


class NarrowLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` after channels were removed; these count as zeros in the mean and the variance.

    Attributes:
        dense_width: the dense number of channels, by which sums over channels are divided.

    :func:`~torch_flowprune.shrink` puts it in the place of torch's norm, whose statistics would be over fewer channels.

    >>> import torch, torch_flowprune as fp
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> report = fp.global_prune(net, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> fp.shrink(net, x)[1]  # doctest: +ELLIPSIS
    NarrowLayerNorm((4,), eps=1e-05, elementwise_affine=True, ... dense_width=8)
    """

    dense_width: int

    def forward(self, input: Tensor) -> Tensor:
        """The same as that of ``nn.LayerNorm``, on the channels that are left."""
        return forward_over(-1, self.dense_width, self, input)

    def extra_repr(self) -> str:
        """That of torch's norm, and the dense width."""
        return f"{super().extra_repr()}, dense_width={self.dense_width}"


class NarrowRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` after channels were removed; these count as zeros in the mean square.

    Attributes:
        dense_width: the dense number of channels, by which sums over channels are divided.

    :func:`~torch_flowprune.shrink` puts it in the place of torch's norm, whose statistics would be over fewer channels.

    >>> import torch, torch_flowprune as fp
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> report = fp.global_prune(net, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> fp.shrink(net, x)[1]  # doctest: +ELLIPSIS
    NarrowRMSNorm((4,), eps=None, elementwise_affine=True, dense_width=8)
    """

    dense_width: int

    def forward(self, x: Tensor) -> Tensor:
        """The same as that of ``nn.RMSNorm``, on the channels that are left."""
        return forward_over(-1, self.dense_width, self, x)

    def extra_repr(self) -> str:
        """That of torch's norm, and the dense width."""
        return f"{super().extra_repr()}, dense_width={self.dense_width}"


class NarrowGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with one group, after channels were removed; these count as zeros in the mean and the variance.

    Attributes:
        dense_width: the dense number of channels, by which sums over channels are divided.

    :func:`~torch_flowprune.shrink` puts it in the place of torch's norm, whose statistics would be over fewer channels.

    >>> import torch, torch_flowprune as fp
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.GroupNorm(1, 8), torch.nn.Conv2d(8, 2, 1))
    >>> x = torch.randn(3, 3, 4, 4)
    >>> report = fp.global_prune(net, sparsity=0.5, granularity="channel", example_inputs=x)
    >>> fp.shrink(net, x)[1]  # doctest: +ELLIPSIS
    NarrowGroupNorm(1, 4, eps=1e-05, affine=True, ... dense_width=8)
    """

    dense_width: int

    def forward(self, input: Tensor) -> Tensor:
        """The same as that of ``nn.GroupNorm``, on the channels that are left."""
        return forward_over(1, self.dense_width, self, input)

    def extra_repr(self) -> str:
        """That of torch's norm, and the dense width."""
        return f"{super().extra_repr()}, dense_width={self.dense_width}"


NARROW_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: NarrowLayerNorm,
    nn.RMSNorm: NarrowRMSNorm,
    nn.GroupNorm: NarrowGroupNorm,
}


def narrowed(module: Any, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """The module after its tensors were cut, as one that knows its dense width.

    Args:
        module: with smaller tensors.
        kept: of what it is given, under an empty name, the channels that it still sees; without, it sees all.
    """
    kind = next(narrow for plain, narrow in NARROW_NORMS.items() if isinstance(module, plain))
    stated = module.num_channels if isinstance(module, nn.GroupNorm) else module.normalized_shape[-1]
    left = next((int(seen.sum()) for seen in kept.get("", {}).values()), stated)
    new: Any = kind.__new__(kind)
    vars(new).update(vars(module))
    new.dense_width = getattr(module, "dense_width", stated)
    if isinstance(module, nn.GroupNorm):
        new.num_channels = left
    else:
        new.normalized_shape = (left,)
    return new  # type: ignore[no-any-return]
