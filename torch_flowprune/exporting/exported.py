"""A pruned model in one call to a file that others run: written, read back, and compared."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels import shrink as without_dead_channels
from torch_flowprune.exporting.formats import FORMATS, Material, Runs
from torch_flowprune.inputs import (
    arguments,
    as_path,
    check_folder,
    check_keywords,
    example_of,
    is_mask,
    untouched,
    unwrapped,
    without_cache,
)
from torch_flowprune.masking import export_ready

_CALLS = 5
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION = 3e-2


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        format: its format.
        file_bytes: its size.
        dense_bytes: the size of the unpruned model's parameters and buffers.
        parameters: how many parameters the exported model has.
        difference: the largest difference between the outputs of the model and of the file that was read back, as a
            fraction of the largest output; None if nothing here can run the file.
        model_seconds: the time of a call of the pruned model, in eval mode, with masks; the median of five.
        file_seconds: the time of a call of the file that was read back; None if nothing here can run it.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = fp.export(torch.nn.Linear(4, 2), torch.ones(2, 4), f"{folder}/layer.safetensors")
    >>> written.parameters, written.dense_bytes
    (10, 40)
    """

    path: str
    format: str
    file_bytes: int
    dense_bytes: int
    parameters: int
    difference: float | None
    model_seconds: float
    file_seconds: float | None

    def __str__(self) -> str:
        size = f"{self.path} ({self.format}): {_megabytes(self.file_bytes)}, the unpruned weights take "
        size += f"{_megabytes(self.dense_bytes)}; {self.parameters:,} parameters"
        if self.difference is None or self.file_seconds is None:
            return f"{size}\nnot compared: nothing here runs it (pip install onnxruntime)"
        return (
            f"{size}\nread back: outputs differ by up to {self.difference:.2g} of the largest; a call takes "
            f"{1e3 * self.file_seconds:.1f} ms, of the model {1e3 * self.model_seconds:.1f} ms"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for ``json``."""
        return asdict(self)


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | PathLike[str],
    *,
    shrink: bool = False,
    dynamic_shapes: Any = None,
    tolerance: float | None = None,
    **unknown: Never,
) -> Exported:
    """Write a pruned model to a file, read it back, and compare the two.

    It exports a copy in eval mode: masks become zeros, or dead channels are removed. The suffix sets the format:
    ``.onnx``, ``.pt2`` (a ``torch.export`` program) or ``.safetensors`` (weights and masks, for
    :func:`~torch_flowprune.load_pruned`, under the names of the unpruned model). An existing file is replaced only
    after the new one has passed.

    Args:
        model: any model, pruned or not; it stays as it is.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of them.
        path: the file.
        shrink: remove dead channels, as :func:`~torch_flowprune.shrink` does.
        dynamic_shapes: axes whose size is left open, as ``torch.export.export`` takes them.
        tolerance: how far outputs may differ, as a fraction of the largest; 1e-3 in float32 if left out.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        Size, time and difference.

    Raises:
        TypeError: for what is no model or no path, or an unknown keyword.
        ValueError: for an unknown suffix, or if the file that was read back computes something else.
        FileNotFoundError: if the folder of the path does not exist.
        ShrinkError: if no smaller model can be made, or written.
        ImportError: if a package is missing.

    See Also:
        :func:`~torch_flowprune.export_ready`: a copy without masks, for other exporters.
        :func:`~torch_flowprune.save_pruned`: one safetensors file, to load and prune further.

    >>> import tempfile, torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = fp.global_prune(model, "magnitude", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = fp.export(model, torch.ones(2, 4), f"{folder}/half.safetensors")
    >>> found.format, found.difference
    ('safetensors', 0.0)
    """
    check_keywords(export, unknown)
    file, inner = Path(as_path(path)), unwrapped(model)
    kind = format_of(file)
    _check_tolerance(tolerance)
    device = next((one.device for one in inner.parameters()), torch.device("cpu"))
    args, kwargs = arguments(inner, example_of(None, example_inputs, device))
    with untouched(inner):
        plain = _maskless(inner, example_inputs, shrink).eval()
        cacheless = without_cache(inner, args)
        told = {} if _says_no_cache(plain) else cacheless
        material = Material(inner, plain, shrink, args, {**told, **kwargs}, dynamic_shapes, cacheless)
        before = material.run(inner)
        before()  # inputs that the model does not take end in its own error, before an exporter's
        after, difference = _proven(kind, material, file, before, tolerance)
        seconds = [None if run is None else _seconds(run) for run in (before, after)]
    return Exported(
        str(path),
        kind.name,
        file.stat().st_size,
        _dense_bytes(inner),
        sum(parameter.numel() for parameter in plain.parameters()),
        difference,
        seconds[0] or 0.0,
        seconds[1],
    )


def _says_no_cache(plain: nn.Module) -> bool:
    """Whether the copy's config keeps it from handing out its keys and values; a call of the file need not say so."""
    configs = [one for module in plain.modules() if hasattr(one := getattr(module, "config", None), "use_cache")]
    for config in configs:
        vars(config)["use_cache"] = False
    return bool(configs)


def _check_tolerance(tolerance: Any) -> None:
    if tolerance is not None and (not (isinstance(tolerance, int | float) and tolerance >= 0)):
        raise ValueError(f"tolerance should be a fraction of the largest output, such as 1e-3, got {tolerance!r}")


def format_of(path: Path) -> Any:
    """The kind of file that a path asks for.

    Raises:
        ValueError: for another suffix.
        FileNotFoundError: where its folder is not there.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file name that ends in {', '.join(FORMATS)}, got {path.suffix!r}")
    check_folder(path)
    return FORMATS[path.suffix]


def _maskless(model: nn.Module, example_inputs: Any, shrink: bool) -> nn.Module:
    """A copy without masks, or without what they removed."""
    if shrink:
        model = without_dead_channels(model, example_inputs)
    try:
        return export_ready(model)
    except ValueError:  # masks that cannot be made permanent stay, and are part of what is written
        return copy.deepcopy(model)


def _proven(
    kind: Any, material: Material, file: Path, before: Runs, tolerance: float | None
) -> tuple[Runs | None, float | None]:
    """The file, once it has been read back and compared: until then, what was there stays."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fresh = Path(folder) / file.name
        kind.write(material, fresh)
        after = kind.read(material, fresh)
        difference = None if after is None else _compared(before(), after(), tolerance, kind.name)
        fresh.replace(file)
    return after, difference


def _compared(ours: Sequence[Any], theirs: Sequence[Any], tolerance: float | None, name: str) -> float:
    """The largest difference of any two outputs, as a fraction of the largest value."""
    worst = 0.0
    for one, other in zip(_tensors(ours), _tensors(theirs), strict=True):
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.cpu().isfinite()):
            raise ValueError(_computes_another(name, f"shape {tuple(one.shape)}", f"{tuple(other.shape)}"))
        finite = one.isfinite()
        largest = one[finite].abs().double().max().item() if bool(finite.any()) else 0.0
        off = (one.double() - other.cpu().double())[finite].abs().max().item() if largest else 0.0
        worst = max(worst, off / largest if largest else off)
        if worst > (_ROUNDING.get(one.dtype, _LOW_PRECISION) if tolerance is None else tolerance):
            raise ValueError(_computes_another(name, f"an output of up to {largest:.3g}", f"one off by {off:.3g}"))
    return worst


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _computes_another(name: str, expected: str, found: str) -> str:
    return (
        f"the {name} that was written does not compute what the model does, and was not kept: expected {expected}, "
        f"found {found}; a wider tolerance= takes it, where that is rounding"
    )


def _seconds(run: Runs) -> float:
    """The median time of a call."""
    times = []
    for _ in range(_CALLS):
        started = perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    return median(times)


def _dense_bytes(model: nn.Module) -> int:
    """What a model without its masks takes."""
    state = model.state_dict()
    known = {id(value): value for name, value in state.items() if not is_mask(name, state)}
    return sum(value.nbytes for value in known.values() if isinstance(value, Tensor))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
