"""That a smaller model learns as the masked one does: its gradients, a step along them, and the state that it loads."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.proof.dropout_calls import DropoutCalls
from torch_flowprune.channels.shrinking.surgery import ShrinkError
from torch_flowprune.gradients import sound_norms
from torch_flowprune.inputs import tree_leaves
from torch_flowprune.masking import write_zeros
from torch_flowprune.torch_internals import tree_map

if TYPE_CHECKING:
    from torch_flowprune.channels.shrinking.proof.equivalence import Ran, Trial

Mode = Callable[[nn.Module], nn.Module]
_STEP = 0.01  # how far a step moves the entry with the largest gradient


def first_line(error: Exception) -> str:
    """What an error says, without its traceback."""
    return (str(error).splitlines() or [""])[0]


def statement_of(error: Exception) -> str:
    """The statement of the model's code that an error came out of: the innermost that is neither torch's nor ours."""
    own = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[3]}{os.sep}")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name}: {frames[-1].line})" if frames else ""


def evaluated(model: nn.Module) -> nn.Module:
    """The model in eval mode."""
    return model.eval()


@dataclass(frozen=True)
class Learned:
    """What the masked model of a trial learns in eval mode.

    Attributes:
        gradients: of the parameters, as the smaller model has them; none, where none can be taken.
        largest: the largest entry of the gradients, of what is to go too.
        stepped: what the model gives after a step along them, with zeros where it had them; None where it does not run.
    """

    gradients: dict[str, Tensor]
    largest: float
    stepped: Ran | None


class LearningTrial:
    """The gradients of the masked model of a trial, in eval mode, and what it gives after a step along them."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def check(self, small: nn.Module) -> None:
        """Raises what is wrong with the smaller model; nothing, where the masked one has no gradients or is random."""
        if self.masked.gradients:
            try:
                self._compare(self._gradients_of(small))
            except ShrinkError:
                if not self.trial.is_random(evaluated):
                    raise
                return
            self._check_step(small)

    @cached_property
    def masked(self) -> Learned:
        """Of the masked model: what is stepped from takes the place of its gradients, so that memory holds one."""
        gradients = self._gradients_of(self.trial.spare) or {}
        largest = max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0) or 1.0
        cut, stepped = dict[str, Tensor](), dict[str, nn.Parameter]()
        for name, parameter in self.trial.model.named_parameters():
            if name in gradients:
                gradient = gradients.pop(name)
                cut[name] = self.trial.surgery.cut(name, gradient)
                stepped[name] = nn.Parameter(parameter.detach().sub(gradient, alpha=_STEP / largest))
        return Learned(cut, largest, self._run_with(stepped) if cut else None)

    def _run_with(self, stepped: Mapping[str, nn.Parameter]) -> Ran | None:
        trial = self.trial
        model = trial.other_state(stepped)
        write_zeros(model, {name: mask for name, mask in trial.masks.items() if name in stepped})
        for name, parameter in stepped.items():
            trial.surgery.clear(name, parameter)
        try:
            return trial.run(model.eval())
        except Exception:  # noqa: BLE001 - whatever the model raises
            return None

    def _compare(self, found: Mapping[str, Tensor] | None) -> None:
        if found is None:
            raise ShrinkError("no gradient passes through the smaller model")
        for name, expected in self.masked.gradients.items():
            own = found.get(name)
            if not expected.numel():  # of a parameter that is no more
                continue
            if own is None and self.trial.takes_out:  # of one that nothing reads any more
                own = torch.zeros_like(expected)
            off = float("nan") if own is None else float((expected - own).abs().max())
            if not off <= self.trial.tolerance * self.masked.largest:
                raise ShrinkError(
                    f"the smaller model's gradient of {name} differs from the masked model's by "
                    f"{off / self.masked.largest:.1e}"
                )

    def _gradients_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Of a fixed weighing of the outputs, by every parameter. None where no gradient can be taken.

        An example of one sample is usual, and torch's own batch norm may get the gradient of one wrong, in the masked
        model by other numbers than in the smaller one.
        """
        args, kwargs = tree_map(copied_tensor, (self.trial.args, self.trial.kwargs))
        parameters = {name: p for name, p in model.eval().named_parameters() if p.requires_grad}
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        try:
            with torch.enable_grad(), torch.random.fork_rng(), sound_norms(device), DropoutCalls():
                torch.manual_seed(0)
                outputs = [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
                weighed = torch.stack([(t * _weighing(t)).sum() for t in outputs]).sum()
                found = torch.autograd.grad(weighed, list(parameters.values()), allow_unused=True)
        except Exception:  # noqa: BLE001 - whatever the model raises
            return None
        return {n: g for n, g in zip(parameters, found, strict=True) if g is not None and g.numel()}

    def _check_step(self, small: nn.Module) -> None:
        """That what the parameters are is what is computed with, also once a state was loaded."""
        learned, trial = self.masked, self.trial
        if learned.stepped is None:
            return
        state = {name: t.clone() if isinstance(t, Tensor) else t for name, t in small.state_dict().items()}
        before = [parameter.detach().clone() for parameter in small.parameters()]
        own = dict(small.named_parameters())
        for name in own.keys() & learned.gradients.keys():
            own[name].detach().sub_(learned.gradients[name], alpha=_STEP / learned.largest)
        write_zeros(small, {name: trial.surgery.cut(name, mask) for name, mask in trial.masks.items() if name in own})
        trial.check_in(evaluated, learned.stepped, small, "output after a step of an optimizer")
        try:
            small.load_state_dict(state)
        except RuntimeError as error:
            raise ShrinkError(f"the smaller model does not load its own state dict: {first_line(error)}") from error
        if not all(map(torch.equal, before, small.parameters())):
            raise ShrinkError("the smaller model's parameters change when it loads its own state dict")


def _weighing(output: Tensor) -> Tensor:
    """Weights of the outputs' entries, no two alike."""
    return torch.linspace(0.5, 1.5, output.numel(), device=output.device).to(output.dtype).view_as(output)


def copied_tensor(value: Any) -> Any:
    """A copy of what a run may write to."""
    return value.clone() if isinstance(value, Tensor) else value
