"""
What a channel of a residual network is coupled to
==================================================

A channel of one convolution is often tied to channels of others: everything that is added to the same residual stream
keeps or loses the same ones. :func:`torch_flowprune.couple` reads this off the operators of the model.
"""

import matplotlib.pyplot as plt
import timm
import torch
import torch_flowprune as fp

model = timm.create_model("test_resnet", num_classes=10).eval()
coupling = fp.couple(model, torch.randn(2, 3, 64, 64))

# %%
# Each column is a group of channels that are removed together; its mark says which part a parameter has in it.

marks = {
    "producer": ("s", "makes the channel"),
    "affine": ("o", "scales and shifts it"),
    "consumer": (">", "reads it"),
}
names = [name for name, _ in model.named_parameters()]
figure, axes = plt.subplots(figsize=(8, 9), layout="constrained")
for role, (marker, meaning) in marks.items():
    places = [
        (column, names.index(part.parameter))
        for column, group in enumerate(coupling.groups)
        for part in group.slices
        if part.role == role
    ]
    axes.scatter(*zip(*places, strict=True), marker=marker, s=28, label=meaning)
axes.set_yticks(range(len(names)), names, fontsize=6)
axes.set_xticks(
    range(len(coupling.groups)), [f"{group.name}, {group.size}" for group in coupling.groups], rotation=60,
    ha="right", fontsize=7,
)  # fmt: skip
axes.invert_yaxis()
axes.grid(alpha=0.2)
axes.legend(frameon=False, loc="lower left")

# %%
# As text, one group in full, and what is not removable with the reason:

print(f"{coupling.share():.0%} of the output channels can be removed\n")
for part in coupling.groups[2].slices:
    print(f"{part.role:9} {part.parameter} axis {part.axis}")
for held in coupling.frozen:
    print(f"stays: {held.parameter} axis {held.axis}: {held.reason}")
