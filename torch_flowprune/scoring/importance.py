"""Scores as a value.

Computed from one flow for any number of measures, printed, saved, loaded, pruned with again and again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor, nn

from torch_flowprune.gradients import Flow, flow
from torch_flowprune.inputs import Closure, Loss, Pair, Pattern, cpu_generator, example_of, untouched, unwrapped
from torch_flowprune.scoring import measures
from torch_flowprune.scoring.candidates import Candidate, Candidates, label, parameter_candidates, targets_of
from torch_flowprune.scoring.channel_candidates import channel_candidates
from torch_flowprune.scoring.granularity import Granularity
from torch_flowprune.scoring.measures import Measure
from torch_flowprune.scoring.stacked_scores import Computed, LayerScores, not_finite


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """One score a unit, by parameter name: what :func:`scores` returns and ``global_prune(scores=...)`` takes.

    Attributes:
        values: 1-d tensors by parameter name, in model order.
        method: the name of the measure.
        granularity: what the units are.
    """

    values_: Mapping[str, LayerScores]
    method: str
    granularity: str

    def __getitem__(self, name: str) -> Tensor:
        value = self.values_[name]
        return value.all() if isinstance(value, Computed) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __str__(self) -> str:
        width = max(map(len, self.values_), default=9)
        lines = [f"{self.method} scores of {sum(map(torch.numel, self.values())):,} units ({self.granularity})"]
        lines.append(
            f"{'parameter':{width}}  {'units':>10}  {'lowest':>10}  {'median':>10}  {'highest':>10}  {'zero':>6}"
        )
        for name, value in self.items():
            if value.numel():
                low, median, high = value.min().item(), value.median().item(), value.max().item()
                zero = (value == 0).double().mean().item()
                lines.append(
                    f"{name:{width}}  {value.numel():>10,}  {low:>10.3g}  {median:>10.3g}  {high:>10.3g}  {zero:>6.1%}"
                )
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; the measure and the granularity travel in its metadata."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.items()}
        _safetensors().save_file(
            tensors,
            path,
            {
                "torch_flowprune": json.dumps(
                    {"method": self.method, "granularity": self.granularity, "names": list(self)}
                )
            },
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a file of another kind.
        """
        library = _safetensors()
        try:
            with library.safe_open(path, "pt") as file:
                known = json.loads((file.metadata() or {})["torch_flowprune"])
                return cls(
                    {name: file.get_tensor(name) for name in known["names"]}, known["method"], known["granularity"]
                )
        except (KeyError, library.SafetensorError) as error:
            raise ValueError(f"{path} holds no scores: expected a file written by Scores.save") from error


@overload
def scores(model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Any) -> Scores: ...
@overload
def scores(
    model: nn.Module, method: Sequence[str | Measure], data: object = None, **options: Any
) -> dict[str, Scores]: ...
def scores(  # type: ignore[misc]  # the overloads leave the keyword options to this signature
    model: nn.Module,
    method: str | Measure | Sequence[str | Measure] = "magnitude",
    data: object = None,
    *,
    granularity: Granularity = "weight",
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    theta0: Mapping[str, Tensor] | None = None,
    max_samples: int | None = None,
    temperature: float = 1.0,
    mode: str = "eval",
    example_inputs: Any = None,
    scored_by: str = "producer",
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    autocast: torch.dtype | None = None,
) -> Scores | dict[str, Scores]:
    """What removing each unit costs, by parameter name; the lowest would be pruned. The model is left as it was.

    Args:
        model: any module.
        method: a measure's name, a function of rows, or a list of them: all are read from one flow, and a dict by name
            comes back.
        data: what the flow reads, see :func:`~torch_flowprune.flow`; ``magnitude``, ``l1``, ``random`` need none.
        granularity: ``"weight"``, ``"filter"``, ``"n:m"`` or ``"channel"``; names of scores are then those of the
            coupled groups.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.parameters.prunable`.
        loss, closure, theta0, max_samples, temperature, mode, example_inputs, progress, max_memory, offload, autocast:
            see :func:`~torch_flowprune.flow`.
        scored_by: for channels: ``"producer"`` (the paper's), ``"group"``, ``"norm"`` or ``"scale"``, see
            :func:`~torch_flowprune.scoring.channel_candidates.channel_candidates`.
        generator: the source of randomness for ``random``; without it torch's global one is read and put back.

    Raises:
        ValueError, TypeError: for anything unknown, missing or not finite, naming it.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> scores(model, "magnitude")["0.weight"].shape
    torch.Size([6])
    """
    wrapped, model = model, unwrapped(model)
    methods = [method] if isinstance(method, str) or callable(method) else list(method)
    resolved = [measures.resolve(one) for one in methods]
    names = [one if isinstance(one, str) else measures.name_of(one) for one in methods]
    if len(set(names)) < len(names):
        raise ValueError(
            f"scores come back by name, and method= has {', '.join(names)}: give each function a __name__ of its own"
        )
    chosen = candidates_of(
        model, granularity, parameters, include, exclude, scored_by=scored_by, data=data, example_inputs=example_inputs
    )
    needs = {kind for measure in resolved for kind in measures.needs(measure)}
    if "theta0" in needs and theta0 is None:
        raise ValueError(
            "this measure reads theta0, the parameters at a reference point: pass theta0=, a state dict taken at "
            "initialisation"
        )
    point = flow(
        wrapped,
        data,
        loss=loss,
        needs=tuple(needs),
        closure=closure,
        parameters=targets_of(chosen),
        theta0=theta0,
        max_samples=max_samples,
        temperature=temperature,
        mode=mode,
        example_inputs=example_inputs,
        progress=progress,
        max_memory=max_memory,
        offload=offload,
        autocast=autocast,
    )
    found = {
        name: evaluate(point, measure, chosen, granularity, generator)
        for name, measure in zip(names, resolved, strict=True)
    }
    return next(iter(found.values())) if isinstance(method, str) or callable(method) else found


def importance_scores(
    model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Any
) -> dict[Pair, Tensor]:
    """Scores of single weights as ``prune.global_unstructured`` takes them, by ``(module, name)``.

    ``options`` are those of :func:`scores`. Give them to ``prune.global_unstructured`` with one of this package's
    classes: torch's ``L1Unstructured`` would prune by their absolute value.

    >>> model = nn.Linear(3, 2)
    >>> importance_scores(model)[(model, "weight")].shape
    torch.Size([2, 3])
    """
    if options.get("granularity", "weight") != "weight":
        raise ValueError("prune.global_unstructured prunes single weights: leave granularity= out")
    model = unwrapped(model)
    if options.get("parameters") is not None:
        options["parameters"] = list(options["parameters"])
    found = scores(model, method, data, **options)
    chosen = targets_of(
        candidates_of(model, "weight", options.get("parameters"), options.get("include"), options.get("exclude"))
    )
    return {target.owners[0]: found[name].view(target.parameter.shape) for name, target in chosen.items()}


def candidates_of(
    model: nn.Module,
    granularity: Granularity,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    *,
    scored_by: str = "producer",
    data: object = None,
    example_inputs: Any = None,
) -> Candidates:
    """What may go, by name: the units of each parameter, or coupled channels, which an example input shows."""
    if granularity != "channel":
        if scored_by != "producer":
            raise ValueError(
                f"scored_by={scored_by!r} is for granularity='channel', got granularity={label(granularity)!r}"
            )
        return parameter_candidates(model, granularity, parameters, include, exclude)
    if example_inputs is None and isinstance(data, Iterator):
        raise ValueError(
            "channels are found with an example input, and taking one from this iterator would lose a batch: pass "
            "example_inputs="
        )
    with untouched(model, data):
        example = example_of(data, example_inputs, next(model.parameters()).device)
        return channel_candidates(model, example, parameters, include, exclude, scored_by)


def evaluate(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """One measure over every candidate of a flow; every score is finite."""
    needed = measures.needs(measure)
    values = {}
    with cpu_generator(generator) as source:
        for name, candidate in found.items():
            arguments = {
                kind: source if kind == "generator" else candidate.rows(point.tensors(kind)) for kind in needed
            }
            values[name] = _checked(measure(**arguments), len(candidate), measure, name)
    _all_finite(values, measure)
    return Scores(values, measures.name_of(measure), label(granularity))


def on_access(
    point: Flow, measure: Measure, found: Candidates, granularity: Granularity, generator: torch.Generator | None = None
) -> Scores:
    """As :func:`evaluate`, but computed where they are read: a selection stores nothing, and checks for nan.

    Only what scores each unit by itself can be read in parts. This package's measures do, but for random numbers; a
    function of yours may look at whole layers, so its scores are stored.
    """
    needed, label_ = measures.needs(measure), measures.name_of(measure)
    if measure not in measures.MEASURES.values() or "generator" in needed:
        return evaluate(point, measure, found, granularity, generator)
    values = {
        name: Computed(name, label_, measure, needed, lambda kind, one=candidate: one.rows(point.tensors(kind)))  # type: ignore[misc]
        for name, candidate in found.items()
    }
    return Scores(values, label_, label(granularity))


def given(scores: Mapping[Any, Tensor], found: Candidates, granularity: Granularity) -> Scores:
    """Scores from outside, by name or ``(module, name)``, checked: one for every unit of every candidate, no nan."""
    values = {}
    for name, candidate in found.items():
        keys = (name, *(owner for target in candidate.targets for owner in target.owners))
        value = next((scores[key] for key in keys if key in scores), None)
        if value is None:
            raise ValueError(
                f"scores= has no entry for {name!r}: compute scores for it too, or leave it out with exclude="
            )
        values[name] = _as_units(value, candidate)
    return Scores(values, getattr(scores, "method", "given scores"), label(granularity))


def _as_units(value: Tensor, candidate: Candidate) -> Tensor:
    name = candidate.name
    if value.is_meta or not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"the scores of {name!r} should be numbers with values, got {value.dtype} on {value.device}")
    whole = value.shape == candidate.shape and value.numel() == len(candidate)
    laid = candidate.rows({name: value}).squeeze(-1) if whole and value.dim() != 1 else value
    if laid.shape != (len(candidate),):
        raise ValueError(
            f"the scores of {name!r} have shape {tuple(value.shape)}: expected one a unit, ({len(candidate)},)"
        )
    if (
        laid.sum().isnan() and laid.isnan().any()
    ):  # the sum is nan where a score is (or where both infinities are), and quick
        raise ValueError(f"the scores of {name!r} hold nan: no order can be told")
    return laid.detach().to(candidate.targets[0].parameter.device)


def _checked(value: Tensor, units: int, measure: Measure, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (units,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the measure {measures.name_of(measure)!r} gave {found} for {name!r}: expected one score a unit, shape "
            f"({units},); reduce the last axis"
        )
    return value


def _all_finite(values: dict[str, Tensor], measure: Measure) -> None:
    """Checked together, with one synchronisation a device."""
    bad = [name for name, finite in zip(values, _finite(values), strict=True) if not finite]
    if bad:
        raise not_finite(measures.name_of(measure), bad)


def _finite(values: dict[str, Tensor]) -> list[bool]:
    """From the extremes, which nan and inf show in: one read of the scores."""
    extremes = [torch.stack(value.aminmax()) if value.numel() else value.new_zeros(2) for value in values.values()]
    by_device = {
        device: iter(
            torch.stack([pair.double() for pair in extremes if pair.device == device]).isfinite().all(-1).tolist()
        )
        for device in {pair.device for pair in extremes}
    }
    return [next(by_device[pair.device]) for pair in extremes]


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "scores are saved as safetensors: pip install safetensors (or torch-flowprune[io])"
        ) from error
    import types

    return types.SimpleNamespace(
        save_file=safetensors.torch.save_file,
        safe_open=safetensors.safe_open,
        SafetensorError=safetensors.SafetensorError,
    )
