"""What a pruned model must survive, checked against a dense twin with the zeros written into its weights."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import torch_flowprune as fp
from benchmarks.models.zoo import Subject, gradients, outputs
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

MEASURES = ("magnitude", "loss_preservation", "gradient_norm_preservation")
GRANULARITIES = ("weight", "filter")
SPARSITY = 0.5
STANDARDISED = "standardises its weight before use"
"""Said where zeros in the weight are none in the kernel: the mask holds there, and cannot be made permanent."""
MIN_KEEP = 0.1
"""Of every layer: through an emptied one no signal passes, and all checks behind it would hold for nothing."""
TOLERANCE = 1e-4
"""Of the largest value: the twin does the same arithmetic, so this only allows for another order of summation."""


class Lifecycle:
    """One model, one measure, one granularity: each check is a method, and says what is wrong by raising."""

    def __init__(self, subject: Subject, measure: str, granularity: str) -> None:
        self.subject, self.measure, self.granularity = subject, measure, granularity
        self.model = copy.deepcopy(subject.model)
        self.twin = copy.deepcopy(subject.model)
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        """The outcome of every check (None: passed), notes, and seconds."""
        start, outcomes = time.perf_counter(), {}
        for check in (
            self.prune,
            self.forward,
            self.train,
            self.masks_hold,
            self.deepcopy,
            self.averages,
            self.state_dict,
            self.remove,
        ):
            outcomes[check.__name__] = self._outcome(check)
            if check == self.prune and outcomes["prune"]:
                break
        return {"checks": outcomes, "notes": self.notes, "seconds": round(time.perf_counter() - start, 2)}

    def _outcome(self, check: Callable[[], None]) -> str | None:
        try:
            with _quiet() as caught:
                check()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return (
                f"{type(error).__name__}: {str(error)[:300]} ({where.name}, "
                f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
            )
        self.notes.extend(
            dict.fromkeys(
                f"{message.category.__name__}: {str(message.message)[:160]}" for message in caught if _ours(message)
            )
        )
        return None

    # -- the checks ----------------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Exactly half of the units go."""
        report = fp.global_prune(
            self.model,
            self.measure,
            SPARSITY,
            granularity=self.granularity,
            data=self.subject.batches,
            closure=self.subject.objective,
            mode=self.subject.mode,
            min_keep=MIN_KEEP,
            progress=False,
        )
        expect(report.pruned == round(SPARSITY * report.units), f"{report.pruned} of {report.units} units pruned")
        self.masks = {
            name: target.mask.clone() for name, target in parameters_of(self.model).items() if target.mask is not None
        }
        gone = sum(int((~mask).sum()) for mask in self.masks.values())
        expect(gone == sum(layer.weights_pruned for layer in report.layers), "the report and the masks disagree")

    def forward(self) -> None:
        """The output is that of the twin."""
        self._same_as_twin(self.model)

    def train(self) -> None:
        """Two Adam steps with weight decay; in each the loss and all gradients are those of the twin, masked."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-2)
        for step in range(2):
            bake(self.model, self.twin)
            expected_loss, expected = gradients(self.subject, self.twin, step)
            loss, found = gradients(self.subject, self.model, step)
            close(loss, expected_loss, f"the loss in training step {step}")
            for (name, target), ours, theirs in zip(parameters_of(self.model).items(), found, expected, strict=True):
                if ours is not None or theirs is not None:
                    expect(
                        ours is not None and theirs is not None,
                        f"{name}: one of the two gradients is None in step {step}",
                    )
                    close(
                        ours,
                        theirs if target.mask is None else theirs * target.mask,
                        f"the gradient of {name} in step {step}",
                    )
            optimizer.step()
        self.model.zero_grad()

    def masks_hold(self) -> None:
        """After the steps the masks are as they were, and the weights really used are those of the twin."""
        with Kernels(self.masks) as kernels:
            outputs(self.model, self.subject.inputs)
        if kernels.unseen:
            some = ", ".join(sorted(kernels.unseen)[:3])
            self.notes.append(
                f"zeros not seen in a kernel's operand: {len(kernels.unseen)} of {len(self.masks)} ({some})"
            )
        self._masks_hold(self.model)

    def deepcopy(self) -> None:
        """A copy is equal, trains, and leaves the original alone."""
        before = outputs(self.model, self.subject.inputs)
        clone = copy.deepcopy(self.model)
        for ours, theirs in zip(outputs(clone, self.subject.inputs), before, strict=True):
            close(ours, theirs, "the copy's output")
        self._step(clone)
        self._masks_hold(clone)
        for ours, theirs in zip(outputs(self.model, self.subject.inputs), before, strict=True):
            close(ours, theirs, "the original's output after the copy was trained")

    def averages(self) -> None:
        """torch's and timm's moving averages of the model, updated after a step, keep the zeros."""
        averages: list[Any] = [torch.optim.swa_utils.AveragedModel(self.model), ModelEmaV3(self.model, decay=0.5)]
        self._step(self.model)
        averages[0].update_parameters(self.model)
        averages[1].update(self.model)
        for average in averages:
            self._put_back_infinities(average.module)
            self._masks_hold(average.module)

    def _put_back_infinities(self, average: nn.Module) -> None:
        """The mean of inf and inf comes out as nan (inf - inf), of a dense model too.

        A clamp without a limit has such buffers.
        """
        source = dict(self.model.named_buffers())
        for name, buffer in average.named_buffers():
            if (
                source[name].is_floating_point()
                and source[name].isinf().any()
                and not torch.equal(buffer, source[name])
            ):
                buffer.copy_(source[name])
                self.notes.append("an average makes nan of infinite buffers, dense or pruned: they were put back")

    def state_dict(self) -> None:
        """The state loads into a fresh pruned model, and gives its output."""
        fresh = copy.deepcopy(self.subject.model)
        fp.apply_masks(fresh, {name: torch.ones_like(mask) for name, mask in self.masks.items()})
        fresh.load_state_dict(self.model.state_dict(), strict=True)
        self._masks_hold(fresh)
        for ours, theirs in zip(
            outputs(fresh, self.subject.inputs), outputs(self.model, self.subject.inputs), strict=True
        ):
            close(ours, theirs, "the output after loading")

    def remove(self) -> None:
        """Made permanent: the dense model's names and order, the zeros in place, the same output.

        And its state loads into a dense model.
        """
        before = outputs(self.model, self.subject.inputs)
        try:
            fp.remove(self.model)
        except ValueError as error:
            expect(STANDARDISED in str(error), str(error))
            self.notes.append(f"remove is refused: {error}")
            return
        expect(not prune.is_pruned(self.model), "is_pruned is still true")
        known = dict(self.model.named_parameters())
        expect(
            list(known) == [name for name, _ in self.subject.model.named_parameters()],
            "the names or the order of the parameters changed",
        )
        for name, mask in self.masks.items():
            expect(not known[name][~mask].any(), f"{name} has values where the mask has zeros")
        _unmask_kernels(self.twin)
        self.twin.load_state_dict(self.model.state_dict(), strict=True)
        for model in (self.model, self.twin):
            for ours, theirs in zip(outputs(model, self.subject.inputs), before, strict=True):
                close(ours, theirs, "the output")

    # -- what they share -----------------------------------------------------------------------------------------

    def _step(self, model: nn.Module) -> None:
        gradients(self.subject, model, 5)
        torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-2).step()
        model.zero_grad()

    def _masks_hold(self, model: nn.Module) -> None:
        found = {name: target.mask for name, target in parameters_of(model).items() if target.mask is not None}
        expect(found.keys() == self.masks.keys(), "other parameters are masked than before")
        expect(all(torch.equal(found[name], mask) for name, mask in self.masks.items()), "a mask changed")
        self._same_as_twin(model)

    def _same_as_twin(self, model: nn.Module) -> None:
        bake(model, self.twin)
        for ours, theirs in zip(
            outputs(model, self.subject.inputs), outputs(self.twin, self.subject.inputs), strict=True
        ):
            close(ours, theirs, "the output against the dense twin")


def bake(model: nn.Module, twin: nn.Module) -> None:
    """The values of a pruned model written into a dense one.

    By name, ``orig`` times mask, and every buffer that is no mask.
    """
    known = parameters_of(model)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            target = known[name]
            parameter.copy_(target.parameter if target.mask is None else target.parameter * target.mask)
            if target.mask is not None:
                _mask_kernel(twin.get_submodule(name.rpartition(".")[0]), target.mask)
        for name, buffer in twin.named_buffers():
            buffer.copy_(buffers[name])


def _mask_kernel(module: nn.Module, mask: Tensor) -> None:
    """A convolution with a forward of its own (weight standardisation) has its zeros in the kernel that it computes."""
    kind = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward:
        return
    convolution = getattr(functional, kind.__name__.lower())

    def masked(inputs: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        return convolution(inputs, weight * mask, *rest, **options)

    def forward(*inputs: Any) -> Tensor:
        with patch.object(functional, kind.__name__.lower(), masked):
            return type(module).forward(module, *inputs)  # type: ignore[no-any-return]

    forward.masks_kernel = True  # type: ignore[attr-defined]
    module.forward = forward  # type: ignore[method-assign]


def _unmask_kernels(twin: nn.Module) -> None:
    for module in twin.modules():
        if hasattr(
            module.__dict__.get("forward"), "masks_kernel"
        ):  # some models (fasternet) set a forward of their own on an instance
            del module.forward


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to the order of summation."""
    expect(found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if torch.equal(found, expected) or not expected.numel():
        return
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    expect(error <= TOLERANCE * scale, f"{what} differs by {error:.2e} of {scale:.2e}")


def expect(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class Kernels(TorchDispatchMode):
    """Which masks' zeros reach an operand of a matrix product or convolution."""

    _KINDS = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "_convolution", "mkldnn_convolution"})

    def __init__(self, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.unseen = {name: mask for name, mask in masks.items() if not mask.all()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self._KINDS:
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self._look(tensor)
        return func(*args, **(kwargs or {}))

    def _look(self, operand: Tensor) -> None:
        operands = (
            [operand, operand.flatten(0, -3)[0]] if operand.dim() > 2 and operand.numel() else [operand]
        )  # bmm: one matrix of a batch
        for name, mask in list(self.unseen.items()):
            for laid in (mask, mask.T) if mask.dim() == 2 else (mask,):
                if any(one.shape == laid.shape and not ((one != 0) & ~laid).any() for one in operands):
                    self.unseen.pop(name, None)


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _ours(message: warnings.WarningMessage) -> bool:
    return issubclass(
        message.category, (fp.LayerCollapseWarning, fp.TiedScoresWarning)
    ) or "the loss does not reach" in str(message.message)
