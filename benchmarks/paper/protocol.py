"""The paper's protocol: warm-up, rounds of one epoch and one prune, then the rest of the epochs.

Resumable, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import torch_flowprune as fp
from benchmarks.common.measure import environment
from benchmarks.paper import models
from benchmarks.paper.data import Batch, Data, Split
from benchmarks.paper.size import size
from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.scoring import measure_lookup

NONE = "none"
_SCORE_TEMPERATURE = {"gradient_norm_increase": 200.0, "gradient_norm_preservation": 1.0}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; the paper's code's values where nothing is said."""

    model: str = "resnet56"
    method: str = "magnitude"
    sparsity: float = 0.6
    rounds: int = 5
    thresholds: tuple[float, ...] = ()  # sparsities after the rounds, instead of sparsity, rounds and schedule
    schedule: str = "paper"
    min_keep: float = 1
    epochs: int = 160
    warmup: int = 0
    seed: int = 0
    width: float = 1.0
    batch: int = 128
    lr: float = 0.1
    lr_prune: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 5.0
    score_temperature: float | None = (
        None  # None: 200 for GraSP, 1 for its preserving counterpart, else that of training
    )
    score_samples: int = 2560
    score_batch: int = 128
    track: bool = False
    track_batches: int = 20
    alpha: float = 0.8
    fresh_momentum: bool = False
    pretrained: str = ""
    settle: bool = False  # batch norm's statistics are taken anew before each prune, instead of its running averages

    def __post_init__(self) -> None:
        if self.thresholds and (self.rounds, self.sparsity) != (len(self.thresholds), self.thresholds[-1]):
            raise ValueError(
                f"thresholds={self.thresholds} are {len(self.thresholds)} rounds to {self.thresholds[-1]:g}: rounds= "
                "or sparsity= differs"
            )
        if self.warmup + self.pruning_rounds > self.epochs // 2:
            raise ValueError(
                f"{self.warmup} epochs of warm-up and {self.pruning_rounds} rounds of one epoch do not fit into the "
                "first half of "
                f"{self.epochs} epochs, at the first learning rate: give at least "
                f"{2 * (self.warmup + self.pruning_rounds)} epochs"
            )

    @property
    def pruning_rounds(self) -> int:
        return 0 if self.method == NONE else self.rounds

    @property
    def temperature_of_scores(self) -> float:
        if self.score_temperature is not None:
            return self.score_temperature
        return _SCORE_TEMPERATURE.get(measure_lookup.name_of(self.method), self.temperature)

    def lr_of(self, epoch: int) -> float:
        """While pruning its own rate.

        Then a tenth after half of all epochs, and a tenth of that after three quarters.
        """
        if epoch < self.warmup + self.pruning_rounds:
            return self.lr_prune
        return self.lr * 0.1 ** ((epoch >= self.epochs // 2) + (epoch >= self.epochs * 3 // 4))

    def prunes_after(self, epoch: int) -> bool:
        return self.warmup <= epoch < self.warmup + self.pruning_rounds


def mask_followers(model: nn.Module) -> None:
    """Let batch norm, and a depthwise convolution behind, go with the masked filters that they follow."""
    masks = fp.masks(model)
    shapes = {name: target.parameter.shape for name, target in parameters_of(model).items()}
    along = {}
    for leader, names in models.followers(model).items():
        if leader in masks:
            alive = masks[leader].flatten(1).any(1)
            along |= {name: alive.view(-1, *[1] * (len(shapes[name]) - 1)).expand(shapes[name]) for name in names}
    fp.apply_masks(model, along)


class Run:
    """One training with pruning; ``folder`` holds its checkpoint, and its result when it is done."""

    def __init__(self, config: Config, data: Data, folder: Path, *, device: str = "cpu", progress: bool = True) -> None:
        self.config, self.folder, self.device, self.progress = config, folder, device, progress
        self.data, self.digest = data.to(device), data.digest()
        torch.manual_seed(config.seed)
        self.model = models.build(config.model, data.classes, config.width).to(device)
        if config.pretrained:
            fp.load_state_dict(self.model, torch.load(config.pretrained, map_location=device, weights_only=True))
        self.scoring = self.data.scoring(config.score_samples, config.score_batch, config.seed)
        self.optimizer = self._fresh_optimizer()
        self.pruner = self._pruner()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"validation_accuracy": -1.0}
        self._resume()
        self.left = size(self.model, self.data.shape)

    def run(self, until: int | None = None) -> dict[str, Any] | None:
        """All epochs, or those up to ``until`` with None for a result.

        A checkpoint after each, so that another ``Run`` can go on.
        """
        last = self.config.epochs if until is None else min(until, self.config.epochs)
        bar = tqdm(
            range(self.epoch, last),
            initial=self.epoch,
            total=self.config.epochs,
            unit="epoch",
            disable=not self.progress,
            desc=self.folder.name,
        )
        if not self.history:
            self.history.append({"epoch": 0, **self._state()})
        for epoch in bar:
            trained = self._train(epoch)
            if self.config.prunes_after(epoch):
                self._prune()
            self.epoch = epoch + 1
            self.history.append({"epoch": self.epoch, "lr": self.config.lr_of(epoch), **trained, **self._state()})
            self._keep_best()
            self._save()
            bar.set_postfix(
                loss=f"{trained['train_loss']:.3f}", validation=f"{self.history[-1]['validation_accuracy']:.1%}"
            )
        return self._finish() if self.epoch == self.config.epochs else None

    def _train(self, epoch: int) -> dict[str, float]:
        config, losses, correct, seen = self.config, 0.0, 0, 0
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_of(epoch)
        batches = -(-len(self.data.train) // config.batch)
        tracked_from = batches - config.track_batches if config.track and config.prunes_after(epoch) else batches
        self.model.train()
        for i, (images, labels) in enumerate(
            self._bar(self.data.epoch(config.batch, config.seed * 1_000_003 + epoch), batches)
        ):
            logits = self.model(images)
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(logits / config.temperature, labels)
            loss.backward()
            if i >= tracked_from:
                self._track((images, labels))
            self.optimizer.step()
            losses += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        return {"train_loss": losses / seen, "train_accuracy": correct / seen}

    def _track(self, batch: Batch) -> None:
        """From the gradients at hand where they are those that the measure reads."""
        assert self.pruner is not None
        needs = set(measure_lookup.needs(self.config.method))
        at_hand = self.config.temperature == self.config.temperature_of_scores and not needs & {"Hg", "g2_sample", "gR"}
        self.pruner.track() if at_hand else self.pruner.track(batch)

    def _prune(self) -> None:
        """To the next sparsity; the batch norm of a filter goes with it."""
        assert self.pruner is not None
        if self.config.settle:
            models.settle(self.model, (images for images, _ in self.data.train.batches(250)))
        before = self._loss(self.scoring, self.config.temperature_of_scores)
        report = self.pruner.step(None if self.pruner.tracked else self.scoring)
        mask_followers(self.model)
        fp.keep_zeros(self.model, self.optimizer).remove()
        if self.config.fresh_momentum:
            self.optimizer = self._fresh_optimizer()
        self.left = size(self.model, self.data.shape)
        after = self._loss(self.scoring, self.config.temperature_of_scores)
        self.rounds.append({"epoch": self.epoch + 1, "loss_before": before, "loss_after": after, **report.to_dict()})

    def _state(self) -> dict[str, Any]:
        """What the curves show, in eval mode, on the images that scores are taken over and on the validation images."""
        point = fp.flow(self.model, self.scoring, needs=("g",), temperature=self.config.temperature, progress=False)
        accuracy, loss = self._evaluate(self.data.validation)
        return {
            "loss": point.loss,
            "gradient_norm": sum(g.square().sum(dtype=torch.float64).item() for g in point.g.values()),  # type: ignore[union-attr]
            "theta_norm": sum(theta.square().sum(dtype=torch.float64).item() for theta in point.theta.values()),
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            **asdict(self.left),
        }

    @torch.no_grad()
    def _evaluate(self, split: Split) -> tuple[float, float]:
        self.model.eval()
        found = [(self.model(images), labels) for images, labels in split.batches(500)]
        logits, labels = torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])
        loss = functional.cross_entropy(logits / self.config.temperature, labels).item()
        return (logits.argmax(1) == labels).double().mean().item(), loss

    @torch.no_grad()
    def _loss(self, batches: list[Batch], temperature: float) -> float:
        self.model.eval()
        total = sum(
            functional.cross_entropy(self.model(images) / temperature, labels).item() * len(labels)
            for images, labels in batches
        )
        return total / sum(len(labels) for _, labels in batches)

    def _keep_best(self) -> None:
        """By the validation images, among the epochs after the last prune."""
        accuracy = self.history[-1]["validation_accuracy"]
        if (
            self.epoch >= self.config.warmup + self.config.pruning_rounds
            and accuracy >= self.best["validation_accuracy"]
        ):
            state = {name: value.clone() for name, value in fp.state_dict(self.model).items()}
            self.best = {"epoch": self.epoch, "validation_accuracy": accuracy, "state": state}

    def _finish(self) -> dict[str, Any]:
        """The only look at the test images: with the last model, and with the one that the validation images chose."""
        result = self.folder / "result.json"
        if not result.exists():
            torch.save(self.best["state"], self.folder / "pruned.pt")
            result.write_text(json.dumps(self._found(), indent=1) + "\n", encoding="utf-8")
        return dict(json.loads(result.read_text(encoding="utf-8")))

    def _found(self) -> dict[str, Any]:
        last, _ = self._evaluate(self.data.test)
        fp.load_state_dict(self.model, self.best["state"])
        accuracy, loss = self._evaluate(self.data.test)
        splits = {name: len(getattr(self.data, name)) for name in ("train", "validation", "test")}
        return {
            "config": asdict(self.config),
            "data": {
                "name": self.data.name,
                "classes": self.data.classes,
                "shape": list(self.data.shape),
                **splits,
                "digest": self.digest,
            },
            "environment": {**environment(), "threads": torch.get_num_threads(), "device": self.device},
            "test": {
                "last_epoch_accuracy": last,
                "accuracy": accuracy,
                "loss": loss,
                "chosen_epoch": self.best["epoch"],
                "validation_accuracy": self.best["validation_accuracy"],
            },
            "size": {
                "dense": {key: self.history[0][key] for key in ("parameters", "macs")},
                "pruned": asdict(size(self.model, self.data.shape)),
            },
            "history": self.history,
            "rounds": self.rounds,
        }

    def _fresh_optimizer(self) -> torch.optim.SGD:
        config = self.config
        return torch.optim.SGD(
            self.model.parameters(), config.lr_of(0), momentum=config.momentum, weight_decay=config.weight_decay
        )

    def _pruner(self) -> fp.Pruner | None:
        config = self.config
        if config.method == NONE:
            return None
        how: dict[str, Any] = (
            {"schedule": config.thresholds}
            if config.thresholds
            else {"rounds": config.rounds, "schedule": config.schedule}
        )
        return fp.Pruner(
            self.model,
            config.method,
            None if config.thresholds else config.sparsity,
            **how,
            alpha=config.alpha,
            granularity="filter",
            parameters=models.prunable(self.model),
            temperature=config.temperature_of_scores,
            min_keep=config.min_keep,
            normalize=None,  # the paper's ranking: scores as they are
            generator=torch.Generator().manual_seed(config.seed),
            progress=False,
        )

    def _save(self) -> None:
        """Written beside the old one and moved into its place: an interruption leaves one of the two whole."""
        state = {
            "config": asdict(self.config),
            "data": self.digest,
            "epoch": self.epoch,
            "model": fp.state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "rng": torch.get_rng_state(),
            "history": self.history,
            "rounds": self.rounds,
            "best": self.best,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / "new.pt")
        (self.folder / "new.pt").replace(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        kept, result = self.folder / "checkpoint.pt", self.folder / "result.json"
        if result.exists():
            done = json.loads(result.read_text(encoding="utf-8"))
            self._check_is_this_run(done["config"], done["data"].get("digest"))
        if not kept.exists():
            return
        state = torch.load(kept, map_location=self.device, weights_only=True)
        self._check_is_this_run(state["config"], state.get("data"))
        fp.load_state_dict(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        torch.set_rng_state(state["rng"].cpu())
        self.epoch, self.history, self.rounds, self.best = (
            state["epoch"],
            state["history"],
            state["rounds"],
            state["best"],
        )

    def _check_is_this_run(self, config: dict[str, Any], digest: str | None) -> None:
        """The folder's run has this configuration, and these images in this split."""
        ours = json.loads(json.dumps(asdict(self.config)))
        theirs = json.loads(json.dumps(config))
        other = [field.name for field in fields(Config) if theirs.get(field.name) != ours[field.name]]
        other += ["data, subset, size or validation share"] if digest != self.digest else []
        if other:
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(other)}: give another --out, or delete it"
            )

    def _bar(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        bar: Iterator[Batch] = iter(
            tqdm(batches, total=total, unit="batch", leave=False, delay=2, disable=not self.progress)
        )
        return bar
