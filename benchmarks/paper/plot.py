"""One run as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot(found: dict[str, Any], path: Path) -> None:
    """Loss, accuracy, the norms and what is left over the epochs; the sparsity of every layer."""
    history, rounds, config = found["history"], found["rounds"], found["config"]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    epochs = [entry["epoch"] for entry in history]

    def draw(place: Any, *keys: str, **style: Any) -> None:
        for key in keys:
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
            place.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        for one in rounds:
            place.axvline(one["epoch"], color="grey", linewidth=0.4)
        place.set(xlabel="epoch", xlim=(0, max(epochs)))
        place.legend(frameon=False, fontsize=8)

    draw(axes[0], "train_loss", "loss", "validation_loss")
    draw(axes[1], "train_accuracy", "validation_accuracy")
    axes[1].axhline(found["test"]["accuracy"], color="black", linestyle=":", linewidth=0.8)
    axes[1].set_title(f"test, once: {found['test']['accuracy']:.2%}", fontsize=9)
    draw(axes[2], "gradient_norm")
    axes[2].set(yscale="log", ylabel="‖g‖²")
    draw(axes[3], "theta_norm")
    axes[3].set(ylabel="‖θ‖²")
    draw(axes[4], "parameters", "macs")
    axes[4].set(yscale="log")
    if rounds:
        shares = [layer["sparsity"] for layer in rounds[-1]["layers"]]
        axes[5].bar(range(len(shares)), shares, width=0.9)
        axes[5].axhline(rounds[-1]["sparsity"], color="#ee6677", linewidth=1)
    axes[5].set(xlabel="convolution", ylabel="filters gone", ylim=(0, 1))
    goal = f"{config['sparsity']:.0%} of filters in {config['rounds']} rounds" if rounds else "unpruned"
    figure.suptitle(
        f"{config['model']}, width {config['width']:g}, {found['data']['name']}: {config['method']}, {goal}, seed "
        f"{config['seed']}"
    )
    figure.savefig(path, dpi=130)
