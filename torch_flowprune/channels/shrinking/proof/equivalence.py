"""The trial that a smaller model has to pass: the masked model's outputs, in float64, away from all defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.graphs import BuiltForError
from torch_flowprune.channels.shrinking.proof.dropout_calls import DropoutCalls
from torch_flowprune.channels.shrinking.proof.further_calls import TriedCall, further_calls
from torch_flowprune.channels.shrinking.proof.learning import LearningTrial, Mode, copied_tensor, evaluated, first_line
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery
from torch_flowprune.channels.tracing import Reading, operator_name
from torch_flowprune.inputs import copied_model, tree_leaves
from torch_flowprune.masking import write_zeros
from torch_flowprune.torch_internals import AnyDropout, AnyStatisticsNorm, tree_map

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_LEAST, _MARGIN = 1e-5, 30  # of what is computed in float32: the least tolerance, and how many times its noise


def tolerance_of(reading: Reading) -> float | None:
    """None for the default; wider where the model itself casts to a precision below float64."""
    for node in reading.traced["eval"].graph.nodes:
        if operator_name(node) in ("to", "_to_copy", "type_as") and any(
            d in (torch.float32, torch.float16, torch.bfloat16) for d in [*node.args, *node.kwargs.values()]
        ):
            return 1e-4
    return None


@dataclass(frozen=True)
class Ran:
    """What a run gave: the tensors in its output, and the rates of the dropout that would have been on."""

    tensors: list[Tensor]
    dropped: list[float]


class Trial:
    """A shaken float64 copy of the masked model and its outputs in both modes, to hold smaller models against.

    Attributes:
        tolerance: how far results may be apart that pass through many operations: gradients, train mode, a step.
        closeness: how far the outputs may be apart; in float32, some times what rounding does to this model.
        takes_out: whether parts of the model are taken out, and the dropout in them.
    """

    def __init__(
        self,
        dense: nn.Module,
        masks: Mapping[str, Tensor],
        surgery: Surgery,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tolerance: float | None,
    ) -> None:
        self.surgery, self.masks = surgery, masks
        self.takes_out = False
        for dtype in (torch.float64, torch.float32):
            self.model = _shaken(copied_model(dense).to(dtype).eval(), surgery)
            write_zeros(self.model, masks)
            self.args, self.kwargs = tree_map(partial(_cast, dtype=dtype), (args, dict(kwargs)))
            self.tolerance = max(tolerance or 0.0, _TOLERANCE[dtype])
            try:
                self.expected = self.run(self.model)
                _check_finite(self.expected.tensors)
            except Exception as e:  # noqa: BLE001 - a model whose code insists on its own precision
                error = e
            else:
                self.closeness = self.tolerance if self.tolerance <= _LEAST else self._closeness_in_float32()
                self.trained = self.masked(training)
                return
        raise ShrinkError(f"the model does not run on the example inputs: {first_line(error)}") from error

    def _closeness_in_float32(self) -> float:
        """Wide tolerances would hide a scale that is a little off: noise of a rounding in each parameter tells more."""
        model, generator = copied_model(self.model), torch.Generator("cpu").manual_seed(0)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                rounding = torch.rand(parameter.shape, generator=generator, device="cpu").mul_(2).sub_(1).mul_(2**-23)
                parameter.detach().mul_(1 + rounding.to(parameter))
        try:
            noisy = self.run(model)
            noise = [relative_error(a, b) for a, b in zip(self.expected.tensors, noisy.tensors, strict=True)]
        except Exception:  # noqa: BLE001 - values decide what such a model does
            return self.tolerance
        return min(self.tolerance, max([_LEAST, *(_MARGIN * one for one in noise)]))

    @property
    def example(self) -> TriedCall:
        return TriedCall("", self.args, self.kwargs)

    def run(self, model: nn.Module, call: TriedCall | None = None, seed: int = 0) -> Ran:
        """What the model gives, in the precision of the trial, with random numbers always the same."""
        args, kwargs = tree_map(copied_tensor, ((call or self.example).args, dict((call or self.example).kwargs)))
        with torch.no_grad(), torch.random.fork_rng(), DropoutCalls() as dropout:
            torch.manual_seed(seed)
            out = model(*args, **kwargs)
        return Ran([t for t in tree_leaves(out) if isinstance(t, Tensor)], dropout.rates)

    @cached_property
    def spare(self) -> nn.Module:
        """The masked model for runs in eval mode, after which the smaller ones are not made."""
        return self.other_state()

    def other_state(self, parameters: Mapping[str, nn.Parameter] | None = None) -> nn.Module:
        """A copy with buffers and attributes of its own, and the masked model's parameters, but for those given."""
        others = parameters or {}
        return copied_model(self.model, {id(p): others.get(name, p) for name, p in self.model.named_parameters()})

    def masked(self, mode: Mode, call: TriedCall | None = None, seed: int = 0) -> Ran | None:
        """What the masked model gives in a mode, or on another call.

        None where it does not run: a batch of one does not do for training, nor every model for every size.
        """
        try:
            return self.run(mode(self.spare if mode is evaluated else self.other_state()), call, seed)
        except Exception:  # noqa: BLE001 - whatever the model raises, there is nothing to compare with
            return None

    def check(self, small: nn.Module, thorough: bool = False) -> None:
        """Outputs in both modes; train mode moves the running statistics of this model, which is to be a copy.

        Args:
            small: the smaller model.
            thorough: also on other calls, with norms frozen, its gradients, after a step along these, and the state
                that it loads: for code that is not the user's own.

        Raises:
            ShrinkError: if they differ.
        """
        self.compare(self.expected, self.run(small.eval()), "output", self.closeness)
        if thorough:
            for call, expected in self.further:
                self.check_in(evaluated, expected, small, f"output {call.said}", call)
            self.learning.check(small)
        if self.trained is None:
            return
        if thorough and self.frozen is not None:
            self.check_in(_with_frozen_norms, self.frozen, small, "output in train mode with norms in eval mode")
        self.check_in(training, self.trained, small, "output in train mode")

    @cached_property
    def further(self) -> list[tuple[TriedCall, Ran]]:
        """Other calls that the masked model takes, with what it gives."""
        found = []
        for alternatives in further_calls(self.model, self.example):
            outcomes = ((call, self.masked(evaluated, call)) for call in alternatives)
            taken = ((c, o) for c, o in outcomes if o is not None and _all_finite(o.tensors) and self._is_apt(c, o))
            found += [next(taken, None)]
        return [one for one in found if one is not None]

    def _is_apt(self, call: TriedCall, outcome: Ran) -> bool:
        """Not where samples are mixed up: a literal shape takes parts of several of another size for one."""
        batch, now = (next(iter(one.tensors()), torch.empty(0)).shape[:1] for one in (self.example, call))
        pairs = zip(self.expected.tensors, outcome.tensors, strict=False)
        return batch != now or all(new.shape[:1] == batch for old, new in pairs if old.shape[:1] == batch)

    @cached_property
    def learning(self) -> LearningTrial:
        return LearningTrial(self)

    @cached_property
    def frozen(self) -> Ran | None:
        """None where there is no norm to freeze."""
        norms = any(isinstance(module, AnyStatisticsNorm) for module in self.model.modules())
        return self.masked(_with_frozen_norms) if norms else None

    def check_in(self, mode: Mode, expected: Ran, small: nn.Module, what: str, call: TriedCall | None = None) -> None:
        """The smaller model in a mode, or on another call.

        Of a model that draws numbers all the same nothing can be told: other widths draw others.
        """
        try:
            outcome = self.run(mode(small), call)
        except BuiltForError as error:
            if call is not None:  # another call than the example is refused, and the user is told so too
                return
            raise ShrinkError(f"the smaller model gives no {what}: {error}") from error
        except Exception as error:
            raise ShrinkError(
                f"the smaller model gives no {what}: {type(error).__name__}: {first_line(error)}"
            ) from error
        try:
            self.compare(expected, outcome, what)
        except ShrinkError:
            if not self.is_random(mode, call):
                raise

    def compare(self, masked: Ran, smaller: Ran, what: str, tolerance: float | None = None) -> None:
        self.compare_tensors(masked.tensors, smaller.tensors, what, tolerance)
        more = Counter(smaller.dropped) - Counter(masked.dropped)
        if more or (len(masked.dropped) != len(smaller.dropped) and not self.takes_out):
            raise ShrinkError(
                f"the smaller model's {what} has dropout rates {smaller.dropped} instead of {masked.dropped}"
            )

    def compare_tensors(
        self,
        expected: Sequence[Tensor],
        outputs: Sequence[Tensor],
        what: str = "output",
        tolerance: float | None = None,
    ) -> None:
        """What both models give."""
        if len(expected) != len(outputs):
            raise ShrinkError(f"the smaller model's {what} has {len(outputs)} tensors instead of {len(expected)}")
        for a, b in zip(expected, outputs, strict=True):
            if a.shape != b.shape:
                raise ShrinkError(f"the smaller model's {what} has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
            error = relative_error(a, b)
            if not error <= (tolerance or self.tolerance):
                raise ShrinkError(f"the smaller model's {what} differs from the masked model's by {error:.1e}")

    def is_random(self, mode: Mode | None = None, call: TriedCall | None = None) -> bool:
        """Whether the forward draws numbers all the same, in train mode if nothing else is said."""
        one, other = (self.masked(mode or training, call, seed) for seed in (0, 1))
        if one is None or other is None:
            return True
        return any(relative_error(a, b) > 0 for a, b in zip(one.tensors, other.tensors, strict=True))


def _with_frozen_norms(model: nn.Module) -> nn.Module:
    """In train mode but for the norms, as models are trained further on few samples."""
    for module in training(model).modules():
        if isinstance(module, AnyStatisticsNorm):
            module.eval()
    return model


def training(model: nn.Module) -> nn.Module:
    """The model in train mode, but for what holds neither state nor modules.

    Stochastic depth, in all its forms, stays off; dropout is asked what it would do.
    """
    model.train()
    for module in model.modules():
        if holds_nothing(module):
            module.eval()
    return model


def holds_nothing(module: nn.Module) -> bool:
    """Neither state nor modules; and it is no dropout of torch's."""
    held = (module.children(), module.parameters(), module.buffers())
    return not isinstance(module, AnyDropout) and not any(True for some in held for _ in some)


def _all_finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def _check_finite(outputs: Sequence[Tensor]) -> None:
    """Nothing can be held against nan: a mask of the lowest float64 is -inf where the code goes on in float32."""
    if not _all_finite(outputs):
        raise ShrinkError("its outputs are not finite")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def relative_error(a: Tensor, b: Tensor) -> float:
    """Max |a - b| / max |a|; nan where either is not finite."""
    if not a.numel() or not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("nan")
    a, b = a.detach(), b.detach()
    scale = a.abs().max()
    return float((a - b).abs().max() / scale) if scale != 0 else float(b.abs().max())


def _shaken(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Vectors (affine parameters, layer scales) and running statistics moved off their defaults; what goes is zero."""
    generator = torch.Generator("cpu").manual_seed(0)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(t.shape, generator=generator, device="cpu") * (high - low) + low).to(t)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.numel() and p.numel() == max(p.shape, default=1):
                p.mul_(uniform(p, 0.5, 1.5)).add_(uniform(p, -0.1, 0.1))
                surgery.clear(name, p)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(uniform(b, -0.2, 0.2))
            elif name.endswith("running_var"):
                b.mul_(uniform(b, 0.5, 1.5))
    return model
