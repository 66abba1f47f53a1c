"""The commands ``prune`` and ``score``: any timm model, an image folder in, safetensors out."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import torch_flowprune as fp
from torch_flowprune.scoring import measures, parse_granularity
from torch_flowprune.selection import AllocationOptions

PICTURES = (".png", ".svg", ".pdf")
_NORMALIZE = {"none": None}
_NEEDS_LABELS = {"g", "g2", "g2_sample", "Hg"}


def prune_timm(chosen: argparse.Namespace) -> None:
    """Prune a timm model, print what went, write what was asked for."""
    check_output("--out", chosen.out, (".safetensors",))
    check_output("--report", chosen.report, (".json",))
    check_output("--plot", chosen.plot, PICTURES)
    given = None if chosen.scores is None else fp.Scores.load(_existing("--scores", chosen.scores))
    _check(chosen, needs_data=given is None)
    if chosen.sparsity is None and ":" not in (chosen.granularity or getattr(given, "granularity", "")):
        raise ValueError(
            "--sparsity is missing: expected a share from 0 to 1, such as --sparsity 0.9 (only n:m granularity goes "
            "without)"
        )
    model = load_model(chosen)
    scored = (
        {"scores": given} if given else {"method": chosen.method, "rounds": chosen.rounds, "schedule": chosen.schedule}
    )
    words = ("sparsity", "granularity", "include", "exclude", *AllocationOptions.__annotations__)
    chooses = {name: getattr(chosen, name) for name in words} | {
        "normalize": _NORMALIZE.get(chosen.normalize, chosen.normalize)
    }
    report = fp.global_prune(model, **scored, **chooses, **_sources(chosen, model, scored=given is not None))
    _check_alive(report, allowed=chosen.allow_collapse)
    written = _write(model, report, chosen)  # before it is told: a reader of the table may close the pipe
    print(report)
    print(written or "nothing was written: --out FILE.safetensors keeps the pruned weights")


def _write(model: nn.Module, report: fp.Report, chosen: argparse.Namespace) -> str:
    """What was asked for, to files; returns how the model is loaded."""
    if chosen.out:
        _save_dense(model, chosen.out, report)
    if chosen.report:
        chosen.report.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if chosen.plot:
        report.plot(chosen.plot)
    others = [f"{path} written" for path in (chosen.report, chosen.plot) if path]
    return "; ".join([f"{chosen.out} written: load it with {_loading(chosen)}"] * bool(chosen.out) + others)


def _check_alive(report: fp.Report, *, allowed: bool) -> None:
    empty = [layer.name for layer in report.layers if layer.units and layer.pruned == layer.units]
    if empty and not allowed:
        print(report)
        raise ValueError(
            f"nothing is left of {', '.join(empty[:5])}: the model is dead, and was not written; prune less, share "
            "sparsity out with --allocation layer or erk, or pass --allow-collapse to write it all the same"
        )


def score(chosen: argparse.Namespace) -> None:
    """Score the units of a timm model, print a summary, write the scores."""
    check_output("--out", chosen.out, (".safetensors",))
    _check(chosen, needs_data=True)
    model = load_model(chosen)
    found = fp.scores(
        model,
        chosen.method,
        granularity=chosen.granularity or "weight",
        include=chosen.include,
        exclude=chosen.exclude,
        **_sources(chosen, model),
    )
    if chosen.out:
        found.save(chosen.out)
    print(found)
    if chosen.out:
        print(f"{chosen.out} written: prune with prune {chosen.name} --scores {chosen.out} --sparsity ...")


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """An output that could not be written is an error before anything is computed."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: expected a file name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path}: this is a folder; expected the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{option} {path}: it cannot be written here; choose another folder, or another file")


def load_model(chosen: argparse.Namespace) -> nn.Module:
    """The timm model by its name, with pretrained weights, those of a checkpoint, or none."""
    timm = _timm()
    _check_name(timm, chosen.name)
    torch.manual_seed(chosen.seed)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classes = {} if chosen.num_classes is None else {"num_classes": chosen.num_classes}
    if chosen.random_init:
        model = timm.create_model(chosen.name, pretrained=False, **classes)
    elif chosen.checkpoint:
        model = _from_checkpoint(timm, chosen, classes)
    else:
        model = _pretrained(timm, chosen, classes)
    return model.eval().to(device)  # type: ignore[no-any-return]


def _check_name(timm: Any, name: str) -> None:
    if ":" in name:  # hf-hub:owner/name and local-dir:path, which timm resolves
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"timm has no model {name!r}{hint}. `python -c 'import timm; print(timm.list_models())'` lists them all"
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise ValueError(f"timm has no weights called {name!r}: expected one of {', '.join(known)}") from error


def _from_checkpoint(timm: Any, chosen: argparse.Namespace, classes: dict[str, int]) -> Any:
    path = _existing("--checkpoint", chosen.checkpoint)
    try:
        return timm.create_model(chosen.name, checkpoint_path=str(path), **classes)
    except (RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--checkpoint {path} does not load into {chosen.name}: {reason}. Another class count? --num-classes N"
        ) from error


def _pretrained(timm: Any, chosen: argparse.Namespace, classes: dict[str, int]) -> Any:
    try:
        return timm.create_model(chosen.name, pretrained=True, **classes)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"the pretrained weights of {chosen.name} could not be had: {reason} "
            "Pass --checkpoint FILE (weights you have) or --random-init (none), or try again where the hub can be "
            "reached"
        ) from error


def _check(chosen: argparse.Namespace, *, needs_data: bool) -> None:
    """What can be told before a model is built."""
    needs = set(measures.needs(chosen.method))
    if chosen.granularity not in (None, "channel"):
        parse_granularity(chosen.granularity)
    if chosen.data is not None and not chosen.data.is_dir():
        raise FileNotFoundError(
            f"--data {chosen.data}: there is no such folder; expected one with a folder of pictures for each class"
        )
    if needs_data and chosen.data is None and (reads := sorted(needs & _NEEDS_LABELS)):
        free = [name for name in fp.MEASURES if not set(measures.needs(name)) & (_NEEDS_LABELS | {"theta0"})]
        raise ValueError(
            f"{chosen.method} reads {', '.join(reads)} of a loss, and no data were given: "
            f"pass --data DIR (pictures in one folder a class), or a measure that reads none: {', '.join(free)}"
        )
    if needs_data and "theta0" in needs and chosen.theta0 is None:
        raise ValueError(
            f"{chosen.method} reads theta0, the weights at initialisation: pass --theta0 FILE, a checkpoint taken there"
        )


def _sources(chosen: argparse.Namespace, model: nn.Module, *, scored: bool = False) -> dict[str, Any]:
    """What a measure reads, as far as this one reads it; and the shape of an input, for synflow and for channels."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=model)
    inputs = torch.ones(1, *config["input_size"], device=next(model.parameters()).device)
    found: dict[str, Any] = {"generator": torch.Generator().manual_seed(chosen.seed), "example_inputs": inputs}
    needs = set() if scored else set(measures.needs(chosen.method))
    if needs & _NEEDS_LABELS:
        found |= {"data": loader(chosen, model, config), "mode": chosen.mode, "temperature": chosen.temperature}
    if "theta0" in needs:
        from timm.models import load_state_dict

        found["theta0"] = load_state_dict(str(_existing("--theta0", chosen.theta0)))
    return found


def loader(chosen: argparse.Namespace, model: nn.Module, config: dict[str, Any]) -> DataLoader[Any]:
    """``--samples`` pictures of ``--data``, drawn by the seed, as the model was evaluated on: timm's transforms."""
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    labels = _labels(chosen.data, model)
    pictures = ImageFolder(chosen.data, create_transform(**config, is_training=False), target_transform=labels)
    drawn = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(chosen.seed))[: chosen.samples]
    return DataLoader(Subset(pictures, drawn.tolist()), chosen.batch_size, num_workers=chosen.workers)


def _labels(folder: Path, model: Any) -> Any:
    """From the number of a folder to the model's class.

    ImageNet's own numbers where the folders are named by its synsets.
    """
    from timm.data import ImageNetInfo

    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) == model.num_classes:
        return None
    known = {label: index for index, label in enumerate(ImageNetInfo().label_names())}
    if names and model.num_classes == len(known) and all(name in known for name in names):
        return [known[name] for name in names].__getitem__
    raise ValueError(
        f"--data {folder}: expected a folder for each of the model's {model.num_classes} classes, found {len(names)} "
        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); pass --num-classes {max(len(names), 1)}, with "
        "a --checkpoint for as many"
    )


def _save_dense(model: nn.Module, path: Path, report: fp.Report) -> None:
    """The state dict under the unpruned model's names, zeros in place; the model's masks become permanent."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous().clone() for name, value in fp.remove(model).state_dict().items()
    }
    summary = {"method": report.method, "granularity": report.granularity, "sparsity": report.sparsity}
    save_file(state, path, {"format": "pt", "torch_flowprune.pruned": json.dumps(summary)})


def _loading(chosen: argparse.Namespace) -> str:
    classes = "" if chosen.num_classes is None else f", num_classes={chosen.num_classes}"
    return f"timm.create_model({chosen.name!r}, checkpoint_path={str(chosen.out)!r}{classes})"


def _existing(option: str, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")
    return path


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("models come from timm: pip install 'torch-flowprune[demo]'") from error
    return timm
