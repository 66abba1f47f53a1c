"""What is measured while it grows: this package's work, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

import torch_flowprune as fp
from benchmarks.growth import nets

Prepared: TypeAlias = "Callable[[], object]"
"""What is timed, once."""
Side: TypeAlias = "Callable[[int], Prepared]"
"""Prepares the work at a size."""


@dataclass(frozen=True)
class Growth:
    """One thing that grows, and who works on it.

    Attributes:
        grows: The thing, in words.
        sizes: How large it gets.
        sides: The works, ours first.
        goal: The exponent of time at most.
        upto: The largest size of a side that would take too long beyond.
    """

    grows: str
    sizes: tuple[int, ...]
    sides: dict[str, Side]
    goal: float = 1.1
    upto: dict[str, int] = field(default_factory=dict)


_WEIGHTS = 10**7
_OURS = "torch_flowprune"


def _pruned(net: Callable[[int], nn.Module], method: str = "magnitude", **words: Any) -> Side:
    def prepare(size: int) -> Prepared:
        model = net(size)
        return lambda: fp.global_prune(model, method, 0.9, **words)

    return prepare


def _torchs(net: Callable[[int], nn.Module], *, layer_by_layer: bool = False) -> Side:
    def prepare(size: int) -> Prepared:
        pairs = [(layer, "weight") for layer in net(size).modules() if isinstance(layer, nn.Linear)]
        if layer_by_layer:
            return lambda: [prune.l1_unstructured(*pair, amount=0.9) for pair in pairs]
        return lambda: prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.9)

    return prepare


def _forward_backward(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Prepared:
    def work() -> None:
        for x, y in data:
            model.zero_grad()
            functional.cross_entropy(model(x), y).backward()

    return work


def _flow(model: nn.Module, data: list[tuple[Tensor, Tensor]], **words: Any) -> Prepared:
    return lambda: fp.flow(model, data, loss=functional.cross_entropy, needs=("g", "Hg"), check=False, **words)


def _plain(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Prepared:
    """H·g of one batch by a plain double backward."""
    (x, y), parameters = data[0], list(model.parameters())

    def work() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            loss = functional.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            return torch.autograd.grad(grads, parameters, [grad.detach() for grad in grads])

    return work


def _on(net: Callable[[int], nn.Module], data: Callable[[int], Any], work: Callable[..., Prepared]) -> Side:
    return lambda size: work(net(size).eval(), data(size))


def _scored(size: int) -> Prepared:
    model = nets.Experts(size)
    return lambda: fp.global_prune(model, "gradient_norm_preservation", 0.7, data=nets.rows(4))


def _compared(count: int) -> Prepared:
    names = ["magnitude", "l1", "loss_preservation", "taylor", "biased_loss_preservation", "fisher", "random",
             "gradient_norm_preservation"]  # fmt: skip
    model, data = (
        nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)),
        [nets.rows(16)],
    )
    return lambda: fp.compare(model, names[:count], [0.5, 0.9], data)


def _channels(net: Callable[[int], nn.Module], **words: Any) -> Side:
    def prepare(size: int) -> Prepared:
        model = net(size).eval()
        example = nets.images(2)[0]
        return lambda: fp.global_prune(
            model, "magnitude", 0.5, granularity="channel", example_inputs=example, min_keep=1, **words
        )

    return prepare


def _torch_pruning(net: Callable[[int], nn.Module]) -> Side:
    def prepare(size: int) -> Prepared:
        import torch_pruning  # a peer, not of the extras: README.md says how it gets on the path

        model, example = net(size).eval(), nets.images(2)[0]

        def work() -> None:
            torch_pruning.pruner.MetaPruner(
                model,
                example,
                importance=torch_pruning.importance.MagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=0.5,
                ignored_layers=[model.head],
            ).step()

        return work

    return prepare


def _tracked(size: int) -> Prepared:
    """Forward and backward, and what a pruner of channels takes of it."""
    model, data = nets.Residual(size), nets.images(8)
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, granularity="channel", example_inputs=data[0], min_keep=1)
    step = _forward_backward(model, [data])

    def work() -> None:
        step()
        pruner.track()

    work()
    return work


def _shrunk(size: int) -> Prepared:
    model, example = nets.Residual(size).eval(), nets.images(2)[0]
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=example, min_keep=1)
    return lambda: fp.shrink(model, example)


def _train_step(width: int, masked: str | None = None) -> Prepared:
    """A step of four linear layers of a width on eight samples."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(8, width)
    if masked == _OURS:
        fp.global_prune(model, "magnitude", 0.9)
    elif masked:
        prune.global_unstructured([(layer, "weight") for layer in layers[::2]], prune.L1Unstructured, amount=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _of_width(masked: str | None = None) -> Side:
    return lambda width: _train_step(width, masked)


def _many(size: int) -> nn.Module:
    return nets.tensors(size, _WEIGHTS)


def _alone(size: int) -> nn.Module:
    return nets.tensors(size, size * 64 * 64)


def _few(size: int) -> nn.Module:
    return nets.tensors(10, size)


def _few_bfloat16(size: int) -> nn.Module:
    return nets.tensors(10, size, torch.bfloat16)


def _deep(size: int) -> nn.Module:
    return nets.Residual(size)


def _one_batch(_: int) -> list[tuple[Tensor, Tensor]]:
    return [nets.images(8)]


def _batches(size: int) -> list[tuple[Tensor, Tensor]]:
    return [nets.images(8) for _ in range(size)]


def _tokens(size: int) -> list[tuple[Tensor, Tensor]]:
    return [nets.ids(1, size)]


GROWTHS = {
    "tensors": Growth(
        "tensors of 10^7 weights, magnitude",
        (10, 100, 1000, 10000),
        {_OURS: _pruned(_many), "torch": _torchs(_many)},
    ),
    "layers alone": Growth(
        "layers of 64 by 64, magnitude in each by itself",
        (50, 200, 800, 3200),
        {_OURS: _pruned(_alone, scope="layer"), "torch": _torchs(_alone, layer_by_layer=True)},
    ),
    "two shapes": Growth(
        "layers of two shapes, filters by magnitude",
        (100, 1000, 10000),
        {_OURS: _pruned(lambda size: nets.two_shapes(size, _WEIGHTS), granularity="filter")},
    ),
    "weights": Growth(
        "weights in 10 tensors, magnitude",
        (10**6, 10**7, 10**8),
        {_OURS: _pruned(_few), "torch": _torchs(_few)},
        upto={"torch": 10**7},
    ),
    "weights, bfloat16": Growth(
        "weights in 10 tensors of bfloat16, magnitude", (10**6, 10**7, 10**8), {_OURS: _pruned(_few_bfloat16)}
    ),
    "random": Growth(
        "weights in 10 tensors, at random",
        (10**6, 10**7),
        {
            _OURS: _pruned(_few, method="random"),
            "magnitude": _pruned(_few),
        },
    ),
    "scored layers": Growth(
        "layers in a row, H·g and its prune",
        (30, 300, 3000),
        {_OURS: _scored, "forward and backward": _on(nets.Experts, lambda _: [nets.rows(4)], _forward_backward)},
    ),
    "depth": Growth(
        "residual blocks, g and H·g of one batch",
        (10, 40, 160),
        {
            _OURS: _on(_deep, _one_batch, _flow),
            "plain double backward": _on(_deep, _one_batch, _plain),
            "forward and backward": _on(_deep, _one_batch, _forward_backward),
        },
    ),
    "batches": Growth(
        "batches of 8, g and H·g",
        (4, 16, 64),
        {
            _OURS: _on(lambda _: _deep(4), _batches, _flow),
            "with max_memory": _on(
                lambda _: _deep(4), _batches, lambda model, data: _flow(model, data, max_memory="4GB")
            ),
            "forward and backward": _on(lambda _: _deep(4), _batches, _forward_backward),
        },
    ),
    "tokens": Growth(
        "tokens of one sequence, g and H·g",
        (64, 256, 1024, 4096),
        {
            _OURS: _on(nets.Decoder, _tokens, _flow),
            "plain double backward": _on(nets.Decoder, _tokens, _plain),
            "forward and backward": _on(nets.Decoder, _tokens, _forward_backward),
        },
        goal=2.0,
    ),
    "concatenations": Growth(
        "layers that read all before them, channels by magnitude",
        (25, 50, 100, 200),
        {_OURS: _channels(nets.Concatenating), "Torch-Pruning": _torch_pruning(nets.Concatenating)},
        goal=2.2,
        upto={"Torch-Pruning": 50},
    ),
    "groups": Growth(
        "residual blocks, channels by magnitude until half of the FLOPs",
        (25, 100, 400),
        {_OURS: _channels(_deep, cost="flops"), "Torch-Pruning, of the channels": _torch_pruning(_deep)},
        upto={"Torch-Pruning, of the channels": 100},
    ),
    "shrunk": Growth("residual blocks, shrink of half of their channels", (10, 40, 160), {_OURS: _shrunk}),
    "tracked": Growth(
        "residual blocks, a step that a pruner of channels reads",
        (5, 20, 80),
        {_OURS: _tracked, "forward and backward": _on(_deep, _one_batch, _forward_backward)},
    ),
    "measures": Growth("measures that are compared", (2, 4, 8), {_OURS: _compared}),
    "masked widths": Growth(
        "width of four linear layers, a training step under masks",
        (64, 256, 1024),
        {_OURS: _of_width(_OURS), "torch": _of_width("torch"), "dense": _of_width()},
        goal=2.0,
    ),
}
