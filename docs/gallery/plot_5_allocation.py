"""
How sparsity is distributed over layers
=======================================

Half of the channels of a network can be taken in many ways. ``normalize=``, ``allocation=`` and ``max_sparsity=`` say
which layers give up how much. Here a ResNet-18 with random weights; on a trained one, ask for the accuracy too (see
*Choosing where to prune*).
"""

import warnings
from copy import deepcopy

import matplotlib.pyplot as plt
import timm
import torch
import torch_flowprune as fp

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=10).eval()
x = torch.randn(2, 3, 64, 64)
coupling = fp.couple(model, x)

# %%
# The coupling is read once and used for every prune. The raw ranking would warn of the
# layers that it nearly empties: the picture shows them.

warnings.simplefilter("ignore", fp.LayerCollapseWarning)

ways = {
    "the default": {},
    "raw ranking": {"normalize": None},
    "raw, at most 80 %": {"normalize": None, "max_sparsity": 0.8},
    "equal fractions": {"allocation": "layer"},
}
figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
for label, options in ways.items():
    pruned = deepcopy(model)
    report = fp.global_prune(
        pruned,
        "magnitude",
        0.5,
        granularity="channel",
        coupling=coupling,
        example_inputs=x,
        **options,
    )
    kept = [1 - layer.sparsity for layer in report.layers]
    axes.plot(
        kept,
        marker="o",
        label=f"{label}: {report.left.flops / report.dense.flops:.0%} of the FLOPs are left",
    )
axes.set_xticks(
    range(len(report.layers)),
    [layer.name for layer in report.layers],
    rotation=60,
    ha="right",
    fontsize=7,
)
axes.set(ylabel="fraction of channels kept", ylim=(0, 1.05))
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
