"""transformers: pruning inside its ``Trainer``, and pruned models in its folders.

Imported on request: ``from torch_flowprune.integrations.transformers import FlowPruningCallback``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, TrainerCallback

from torch_flowprune.channels import is_as_built, shrink, state_sizes
from torch_flowprune.exporting import load_pruned, save_pruned
from torch_flowprune.inputs import copied_model, parameters_of, read_tensors
from torch_flowprune.masking import MASKS_FILE, apply_masks, masks, remove, set_mask
from torch_flowprune.pruning import Pruner, Report, check_callback_words
from torch_flowprune.scoring import SHRINKABLE, Measure, measure_lookup

_WEIGHTS, _PRUNER = "model.safetensors", "flowprune_pruner.pt"
_GRADIENTS = {"g", "g2"}
_AT_END = ("keep", "remove", "shrink")


def save_pretrained(model: Any, save_directory: str | Path, **options: Any) -> None:
    """Write a pruned or shrunk model to a folder that :func:`from_pretrained` reads.

    A model with masks, or one whose config states its sizes, is written by its own ``save_pretrained``: dense names
    with zeros, and the masks beside them. ``AutoModel.from_pretrained`` reads it too. This includes a shrunk model
    whose repeated layers all have the same size (``uniform=True``): its config states them. Any other shrunk model is
    written with its architecture, by :func:`~torch_flowprune.save_pruned`; ``AutoModel`` raises an error for it.

    Args:
        model: a model of transformers.
        save_directory: the folder; created if it does not exist.
        options: keywords of the model's ``save_pretrained``.

    Raises:
        ShrinkError: if a module was replaced by its exported graph.
        TypeError: for a model of another library.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model should be one of transformers, got {type(model).__name__}: fp.save_pruned writes any other"
        )
    written = _as_config_says(model)
    if written is not None:
        written.save_pretrained(save_directory, **options)
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_pruned(model, folder / _WEIGHTS, kept_only=True)
    written = copy.deepcopy(model.config)
    written.architectures = [type(model).__name__]
    written.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def from_pretrained(kind: Any, save_directory: str | Path, **options: Any) -> Any:
    """Load a model, with its masks, from a folder of :func:`save_pretrained`.

    A masked model's own ``save_pretrained`` and a ``Trainer`` write such folders too.

    Args:
        kind: the model's class, or one of transformers' ``Auto`` classes.
        save_directory: the folder.
        options: keywords of ``kind.from_pretrained``; none for a model that was shrunk to sizes that a config cannot
            state.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: for masks that do not belong to the weights beside them, or a damaged file.

    >>> import tempfile, torch_flowprune as fp
    >>> from transformers import BertConfig, BertModel
    >>> from torch_flowprune.integrations.transformers import from_pretrained, save_pretrained
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = BertModel(BertConfig(**sizes))
    >>> report = fp.global_prune(model, sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder)
    ...     again = from_pretrained(BertModel, folder)
    >>> fp.report(again).sparsity
    0.5
    """
    folder = Path(save_directory)
    if not _holds_architecture(folder / _WEIGHTS):
        model = kind.from_pretrained(folder, **options)
        if (folder / MASKS_FILE).is_file():
            _put_on(model, _masks_in(folder), folder)
        return model
    if options:
        raise ValueError(
            f"{folder} holds a model that was shrunk, and is loaded as it is: {', '.join(options)} should be left out"
        )
    config = AutoConfig.from_pretrained(folder)
    dense = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return load_pruned(dense, folder / _WEIGHTS).eval()


class FlowPruningCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Prune a model in rounds while a ``Trainer`` trains it, also across interruptions.

    Every ``every_n_steps`` optimizer steps, a :class:`~torch_flowprune.Pruner` prunes one round: by the weights, by the
    gradients of the steps since the last round, or by scores over ``data``. Checkpoints hold dense weights with zeros,
    the masks, and the pruner's state. ``trainer.train(resume_from_checkpoint=True)`` ends with the weights of an
    uninterrupted run, and ``AutoModel.from_pretrained`` reads every checkpoint.

    Args:
        method: a measure's name or function.
        sparsity: the sparsity after the last round.
        rounds: how many rounds.
        every_n_steps: how many optimizer steps a round takes.
        every_n_epochs: the same in passes over the training data; 1 if neither is given.
        data: the data for the scores of each round; if left out, the gradients of training are used.
        at_end: what happens to the masks after training: ``"keep"``, ``"remove"`` (zeros in the weights), or
            ``"shrink"``, in place, which needs ``granularity="channel"`` (or ``"block"``) and
            ``example_inputs``.
        resume_from: the checkpoint's folder, if it is not in the trainer's ``output_dir``.
        options: further keywords of :class:`~torch_flowprune.Pruner` (``schedule``, ``granularity``, ``closure``, ...).

    Attributes:
        reports: the report of each round of this run.
        pruner: the pruner, after training has begun.

    Raises:
        TypeError: for a keyword that neither the callback nor the pruner takes; the message names the nearest.
        ValueError: for bad arguments; when training begins, for more rounds than fit in its steps; on resuming, for a
            checkpoint without the state of a pruner.

    See Also:
        :class:`~torch_flowprune.Pruner`: does the same in a loop of your own.

    >>> from torch_flowprune.integrations.transformers import FlowPruningCallback
    >>> callback = FlowPruningCallback("taylor", 0.5, rounds=5, every_n_steps=100)
    """

    def __init__(
        self,
        method: str | Measure = "magnitude",
        sparsity: float | None = None,
        *,
        rounds: int = 1,
        every_n_steps: int | None = None,
        every_n_epochs: float | None = None,
        data: object = None,
        at_end: str = "keep",
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        _check_callback(every_n_steps, every_n_epochs, at_end, options)
        check_callback_words(FlowPruningCallback, {"sparsity": sparsity, "rounds": rounds, **options})
        needs = set(measure_lookup.needs(measure_lookup.resolve(method)))
        if data is None and "Hg" in needs:
            raise ValueError(f"{method!r} reads Hg, which training does not compute: pass data=, a loader to score on")
        self.tracks = data is None and bool(needs & _GRADIENTS)
        self.make: Callable[[nn.Module], Pruner] = lambda model: Pruner(
            model, method, sparsity, rounds=rounds, **options
        )
        self.rounds, self.data, self.at_end, self.resume_from = rounds, data, at_end, resume_from
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.example_inputs = options.get("example_inputs")
        self.pruner: Pruner | None = None
        self.reports: list[Report] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Make the pruner; on resuming, with the masks and the state of the checkpoint."""
        model = known["model"]
        self.every = self._steps_of_a_round(args, known.get("train_dataloader"))
        if self.every * self.rounds > state.max_steps:
            raise ValueError(
                f"{self.rounds} rounds of {self.every} steps should fit into training, which has {state.max_steps}"
            )
        if not state.global_step:
            self.pruner = self.make(model)
            return
        folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        _take_off(model)
        self.pruner = self.make(model)
        _put_on(model, _masks_in(folder), folder)
        self.pruner.load_state_dict(_saved_state(folder))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Track the gradients of the step."""
        if self.tracks and self.pruner is not None and not self.pruner.done:
            self.pruner.track()

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Prune if a round is due."""
        if self.pruner is not None and not self.pruner.done and state.global_step % self.every == 0:
            self.reports.append(self.pruner.step(self.data))

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write the pruner's state into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.pruner is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(self.pruner.state_dict(), folder / _PRUNER)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Restore the masks of the best checkpoint if it was loaded, and do what ``at_end`` says."""
        model = known["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            folder = Path(state.best_model_checkpoint)
            _take_off(model)
            _put_on(model, _masks_in(folder), folder)
        if self.at_end == "remove":
            remove(model)
        elif self.at_end == "shrink":
            shrink(model, self.example_inputs, inplace=True)

    def _steps_of_a_round(self, args: Any, loader: Any) -> int:
        if self.every_n_steps is not None:
            return self.every_n_steps
        try:
            steps: int = max(len(loader) // args.gradient_accumulation_steps, 1)
        except TypeError as error:
            raise ValueError("give every_n_steps=: the training data do not say how long an epoch is") from error
        return max(round(steps * (self.every_n_epochs or 1)), 1)


def _check_callback(steps: int | None, epochs: float | None, at_end: str, options: Mapping[str, Any]) -> None:
    if steps is not None and epochs is not None:
        raise ValueError("give every_n_steps= or every_n_epochs=, not both")
    if any(count is not None and not count > 0 for count in (steps, epochs)):
        raise ValueError(f"a round should be more than no steps, got {steps if steps is not None else epochs!r}")
    if at_end not in _AT_END:
        raise ValueError(f"at_end should be one of {', '.join(_AT_END)}, got {at_end!r}")
    if at_end == "shrink" and (options.get("granularity") not in SHRINKABLE or options.get("example_inputs") is None):
        raise ValueError(
            "give granularity='channel' (or 'block') and example_inputs= with at_end='shrink': it removes channels and "
            "blocks"
        )


def _as_config_says(model: Any) -> Any | None:
    """The model itself, or a copy of which the config says its sizes; None where no config does."""
    if is_as_built(model) or masks(model):
        return model if is_as_built(model) else None
    other: Any = copied_model(model)
    inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    state_sizes(other, (), inputs)
    return other if is_as_built(other) else None


def _holds_architecture(path: Path) -> bool:
    from safetensors import safe_open

    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return "torch_flowprune" in (file.metadata() or {})


def _masks_in(folder: Path) -> dict[str, Tensor]:
    """Packed; none, where nothing was pruned when the folder was written."""
    return read_tensors(folder / MASKS_FILE, "masks", "save_pretrained")[0] if (folder / MASKS_FILE).is_file() else {}


def _saved_state(folder: Path) -> dict[str, Any]:
    if not (folder / _PRUNER).is_file():
        raise ValueError(
            f"{folder} has no state of a pruner: expected a checkpoint of a run with a FlowPruningCallback; if it was "
            "moved, pass its folder as resume_from="
        )
    state: dict[str, Any] = torch.load(folder / _PRUNER, map_location="cpu", weights_only=True)
    return state


def _take_off(model: nn.Module) -> None:
    """The masks of a later state, from values that were loaded under them."""
    for target in parameters_of(model).values():
        if target.mask is not None:
            set_mask(target, None)


def _put_on(model: nn.Module, packed: Mapping[str, Tensor], folder: Path) -> None:
    """Masks that were written with the weights that the model has; others would be lost weights."""
    apply_masks(model, packed)
    changed = [name for name, one in parameters_of(model).items() if name in packed and _is_kept_back(one)]
    if changed:
        _take_off(model)
        raise ValueError(
            f"the masks in {folder} are of other weights than those beside them ({', '.join(changed[:5])}): delete "
            f"{MASKS_FILE}, or save the masked model again"
        )


def _is_kept_back(target: Any) -> bool:
    """Whether a mask hides values that are not zero."""
    return bool((target.parameter.detach()[target.mask == 0] != 0).any())
