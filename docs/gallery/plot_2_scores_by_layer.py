"""
Scores by layer
===============

Scores of one measure may lie orders of magnitude apart between layers. A global ranking then takes whole layers first.
Look before you prune.
"""

import matplotlib.pyplot as plt
import torch
import torch_flowprune as fp
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = (
    torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8),
    torch.tensor(labels),
)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(),
    nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
    nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(32, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), 5e-3)
for index in torch.randint(1200, (150, 128)):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0][index]), data[1][index]).backward()
    optimizer.step()

# %%
# All three measures share one pass over the data. The dashed line is the threshold of a global prune by half: what is
# below it would be pruned.

measures = ["magnitude", "loss_preservation", "gradient_norm_preservation"]
scores = fp.scores(model, measures, (data[0][:512], data[1][:512]))

figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axes, measure in zip(panels, measures, strict=True):
    of_layers = {
        name: values.flatten().clamp(min=1e-12)
        for name, values in scores[measure].items()
    }
    axes.boxplot(list(of_layers.values()), whis=(1, 99), showfliers=False)
    axes.axhline(
        torch.cat(list(of_layers.values())).median(),
        linestyle="--",
        color="grey",
        linewidth=1,
    )
    axes.set(yscale="log", title=measure)
    axes.set_xticks(range(1, len(of_layers) + 1), list(of_layers), rotation=20)

# %%
# The same as text, with medians:

print(scores["loss_preservation"])
