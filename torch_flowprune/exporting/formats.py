"""The files that a model is exported to: how each is written, and how it is run when it is read back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.exporting.pruned_file import PrunedFile, load_pruned
from torch_flowprune.inputs import tree_leaves
from torch_flowprune.masking import dense_copy

Runs: TypeAlias = Callable[[], Sequence[Any]]
"""One call of a model; the leaves of its output, in order."""


@dataclass(frozen=True)
class Material:
    """What there is to write: the model as it was given, the plain one made of it, and a call of either.

    Attributes:
        cacheless: what keeps the models from handing out a cache, which no exporter knows; the plain one, where its
            config can say so, needs not be told in each call.
    """

    model: nn.Module
    plain: nn.Module
    shrunk: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    cacheless: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Runs:
        """A call of this model with the example inputs, without gradients."""
        return self._run(model, {**self.cacheless, **self.kwargs})

    def run_written(self, program: Callable[..., Any]) -> Runs:
        """The same of what was written."""
        return self._run(program, self.kwargs)

    def _run(self, model: Callable[..., Any], kwargs: Mapping[str, Any]) -> Runs:
        def once() -> Sequence[Any]:
            with torch.no_grad():
                return tree_leaves(model(*self.args, **kwargs))

        return once


class OnnxFile:
    """ONNX, run by onnxruntime where it is installed."""

    name = "ONNX"

    @staticmethod
    def write(material: Material, path: Path) -> None:
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError("ONNX is written by torch with two packages: pip install onnx onnxscript") from error
        torch.onnx.export(
            material.plain,
            material.args,
            str(path),
            kwargs=material.kwargs,
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes=material.dynamic_shapes,
        )

    @staticmethod
    def read(material: Material, path: Path) -> Runs | None:
        try:
            import onnxruntime
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        by_name = {name: value for name, value in material.kwargs.items() if name in names}
        others = [leaf for leaf in tree_leaves((material.args, material.kwargs)) if isinstance(leaf, Tensor)]
        others = [leaf for leaf in others if not any(leaf is value for value in by_name.values())]
        by_name |= dict(zip([name for name in names if name not in by_name], others, strict=True))
        feed = {name: value.detach().cpu().numpy() for name, value in by_name.items()}
        return lambda: [torch.from_numpy(value) for value in session.run(None, feed)]


class ProgramFile:
    """A ``torch.export`` program."""

    name = "torch.export program"

    @staticmethod
    def write(material: Material, path: Path) -> None:
        program = torch.export.export(
            material.plain, material.args, material.kwargs, dynamic_shapes=material.dynamic_shapes
        )
        torch.export.save(program, path)

    @staticmethod
    def read(material: Material, path: Path) -> Runs | None:
        return material.run_written(torch.export.load(path).module())


class WeightsFile:
    """The weights alone, as safetensors."""

    name = "safetensors"

    @staticmethod
    def write(material: Material, path: Path) -> None:
        PrunedFile.of(material.plain if material.shrunk else material.model).write(path)

    @staticmethod
    def read(material: Material, path: Path) -> Runs | None:
        return material.run(load_pruned(_to_fill(material.model), path).eval())


FORMATS: Mapping[str, Any] = {
    ".onnx": OnnxFile,
    ".pt2": ProgramFile,
    ".safetensors": WeightsFile,
}
"""By the suffix of the file's name."""


def _to_fill(model: nn.Module) -> nn.Module:
    """A copy whose weights are nobody's: what is not loaded shows."""
    try:
        dense, _ = dense_copy(model)
    except ValueError:  # masks that cannot be made permanent
        dense = copy.deepcopy(model)
    for parameter in dense.parameters():
        parameter.detach().zero_()
    return dense
