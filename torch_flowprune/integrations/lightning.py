"""Pruning as a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import torch_flowprune as fp
from torch_flowprune.pruning import check_callback_words
from torch_flowprune.scoring import SHRINKABLE, measure_lookup

_ENDINGS = ("keep", "remove", "shrink")
_KEPT_GRADIENTS = {"g", "g2"}
_BEYOND = {"g2_sample", "Hg"}


class FlowPruning(Callback):  # type: ignore[misc]  # of a library without types for us
    """Prune while a ``Trainer`` trains, round by round, and resume from its checkpoints.

    A round prunes at the start of an epoch, the first at epoch ``every_n_epochs``. So a run resumes exactly from a
    checkpoint that is saved at the end of an epoch, in validation or after it. The checkpoint holds the schedule and
    the tracked scores. Its masks are applied before its weights are loaded.

    Averages (``WeightAveraging``) get the masks of the model after each round. The fraction of zeros is logged as
    ``sparsity``, and by layer as ``sparsity/NAME``.

    Args:
        method: a measure's name or function.
        sparsity: the sparsity after the last round, of all prunable units.
        amount: instead of ``sparsity``, what every round prunes of the units that are left.
        rounds: how many rounds.
        every_n_epochs: the number of epochs between two rounds, and before the first.
        granularity: what a unit is, as in :func:`~torch_flowprune.global_prune`: ``"weight"``, ``"filter"``,
            ``"channel"``, ...
        data: the data for the scores: ``"train"``, a sweep over the training loader, with the loss that
            ``training_step`` returns; a loader; or None, which uses the gradients of training, averaged since the last
            round. Measures that read H·g need a sweep.
        at_end: after training, ``"keep"`` the masks, ``"remove"`` them (zeros in the weights), or ``"shrink"`` the
            model in place.
        options: further arguments of :class:`~torch_flowprune.Pruner` (``schedule``, ``include``, ``min_keep``,
            ``loss``, ...).

    Raises:
        ValueError, TypeError: for bad arguments; what depends on the model is checked when training begins.

    Warns:
        UserWarning: if training ends before the last round.

    See Also:
        :class:`~torch_flowprune.Pruner`: does the same in a loop of your own.

    >>> from torch_flowprune.integrations.lightning import FlowPruning
    >>> callback = FlowPruning("loss_preservation", sparsity=0.8, rounds=4, every_n_epochs=5)
    """

    def __init__(
        self,
        method: Any = "magnitude",
        sparsity: float | None = None,
        *,
        amount: float | None = None,
        rounds: int | None = None,
        every_n_epochs: int = 1,
        granularity: Any = "weight",
        data: Any = None,
        at_end: str = "keep",
        **options: Any,
    ) -> None:
        if at_end not in _ENDINGS:
            raise ValueError(f"at_end should be one of {', '.join(_ENDINGS)}, got {at_end!r}")
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs should be a whole number of at least 1, got {every_n_epochs!r}")
        if at_end == "shrink" and granularity not in SHRINKABLE:
            raise ValueError(
                f"at_end='shrink' should be with granularity='channel' or granularity='block', got {granularity!r}"
            )
        if isinstance(data, str) and data != "train":
            raise ValueError(f"data should be 'train', a loader or None, got {data!r}")
        needs = set(measure_lookup.needs(measure_lookup.resolve(method)))
        if data is None and needs & _BEYOND:
            beyond = ", ".join(sorted(needs & _BEYOND))
            raise ValueError(
                f"{method!r} reads {beyond}, which training does not compute: pass data='train', or a loader"
            )
        self.data, self.every_n_epochs, self.at_end = data, every_n_epochs, at_end
        self.tracks = data is None and bool(needs & _KEPT_GRADIENTS)
        self.sweeps = data is not None and bool(needs & (_KEPT_GRADIENTS | _BEYOND))
        self.asked = {"method": method, "sparsity": sparsity, "amount": amount, "rounds": rounds}
        self.options = {"granularity": granularity, **options}
        check_callback_words(FlowPruning, {**{k: v for k, v in self.asked.items() if k != "method"}, **self.options})
        self.pruner: fp.Pruner | None = None
        self.reports: list[fp.Report] = []
        self._saved: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before a checkpoint is loaded, so that its masks are applied before its weights are loaded."""
        fp.accept_masks(pl_module)
        for average in _averages(trainer):
            fp.accept_masks(average.module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the pruner, for the weights with which training begins or continues."""
        options = dict(self.options)
        if self.sweeps and not {"loss", "closure"} & options.keys():
            options["closure"] = _loss_of_training(trainer, pl_module)
        if options["granularity"] in SHRINKABLE and "coupling" not in options:
            options.setdefault("example_inputs", pl_module.example_input_array)
        if self.tracks and len(trainer.optimizers) > 1:
            raise ValueError(
                "gradients are tracked for one optimizer, and there are several: pass data=, to score by a sweep"
            )
        if self.at_end == "shrink" and options.get("example_inputs") is None:
            raise ValueError("at_end='shrink' should have example_inputs=, or the module an example_input_array")
        self.pruner = fp.Pruner(trainer.model or pl_module, **self.asked, **options)
        if self._saved is not None:
            self.pruner.load_state_dict(self._saved)
        _check_epochs(trainer, self.pruner, self.every_n_epochs)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Track the gradients, which are complete and unscaled here."""
        if self.tracks and self._pruner.round < self._pruner.asked.count:
            self._pruner.track()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if a round is due, and log the sparsity."""
        if not self._pruner.done and self._pruner.round < trainer.current_epoch // self.every_n_epochs:
            self._prune(trainer, pl_module)
        report = fp.report(pl_module)
        layers = {f"sparsity/{layer.name}": layer.sparsity for layer in report.layers}
        pl_module.log_dict({"sparsity": report.sparsity, **layers})

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages = _averages(trainer)
        self._pruner.averages = [average.module for average in averages]
        self.reports.append(self._pruner.step(self._data(trainer)))
        fp.sync_masks(pl_module, *averages)  # of torch's averages, how they average buffers too

    def _data(self, trainer: Trainer) -> Any:
        return trainer.train_dataloader if isinstance(self.data, str) else self.data

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of rounds for which there was no epoch left."""
        if not self._pruner.done:
            warnings.warn(
                f"training ended after {self._pruner.round} of {self._pruner.asked.count} rounds: the model is less "
                "sparse than requested",
                UserWarning,
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the masks or shrink the model, as ``at_end`` says, after averages are done."""
        if self.at_end == "remove":
            fp.remove(pl_module)
        elif self.at_end == "shrink":
            _shrink(pl_module, self.options.get("example_inputs", pl_module.example_input_array))

    @property
    def _pruner(self) -> fp.Pruner:
        assert self.pruner is not None
        return self.pruner

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds: the round, the schedule and the tracked scores."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the pruner is made."""
        self._saved = state_dict or None


def _averages(trainer: Trainer) -> list[AveragedModel]:
    """The averages that other callbacks hold."""
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]
    return [value for value in held if isinstance(value, AveragedModel)]


def _check_epochs(trainer: Trainer, pruner: fp.Pruner, every: int) -> None:
    """An error where the last round would come after the last epoch."""
    needed = every * pruner.asked.count + 1
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < needed:
        raise ValueError(
            f"{pruner.asked.count} rounds, one every {every} epochs, should have {needed} epochs, the last of them to "
            f"train what is left; the trainer has max_epochs={trainer.max_epochs}"
        )


def _loss_of_training(trainer: Trainer, module: LightningModule) -> Callable[[Any, Any], Tensor]:
    """The loss on a batch as ``training_step`` returns it, with nothing logged."""
    if not module.automatic_optimization:
        raise ValueError(
            "this module uses manual optimization, so its training_step returns no loss: pass loss= or closure="
        )
    takes_index = "batch_idx" in inspect.signature(module.training_step).parameters

    def loss(_: Any, batch: Any) -> Tensor:
        placed = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with _without_logging(module):
            returned = module.training_step(placed, *([0] if takes_index else []))
        return cast("Tensor", returned["loss"] if isinstance(returned, Mapping) else returned)

    return loss


@contextmanager
def _without_logging(module: LightningModule) -> Iterator[None]:
    """A sweep is no step of the training: what its steps log would be counted among those."""
    for name in ("log", "log_dict"):
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]


def _shrink(module: LightningModule, example_inputs: Any) -> None:
    try:
        fp.shrink(module, example_inputs, inplace=True)
    except fp.ShrinkError as error:
        warnings.warn(f"the trained model keeps its masks, as it could not be shrunk in place: {error}", UserWarning, 2)
