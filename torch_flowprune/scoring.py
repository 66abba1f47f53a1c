"""Scores as a value: computed from one flow for any number of measures, printed, saved, loaded, pruned with again and again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor, nn

from torch_flowprune import measures
from torch_flowprune.data import Closure, Loss
from torch_flowprune.flow import Flow, flow
from torch_flowprune.masking import check_can_mask
from torch_flowprune.measures import Measure
from torch_flowprune.targets import Pair, Pattern, Target, prunable, unwrapped
from torch_flowprune.units import Blocks, Granularity, Units, parse

Cuts = dict[str, tuple[Target, Units]]


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """One score a unit, by parameter name: what :func:`scores` returns and ``global_prune(scores=...)`` takes.

    Attributes:
        values: 1-d tensors by parameter name, in model order.
        method: the name of the measure.
        granularity: what the units are.
    """

    values_: dict[str, Tensor]
    method: str
    granularity: str

    def __getitem__(self, name: str) -> Tensor:
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __str__(self) -> str:
        width = max(map(len, self.values_), default=9)
        lines = [f"{self.method} scores of {sum(map(torch.numel, self.values())):,} units ({self.granularity})"]
        lines.append(f"{'parameter':{width}}  {'units':>10}  {'lowest':>10}  {'median':>10}  {'highest':>10}  {'zero':>6}")
        for name, value in self.values_.items():
            if value.numel():
                low, median, high = value.min().item(), value.median().item(), value.max().item()
                zero = (value == 0).double().mean().item()
                lines.append(f"{name:{width}}  {value.numel():>10,}  {low:>10.3g}  {median:>10.3g}  {high:>10.3g}  {zero:>6.1%}")
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; the measure and the granularity travel in its metadata."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.values_.items()}
        _safetensors().save_file(tensors, path, {"torch_flowprune": json.dumps({"method": self.method, "granularity": self.granularity, "names": list(self)})})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a safetensors file of another kind.
        """
        with _safetensors().safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get("torch_flowprune")
            if metadata is None:
                raise ValueError(f"{path} holds no scores: expected a file written by Scores.save")
            known = json.loads(metadata)
            return cls({name: file.get_tensor(name) for name in known["names"]}, known["method"], known["granularity"])


@overload
def scores(model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Any) -> Scores: ...
@overload
def scores(model: nn.Module, method: Sequence[str | Measure], data: object = None, **options: Any) -> dict[str, Scores]: ...
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
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Scores | dict[str, Scores]:
    """What removing each unit costs, by parameter name; the lowest would be pruned. The model is left as it was.

    Args:
        model: any module.
        method: a measure's name, a function of rows, or a list of them: all are read from one flow, and a dict by name comes back.
        data: what the flow reads, see :func:`~torch_flowprune.flow.flow`; ``magnitude``, ``l1``, ``random`` need none.
        granularity: ``"weight"``, ``"filter"`` or ``"n:m"``.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.targets.prunable`.
        loss, closure, theta0, max_samples, temperature, mode, example_inputs, progress: see :func:`~torch_flowprune.flow.flow`.
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
        raise ValueError(f"scores come back by name, and method= has {', '.join(names)}: give each function a __name__ of its own")
    cuts = cut(model, granularity, parameters, include, exclude)
    needs = {kind for measure in resolved for kind in measures.needs(measure)}
    if "theta0" in needs and theta0 is None:
        raise ValueError("this measure reads theta0, the parameters at a reference point: pass theta0=, a state dict taken at initialisation")
    point = flow(
        wrapped, data, loss=loss, needs=tuple(needs), closure=closure, parameters=cuts, theta0=theta0, max_samples=max_samples,
        temperature=temperature, mode=mode, example_inputs=example_inputs, progress=progress,
    )  # fmt: skip
    found = {name: evaluate(point, measure, cuts, granularity, generator) for name, measure in zip(names, resolved, strict=True)}
    return next(iter(found.values())) if isinstance(method, str) or callable(method) else found


def importance_scores(model: nn.Module, method: str | Measure = "magnitude", data: object = None, **options: Any) -> dict[Pair, Tensor]:
    """Scores of single weights as ``prune.global_unstructured(importance_scores=...)`` takes them: tensors shaped like the parameters, by ``(module, name)``.

    ``options`` are those of :func:`scores`. Give them to ``prune.global_unstructured`` with one of this package's classes: torch's
    ``L1Unstructured`` would prune by their absolute value.

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
    chosen = cut(model, "weight", options.get("parameters"), options.get("include"), options.get("exclude"))
    return {target.owners[0]: found[name].view(target.parameter.shape) for name, (target, _) in chosen.items()}


def cut(
    model: nn.Module,
    granularity: Granularity,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
) -> Cuts:
    """The parameters to prune and how each is cut into units; all of them can carry a mask.

    Parameters that n:m blocks do not fit are an error where ``parameters`` names them, and else left out with a warning.
    """
    units_of = parse(granularity)
    cuts: Cuts = {}
    left_out = []
    for target in prunable(model, parameters, include, exclude):
        check_can_mask(target, target.name)
        units = units_of(target)
        if isinstance(units, Blocks) and not units.fits(target.parameter.shape):
            left_out.append(target.name)
        else:
            cuts[target.name] = (target, units)
    if left_out:
        _report_left_out(left_out, granularity, required=parameters is not None or not cuts)
    return cuts


def _report_left_out(names: list[str], granularity: Granularity, required: bool) -> None:
    text = f"the input axis of {', '.join(names)} does not divide into whole blocks of {granularity}"
    if required:
        raise ValueError(f"{text}: leave them out")
    warnings.warn(f"{text}: they stay dense", UserWarning, stacklevel=4)


def evaluate(point: Flow, measure: Measure, cuts: Cuts, granularity: Granularity, generator: torch.Generator | None = None) -> Scores:
    """One measure over every cut parameter of a flow; every score is finite."""
    needed = measures.needs(measure)
    with _source(generator) as source:
        values = {}
        for name, (_, units) in cuts.items():
            arguments = {kind: source if kind == "generator" else units.rows(point.ingredient(kind, name)) for kind in needed}
            values[name] = _checked(measure(**arguments), len(units.rows(point.theta[name])), measure, name)
    _all_finite(values, measure)
    return Scores(values, measures.name_of(measure), granularity if isinstance(granularity, str) else repr(granularity))


def _source(generator: torch.Generator | None) -> Any:
    """The generator given; else torch's global one, put back afterwards, so that scoring leaves no trace and a seed gives one mask."""
    return _Global() if generator is None else _Given(generator)


class _Given:
    def __init__(self, generator: torch.Generator) -> None:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise TypeError(f"generator should be a torch.Generator on the CPU (one seed then gives one mask on every device), got {generator!r}")
        self.generator = generator

    def __enter__(self) -> torch.Generator:
        return self.generator

    def __exit__(self, *error: object) -> None: ...


class _Global(_Given):
    def __init__(self) -> None:
        super().__init__(torch.default_generator)

    def __enter__(self) -> torch.Generator:
        self.state = self.generator.get_state()
        return self.generator

    def __exit__(self, *error: object) -> None:
        self.generator.set_state(self.state)


def _checked(value: Tensor, units: int, measure: Measure, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (units,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the measure {measures.name_of(measure)!r} gave {found} for {name!r}: expected one score a unit, shape ({units},); reduce the last axis")
    return value


def _all_finite(values: dict[str, Tensor], measure: Measure) -> None:
    """Checked together, with one synchronisation a device."""
    bad = [name for name, finite in zip(values, _finite(values), strict=True) if not finite]
    if bad:
        raise ValueError(
            f"the {measures.name_of(measure)} scores of {', '.join(bad[:5])} are not all finite: a weight or derivative there is nan or inf "
            "(check the weights and the data; try model.double())"
        )


def _finite(values: dict[str, Tensor]) -> list[bool]:
    """From the extremes, which nan and inf show in: one read of the scores."""
    extremes = [torch.stack(value.aminmax()) if value.numel() else value.new_zeros(2) for value in values.values()]
    by_device = {device: iter(torch.stack([pair.double() for pair in extremes if pair.device == device]).isfinite().all(-1).tolist())
                 for device in {pair.device for pair in extremes}}  # fmt: skip
    return [next(by_device[pair.device]) for pair in extremes]


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("scores are saved as safetensors: pip install safetensors (or torch-flowprune[io])") from error
    import types

    return types.SimpleNamespace(save_file=safetensors.torch.save_file, safe_open=safetensors.safe_open)
