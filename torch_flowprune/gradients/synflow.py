"""The data-free objective of Synaptic Flow, and its gradient, without touching the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from math import frexp
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.overrides import TorchFunctionMode

from torch_flowprune.gradients.operators import Bilinear, Gradients, convolution_of, sound_norms
from torch_flowprune.inputs import Target, arguments, clear, mapped, summed_outputs
from torch_flowprune.torch_internals import keep_where_positive


def synaptic_gradient(
    model: nn.Module, targets: Mapping[str, Target], theta: Mapping[str, Tensor], inputs: Any
) -> dict[str, Tensor]:
    """∂R/∂|θ| for R, the summed output of the model with every parameter and buffer by absolute value, on ones.

    In float64: in float32 R overflows on deep nets. The convolutions of a float32 model that is made of them, most of
    the work, are in float32 all the same (:func:`narrow_convolutions`).
    """
    state = absolute_state(model, {id(target.parameter): theta[name] for name, target in targets.items()})
    keys = {id(value): name for name, value in model.named_parameters()}
    wrt = [state[keys[id(target.parameter)]].requires_grad_() for target in targets.values()]
    masked = {
        id(value): target.mask for value, target in zip(wrt, targets.values(), strict=True) if target.mask is not None
    }
    flow = SynapticFlow(model, wrt, lambda *call: torch.func.functional_call(model, state, *call))
    with _MaskedAlready(masked):
        grads = flow.gradient(inputs, next(iter(targets.values())).parameter.device)
    return {
        name: _gradient_of(target, value, grad)
        for (name, target), value, grad in zip(targets.items(), wrt, grads, strict=True)
    }


class SynapticFlow:
    """The objective of a model, and its gradient.

    Args:
        model: what is run.
        wrt: what the gradient is taken by.
        run: runs the model by absolute value, with positional arguments and keywords.
        copies: on how many ranks it runs, whose gradients are summed.
    """

    def __init__(
        self, model: nn.Module, wrt: Sequence[Tensor], run: Callable[[Any, Any], Any], copies: int = 1
    ) -> None:
        self.model, self.wrt, self.run, self.copies = model, wrt, run, copies

    def gradient(self, inputs: Any, device: torch.device) -> Sequence[Tensor | None]:
        """On ones in place of these inputs.

        Raises:
            ValueError, RuntimeError: saying how to get it.
        """
        try:
            with sound_norms(device):
                return self._on_ones(inputs, device)
        except _OverflowError:
            raise
        except (
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # they do not fit
            if isinstance(error, RuntimeError) and "dtype" in str(error):
                raise RuntimeError(
                    f"synflow runs the model in float64, and its code is fixed to another dtype: {error}"
                ) from error
            raise ValueError(
                f"synflow runs the model in eval mode on inputs of ones, and on these it fails ({error}): pass "
                "example_inputs= that the model takes without targets, or use another measure"
            ) from error

    def _on_ones(self, inputs: Any, device: torch.device) -> Sequence[Tensor | None]:
        """Of one sample; of all, with their indices, where the model knows no samples (nodes and edges of a graph)."""
        try:
            return self._narrow(arguments(self.model, _ones(inputs, device)))
        except (IndexError, RuntimeError):
            with suppress(IndexError, RuntimeError):
                return self._narrow(arguments(self.model, _all_ones(inputs, device)))
            raise

    def _narrow(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Sequence[Tensor | None]:
        """With narrow convolutions, until something in the model reads what they round."""
        with suppress(_DifferencesReadError), narrow_convolutions() if _is_convolutional(self.model) else nullcontext():
            return self._of(call)
        return self._of(call)

    def _of(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Sequence[Tensor | None]:
        total = torch.stack([tensor.sum() for tensor in summed_outputs(self.run(*call))]).sum()
        if not total.isfinite():
            raise _OverflowError(
                f"the synaptic-flow objective is {total.item()} in float64: the network is too deep or its weights too "
                "large for synflow"
            )
        return torch.autograd.grad(total / self.copies, self.wrt, allow_unused=True)


class _OverflowError(ValueError):
    """The objective is not a number, on these inputs or others."""


def _is_convolutional(model: nn.Module) -> bool:
    """Whether no weight has more digits than float32, and most kernels and matrices are kernels.

    In a transformer the patch embedding would gain nothing, and layer norms would blow its rounding up from round to
    round.
    """
    sizes = [p.dim() for p in model.parameters() if p.dim() > 1]
    return all(p.dtype.itemsize <= 4 for p in model.parameters()) and 2 * sum(size > 2 for size in sizes) > len(sizes)


def _gradient_of(target: Target, value: Tensor, grad: Tensor | None) -> Tensor:
    """Zero where nothing is reached, and where the mask has removed what was."""
    if grad is None:
        return torch.zeros_like(value)
    return grad if target.mask is None else clear(grad.clone(), target.mask)


class _MaskedAlready(TorchFunctionMode):
    """Inside, values that hold zeros where they are masked are not masked again on access, by this very mask.

    Of weights this takes as long as scoring them. A selection that the model itself makes is another.
    """

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.where, keep_where_positive) and len(args) == 3:
            key, value = args[:2] if func is torch.where else args[1::-1]
            mask = self.masks.get(id(value))
            if mask is not None and key.data_ptr() == mask.data_ptr() and key.shape == mask.shape:
                return value
        return func(*args, **(kwargs or {}))


def absolute_state(model: nn.Module, theta: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """|state dict| in float64, tied entries still tied; buffers outside it (attention masks) keep their signs.

    ``theta`` are the values of parameters by their id, with zeros where they are masked.
    """
    persistent = set(model.state_dict())
    named = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    made: dict[int, Tensor] = {}
    for name, value in named.items():
        if id(value) not in made:
            doubled = (
                theta.get(id(value), value).detach().to(torch.float64, copy=True)
                if value.is_floating_point()
                else value.detach()
            )
            made[id(value)] = doubled.abs_() if name in persistent and value.is_floating_point() else doubled
    return {name: made[id(value)] for name, value in named.items()}


def _ones(inputs: Any, device: torch.device) -> Any:
    """One sample of the inputs' form."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return pack_sequence([torch.ones_like(unpack_sequence(leaf)[0], dtype=torch.float64, device=device)])
        dtype = torch.float64 if leaf.is_floating_point() else leaf.dtype
        if leaf.is_nested:
            one = torch.ones_like(leaf.unbind()[0], dtype=dtype, device=device)
            return torch.nested.as_nested_tensor([one], layout=leaf.layout)
        return torch.ones(1, *leaf.shape[1:], dtype=dtype, device=device)

    return mapped(of, inputs)


def _all_ones(inputs: Any, device: torch.device) -> Any:
    """The inputs with all their samples, and 1 for all numbers but indices."""

    def of(leaf: Any) -> Any:
        is_numbers = isinstance(leaf, Tensor) and not leaf.is_nested and leaf.is_floating_point()
        return torch.ones_like(leaf, dtype=torch.float64, device=device) if is_numbers else leaf.to(device)

    return mapped(of, inputs)


# Convolutions of a float64 network in float32, in which alone a CPU has fast ones: powers of two keep them in its
# range.


@contextmanager
def narrow_convolutions() -> Iterator[None]:
    """Inside, convolutions of float64 tensors on a CPU, and their gradients, are computed in float32.

    Every operand is divided by the power of two above its largest value, and the result multiplied by these powers in
    float64: it is linear in each operand, so nothing is lost but digits. What is under 1e-38 of the largest value of
    its tensor becomes 0. The gradient cannot be differentiated again.
    """
    with _Narrow():
        yield


class _DifferencesReadError(Exception):
    """A net computes with differences of what its convolutions give, which are of their rounding where it is large."""


_READ_DIFFERENCES = {
    *(
        "sub",
        "sub_",
        "rsub",
        "__sub__",
        "__rsub__",
        "__isub__",
        "exp",
        "logsumexp",
        "var",
        "std",
        "var_mean",
        "std_mean",
    ),
    *("softmax", "log_softmax", "softmin", "scaled_dot_product_attention", "multi_head_attention_forward"),
    *("layer_norm", "group_norm", "instance_norm"),
}
"""Names of functions that subtract, or exponentiate, so that a relative error of their input grows."""


class _Narrow(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _READ_DIFFERENCES:
            raise _DifferencesReadError
        call = convolution_of(func, args, kwargs or {})
        if call is None or call[1].dtype is not torch.float64 or call[1].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return _Convolution.apply(*call)


class _Convolution(Function):
    """``x * w + b`` in float64, computed in float32."""

    @staticmethod
    def forward(ctx: Any, operator: Bilinear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        (x, by_x), (w, by_w) = _divided(x), _divided(w)
        ctx.operator, ctx.by_x, ctx.by_w = operator, by_x, by_w
        ctx.save_for_backward(x, w)
        product = _times(operator.product(x, w, None), by_x * by_w)
        if b is None:
            return product
        return product.add_(b.view(-1, *(1,) * (x.dim() - 2)))  # here, for it may be far larger than the rest

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dy, by_y = _divided(dy)
        wanted = ctx.needs_input_grad[1:]
        grads: Gradients = ctx.operator.transposes(dy, x, w, wanted)
        powers = by_y * ctx.by_w, by_y * ctx.by_x, by_y
        return None, *(
            _times(grad, power) if want and grad is not None else None
            for grad, power, want in zip(grads, powers, wanted, strict=True)
        )


def _divided(x: Tensor) -> tuple[Tensor, float]:
    """The tensor over the power of two above its largest value, in float32; and that power."""
    if not x.numel():
        return x.float(), 1.0
    low, high = x.aminmax()
    _, exponent = frexp(max(-low.item(), high.item()))
    power = 2.0 ** max(-1000, min(1000, exponent))
    return (x * (1 / power)).float(), power


def _times(x: Tensor, power: float) -> Tensor:
    """In float64."""
    return x * torch.tensor([power], dtype=torch.float64)
