"""What was removed, where, and what it was predicted to cost: as a value, a table and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch_flowprune.channels import Size
from torch_flowprune.tables import InNotebooks, Table


@dataclass(frozen=True)
class Layer:
    """One parameter after pruning.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        units: how many units it has.
        pruned: how many of them are pruned in total.
        newly_pruned: how many this call pruned.
        weights: how many weights it has.
        weights_pruned: how many of them the mask sets to zero.
        why: what decided how many units it keeps: the allocation, or the bound that limited it.

    See Also:
        :class:`~torch_flowprune.Report`: all parameters together.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    pruned: int
    newly_pruned: int
    weights: int
    weights_pruned: int
    why: str = ""

    @property
    def sparsity(self) -> float:
        """Pruned units / all units."""
        return self.pruned / self.units if self.units else 0.0


@dataclass(frozen=True)
class Spent:
    """The cost that a target limits, and what pruning left of it.

    Attributes:
        cost: the name of the cost: ``"parameters"``, ``"flops"``, ``"memory"`` (bytes) or ``"latency"`` (milliseconds,
            according to the table).
        dense: the cost with all units.
        asked: the target.
        left: the cost after pruning.

    See Also:
        :class:`~torch_flowprune.Report`: holds it, as ``spent``.
        :func:`~torch_flowprune.global_prune`: ``cost=`` and ``at_most=`` set targets.
    """

    cost: str
    dense: float
    asked: float
    left: float

    def __str__(self) -> str:
        unit = {"memory": " bytes", "latency": " ms"}.get(self.cost, "")
        return f"{self.cost}: {self.left:,.10g} of {self.dense:,.10g}{unit} left, at most {self.asked:,.10g} asked for"


@dataclass(frozen=True)
class Report(InNotebooks):
    """What :func:`~torch_flowprune.global_prune` did.

    Attributes:
        method: the measure's name.
        granularity: what a unit is.
        layers: one entry per parameter, in model order.
        threshold: the highest pruned score of the last round; None if nothing was pruned, or if each block or output
            has its own.
        tied: how many units were kept although their score equals the last pruned one (of their block, or output), in
            the round with the most: among equal scores, model order decided.
        loss: the mean loss before the (last) pruning, if data was read.
        samples: how many samples were read.
        counted: how they were counted.
        asked: with ``round_to`` or ``uniform``, how many units should have been pruned, if that differs from
            ``pruned``; else None.
        predicted_loss_change: −Σ θ·g over the pruned weights: the first-order change of the loss, summed over the
            rounds; None if g is unknown. It is computed on the data that chose the weights: if the same gradient made
            the scores, it is nearer to 0 than the true change by construction. :func:`~torch_flowprune.predict` on
            other data has an error bar.
        predicted_gradient_norm_change: −2 Σ θ·Hg over the pruned weights: the first-order change of ‖g‖², over all
            parameters that require a gradient, and those scored; None if Hg is unknown.
        dense: for channels, the size of the model with all channels; else None.
        left: for channels, the size of the model after :func:`~torch_flowprune.shrink`; else None.
        model_weights: all weights of the model, prunable or not.
        spent: each target that limits a cost of the model, and what pruning left of it.

    >>> import torch, torch_flowprune as fp
    >>> report = fp.global_prune(torch.nn.Linear(8, 4), sparsity=0.25)
    >>> report.pruned, report.units, report.layers[0].sparsity
    (8, 32, 0.25)
    """

    method: str
    granularity: str
    layers: tuple[Layer, ...]
    threshold: float | None = None
    tied: int = 0
    loss: float | None = None
    samples: int = 0
    predicted_loss_change: float | None = None
    predicted_gradient_norm_change: float | None = None
    dense: Size | None = None
    left: Size | None = None
    model_weights: int = 0
    spent: tuple[Spent, ...] = ()
    counted: str | None = None
    asked: int | None = None

    @property
    def weights_pruned(self) -> int:
        """How many of the prunable weights the masks set to zero."""
        return sum(layer.weights_pruned for layer in self.layers)

    @property
    def model_sparsity(self) -> float:
        """The fraction of all weights of the model, prunable or not, that the masks set to zero."""
        return self.weights_pruned / self.model_weights if self.model_weights else 0.0

    @property
    def units(self) -> int:
        """All prunable units."""
        return sum(layer.units for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Pruned units, in total."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def newly_pruned(self) -> int:
        """Units that this call pruned."""
        return sum(layer.newly_pruned for layer in self.layers)

    @property
    def emptied(self) -> list[str]:
        """The layers with nothing left. Blocks are none: what they added to is passed on."""
        whole = [] if self.granularity == "block" else self.layers
        return [layer.name for layer in whole if layer.units and layer.units == layer.pruned]

    @property
    def sparsity(self) -> float:
        """Pruned units / all prunable units."""
        return self.pruned / self.units if self.units else 0.0

    def __str__(self) -> str:
        return f"{self._summary()}\n{self.table()}"

    def _summary(self) -> str:
        lines = [
            (
                f"{self.method}, {self.granularity}: {self.pruned:,} of {self.units:,} units pruned "
                f"({self.sparsity:.2%}), {self.newly_pruned:,} now"
            )
        ]
        if self.asked is not None:
            lines.append(f"{self.asked:,} were asked for: the widths that layers may have come no nearer")
        if self.model_weights:
            lines.append(
                f"{self.weights_pruned:,} of all {self.model_weights:,} weights of the model are masked "
                f"({self.model_sparsity:.2%})"
            )
        if self.dense is not None and self.left is not None:
            lines.append(
                f"shrink leaves {_of(self.left.parameters, self.dense.parameters)} parameters, "
                f"{_of(self.left.flops, self.dense.flops)} FLOPs"
            )
        lines.extend(map(str, self.spent))
        if self.threshold is not None:
            lines.append(f"threshold score {self.threshold:.4g}")
        if self.loss is not None:
            lines.append(f"loss {self.loss:.4g} over {self.samples:,} samples (counted {self.counted}) before pruning")
        if self.predicted_loss_change is not None:
            lines.append(
                f"predicted change of the loss {self.predicted_loss_change:+.4g} (first order, on the data that "
                "chose the weights, so optimistic; fp.predict gives an error bar)"
            )
        if self.predicted_gradient_norm_change is not None:
            lines.append(f"predicted change of ‖g‖² {self.predicted_gradient_norm_change:+.4g} (first order)")
        return "\n".join(lines)

    def table(self) -> str:
        """A text table with one line per layer and one for the total."""
        return str(self._cells())

    def _cells(self) -> Table:
        header = ("parameter", "shape", "units", "pruned", "sparsity", "weights", "zeros")
        weights = sum(layer.weights for layer in self.layers)
        total = Layer("total", (), self.units, self.pruned, self.newly_pruned, weights, self.weights_pruned)
        return Table(header, [_cells_of(layer) for layer in (*self.layers, total)], names=2)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for ``json``."""
        totals = {
            "units": self.units,
            "pruned": self.pruned,
            "newly_pruned": self.newly_pruned,
            "sparsity": self.sparsity,
            "weights_pruned": self.weights_pruned,
            "model_sparsity": self.model_sparsity,
        }
        layers = [{**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        return {**asdict(self), **totals, "layers": layers, "spent": [asdict(one) for one in self.spent]}

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with one row per layer.

        Raises:
            ImportError: without pandas.
        """
        import pandas as pd

        return pd.DataFrame([{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers])

    def log(self, writer: Any, step: int | None = None) -> None:
        """Write the total sparsity, the sparsity of each layer, and the size of the model to a logger.

        Args:
            writer: an object with ``add_scalar(tag, value, step)``, like TensorBoard's ``SummaryWriter``, or with
                ``log({tag: value}, step=step)``, like a wandb run.
            step: the training step; the logger's own if left out.

        Raises:
            TypeError: for a writer with neither method.
        """
        if callable(getattr(writer, "add_scalar", None)):
            for tag, value in self._scalars().items():
                writer.add_scalar(tag, value, step)
        elif callable(getattr(writer, "log", None)):
            writer.log(self._scalars(), step=step)
        else:
            raise TypeError(
                "writer should have add_scalar(tag, value, step), as a SummaryWriter of TensorBoard has, or "
                f"log(values, step=step), as a run of wandb has; got {type(writer).__name__}"
            )

    def _scalars(self) -> dict[str, float]:
        values = {"sparsity": self.sparsity, "model_sparsity": self.model_sparsity}
        values |= {f"sparsity/{layer.name}": layer.sparsity for layer in self.layers}
        left = {} if self.left is None else {"parameters": self.left.parameters, "flops": self.left.flops}
        return {f"pruning/{tag}": float(value) for tag, value in {**values, **left}.items()}

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a bar chart of every layer's sparsity to ``path`` (PNG, SVG or PDF, by its suffix).

        Raises:
            ImportError: without matplotlib, an extra.
        """
        figure = blank_figure(7, 1.2 + 0.22 * len(self.layers))
        axes = figure.subplots()
        names = [layer.name for layer in self.layers]
        axes.barh(names, [layer.sparsity for layer in self.layers], color="#4477aa")
        axes.axvline(self.sparsity, color="#ee6677", linewidth=1, label=f"in total {self.sparsity:.1%}")
        axes.set(xlim=(0, 1), xlabel="sparsity", title=f"{self.method}, {self.granularity}")
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(path, dpi=150)


def _of(left: int, dense: int) -> str:
    return f"{left:,} of {dense:,} ({left / dense if dense else 1:.2%})"


def _cells_of(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        f"{layer.units:,}",
        f"{layer.pruned:,}",
        f"{layer.sparsity:.2%}",
        f"{layer.weights:,}",
        f"{layer.weights_pruned:,}",
    )


def blank_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches, without a display.

    Raises:
        ImportError: without matplotlib, an extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib (or torch-flowprune[plot])") from error
    return Figure(figsize=(width, height), layout="constrained")
