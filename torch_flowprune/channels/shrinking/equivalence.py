"""The trial that a smaller model has to pass: the masked model's outputs, in float64, away from all defaults."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery
from torch_flowprune.channels.tracing import Reading, operator_name
from torch_flowprune.masking import write_zeros
from torch_flowprune.torch_internals import tree_leaves, tree_map

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def first_line(error: Exception) -> str:
    """What an error says, without its traceback."""
    return (str(error).splitlines() or [""])[0]


def tolerance_of(reading: Reading) -> float | None:
    """None for the default; wider where the model itself casts to a precision below float64."""
    for node in reading.traced["eval"].graph.nodes:
        if operator_name(node) in ("to", "_to_copy", "type_as") and any(
            d in (torch.float32, torch.float16, torch.bfloat16) for d in [*node.args, *node.kwargs.values()]
        ):
            return 1e-4
    return None


class Trial:
    """A shaken float64 copy of the masked model and its outputs in both modes, to hold smaller models against."""

    def __init__(
        self,
        dense: nn.Module,
        masks: Mapping[str, Tensor],
        surgery: Surgery,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tolerance: float | None,
    ) -> None:
        for dtype in (torch.float64, torch.float32):
            self.model = _shaken(copy.deepcopy(dense).to(dtype).eval(), surgery)
            write_zeros(self.model, masks)
            self.args, self.kwargs = tree_map(partial(_cast, dtype=dtype), (args, dict(kwargs)))
            self.tolerance = max(tolerance or 0.0, _TOLERANCE[dtype])
            try:
                self.expected = _all_finite(self.outputs(self.model))
            except Exception as e:  # noqa: BLE001 - a model whose code insists on its own precision
                error = e
            else:
                self.trained = self.in_training()
                return
        raise ShrinkError(f"the model does not run on the example inputs: {first_line(error)}") from error

    def outputs(self, model: nn.Module, seed: int = 0) -> list[Tensor]:
        """What the model gives, in the precision of the trial, with random numbers always the same."""
        with torch.no_grad(), torch.random.fork_rng(), _NoDropout():
            torch.manual_seed(seed)
            out = model(*tree_map(_copy_tensor, self.args), **tree_map(_copy_tensor, self.kwargs))
        return [t for t in tree_leaves(out) if isinstance(t, Tensor)]

    def in_training(self, seed: int = 0) -> list[Tensor] | None:
        """The masked model's outputs with the statistics of the batch.

        None where these inputs do not do for training (a batch of one).
        """
        try:
            return self.outputs(training(copy.deepcopy(self.model)), seed)
        except Exception:  # noqa: BLE001 - whatever the model raises, there is nothing to compare with
            return None

    def check(self, small: nn.Module) -> None:
        """Outputs in both modes; train mode moves the running statistics of this model, which is to be a copy.

        Raises:
            ShrinkError: if they differ.
        """
        self.compare(self.expected, self.outputs(small.eval()), "output")
        if self.trained is None:
            return
        try:
            self.compare(self.trained, self.outputs(training(small)), "output in train mode")
        except ShrinkError:
            if not self.is_random():
                raise

    def compare(self, expected: Sequence[Tensor], outputs: Sequence[Tensor], what: str) -> None:
        if len(expected) != len(outputs):
            raise ShrinkError(f"the smaller model's {what} has {len(outputs)} tensors instead of {len(expected)}")
        for a, b in zip(expected, outputs, strict=True):
            if a.shape != b.shape:
                raise ShrinkError(f"the smaller model's {what} has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
            error = relative_error(a, b)
            if not error <= self.tolerance:
                raise ShrinkError(f"the smaller model's {what} differs from the masked model's by {error:.1e}")

    def is_random(self) -> bool:
        """Whether the training forward draws numbers all the same.

        Models of other widths then draw others, and cannot be compared.
        """
        again = self.in_training(seed=1)
        return again is None or any(relative_error(a, b) > 0 for a, b in zip(self.trained or (), again, strict=True))


def training(model: nn.Module) -> nn.Module:
    """The model in train mode, but for what holds neither state nor modules.

    Stochastic depth, in all its forms, stays off.
    """
    model.train()
    for module in model.modules():
        if not any(True for held in (module.children(), module.parameters(), module.buffers()) for _ in held):
            module.eval()
    return model


class _NoDropout(TorchFunctionMode):
    """Dropout passes its input on, whether a module, a function or an exported graph calls it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else options["input"]
        if "dropout_p" in options:
            options["dropout_p"] = 0.0
        return func(*args, **options)


def _all_finite(outputs: list[Tensor]) -> list[Tensor]:
    """Nothing can be held against nan: a mask of the lowest float64 is -inf where the code goes on in float32."""
    if all(bool(output.isfinite().all()) for output in outputs):
        return outputs
    raise ShrinkError("its outputs are not finite")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _copy_tensor(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def relative_error(a: Tensor, b: Tensor) -> float:
    """Max |a - b| / max |a|; nan where either is not finite."""
    if not a.numel() or not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("nan")
    a, b = a.detach(), b.detach()
    scale = a.abs().max()
    return float((a - b).abs().max() / scale) if scale > 0 else float(b.abs().max())


def _shaken(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Vectors (affine parameters, layer scales) and running statistics moved off their defaults; what goes is zero."""
    generator = torch.Generator("cpu").manual_seed(0)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(t.shape, generator=generator, device="cpu") * (high - low) + low).to(t)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.numel() and p.numel() == max(p.shape, default=1):
                p.mul_(uniform(p, 0.5, 1.5)).add_(uniform(p, -0.1, 0.1))
                for axis, kept in surgery.keep.get(name, {}).items():
                    p.index_fill_(axis, (~kept).nonzero().flatten().to(p.device), 0)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(uniform(b, -0.2, 0.2))
            elif name.endswith("running_var"):
                b.mul_(uniform(b, 0.5, 1.5))
    return model
