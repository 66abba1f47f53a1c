"""Looking at a model and its data without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import nn

from torch_flowprune.inputs.guards.beside import modules_beside
from torch_flowprune.inputs.named_parameters import computes_weight, is_mask

Restore = Callable[[], None]


@contextmanager
def untouched(
    model: nn.Module, data: object = None, mode: str = "eval", functions: Iterable[object] = ()
) -> Iterator[Restore]:
    """Inside, the model may be run and differentiated in ``mode``; afterwards, also after an error, it is as it was.

    Kept: buffers (values, identity, order), train/eval flags module by module, ``requires_grad``, ``.grad``, and the
    state of every source of randomness (torch on each of the model's devices, ``random``, numpy, the generators of a
    ``DataLoader``). Inside, the caller's autocast, inference mode and compiled code do not count.

    Of other modules that ``functions`` of the user's run, a teacher or a critic, the buffers are kept as well.

    Yields:
        A function that puts randomness and buffers back to the state at entry, so that a second sweep sees the same
        shuffling, dropout and power iteration.
    """
    check_mode(mode)
    beside = modules_beside(model, functions)
    draw_again, own, others = randomness(model, data), _buffers(model.modules()), _buffers(beside)

    def fill_again() -> None:
        own()
        others()

    def rewind() -> None:
        fill_again()
        draw_again()

    with ExitStack() as stack:
        stack.callback(draw_again)
        stack.callback(_parameters(model))
        stack.callback(fill_again)
        stack.callback(_modes(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(uncompiled())
        for kind in _autocasting(model):
            stack.enter_context(torch.autocast(kind, enabled=False))
        settle(model, mode)
        yield rewind


def _autocasting(model: nn.Module) -> list[str]:
    """The kinds of device on which an autocast of the caller's is on: it would round what is scored.

    The loss or the model may switch one on inside.
    """
    kinds = {"cpu"} | {parameter.device.type for parameter in model.parameters()} - {"meta"}
    return [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]


def uncompiled() -> AbstractContextManager[object]:
    """Compiled parts run as their code inside: what a compiler makes of them neither differentiates twice nor is read.

    Models, their forwards and functions that these call may be compiled; none is where the compiler is not loaded.
    """
    if "torch._dynamo" in sys.modules:
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


@contextmanager
def on_host() -> Iterator[None]:
    """Tensors that are made inside are on the CPU, whatever the caller's default device: for bookkeeping.

    Not around the model's own code, which may count on that default.
    """
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


def check_mode(mode: str) -> None:
    """An error for anything but "eval" and "train"."""
    if mode not in ("eval", "train"):
        raise ValueError(f"mode should be 'eval' or 'train' (batch norm and dropout while scoring), got {mode!r}")


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """What is drawn inside, from any source of randomness, was not drawn when it is over."""
    rewind = randomness(model)
    try:
        yield
    finally:
        rewind()


def settle(model: nn.Module, mode: str) -> None:
    """Put the model in ``mode`` by way of train mode, in which models that cache weights in eval mode forget them.

    Nothing is called where all modules are in this mode and none has a way of its own there: on small batches that is a
    few hundredths of the time.
    """
    training = mode == "train"
    if any(module.training != training or _has_own_modes(module) for module in model.modules()):
        model.train()
        if not training:
            model.eval()


def _has_own_modes(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.train is not nn.Module.train
        or kind.eval is not nn.Module.eval
        or not vars(module).keys().isdisjoint(("train", "eval"))
    )


def _parameters(model: nn.Module) -> Restore:
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad, grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    return restore


def _buffers(modules: Iterable[nn.Module]) -> Restore:
    """What is as it was is not written, as kept graphs may read it (positions, the class weights of a loss)."""
    kept = [
        (module, [(key, buffer, _copied_buffer(module, key, buffer)) for key, buffer in module._buffers.items()])
        for module in modules
    ]

    def restore() -> None:
        for module, buffers in kept:
            if not isinstance(module, torch.jit.ScriptModule):  # its registry is fixed
                module._buffers.clear()
                module._buffers.update((key, buffer) for key, buffer, _ in buffers)
        with torch.no_grad():
            for _, buffers in kept:
                for _, buffer, value in buffers:
                    if buffer is not None and value is not None and not _is_as_kept(buffer, value):
                        _apart(buffer).copy_(value)

    return restore


def _is_as_kept(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    with suppress(RuntimeError):  # sparse, or without values: written
        return torch.equal(_apart(buffer), value)
    return False


def _copied_buffer(module: nn.Module, key: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    """A copy, except of pruning masks: they are large, and no forward writes them."""
    return None if buffer is None or is_mask(key, module._parameters) else _apart(buffer.detach()).clone()


def _apart(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer with each of its values once: an expanded tensor has one in many places, and takes no writes."""
    if buffer.layout is torch.strided:
        for axis, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
            if stride == 0 and size > 1:
                buffer = buffer.narrow(axis, 0, 1)
    return buffer


def _modes(model: nn.Module) -> Restore:
    kept = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        settle(model, "train")
        for module, training in kept:  # a module before its parts, which it may have put in a mode that is not theirs
            if module.training != training and _has_own_modes(module):
                module.train() if training else module.eval()
        for module, training in kept:
            module.training = training

    return restore


def forget_caches(model: nn.Module) -> None:
    """What modules keep of their weights, in eval mode or by hooks, is made anew, as the weights have changed."""
    modules = list(model.modules())
    if any(not module.training and _has_own_modes(module) for module in modules):
        _modes(model)()
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if computes_weight(hook):
                _compute(module, hook)


def _compute(module: nn.Module, hook: Callable[..., object]) -> None:
    """The weight that a hook computes before each forward, now, and not in the way of a copy as a graph would be."""
    training, module.training = module.training, False  # in train mode spectral norm moves its buffers
    with torch.no_grad():
        hook(module, ())
    module.training = training


def randomness(model: nn.Module, data: object = None) -> Restore:
    """What puts every source of randomness back to its state now."""
    restores: list[Restore] = [
        _rewind(torch.set_rng_state, torch.get_rng_state()),
        _rewind(random.setstate, random.getstate()),
    ]
    if numpy := sys.modules.get("numpy"):
        restores.append(_rewind(numpy.random.set_state, numpy.random.get_state()))
    for device in {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}:
        accelerator = getattr(torch, device.type)
        restores.append(_rewind(accelerator.set_rng_state, accelerator.get_rng_state(device), device))
    restores += [_rewind(generator.set_state, generator.get_state()) for generator in _generators(data)]

    def rewind() -> None:
        for restore in restores:
            restore()

    return rewind


def _rewind(setter: Callable[..., object], *state: object) -> Restore:
    def restore() -> None:
        setter(*state)

    return restore


def _generators(data: object) -> list[torch.Generator]:
    holders = [data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)]
    generators = {
        id(generator): generator
        for holder in holders
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator)
    }
    return list(generators.values())


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator given; else torch's global one.

    Either goes on, as with all that torch draws: two random prunes in a row are two.
    """
    if generator is None:
        return torch.default_generator
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError(
            "generator should be a torch.Generator on the CPU (one seed then gives one mask on every device), "
            f"got {generator!r}"
        )
    return generator
