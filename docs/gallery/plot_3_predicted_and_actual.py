"""
Predicted and actual change of the loss
=======================================

:func:`torch_flowprune.predict` says what a set of masks would do to the loss, to second order, with an error bar, from
one pass over the data and without pruning anything. Where does it hold?
"""

from copy import deepcopy

import matplotlib.pyplot as plt
import torch
import torch_flowprune as fp
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = (torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
model = nn.Sequential(
    nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for index in torch.randint(1200, (200, 128)):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0][index]), data[1][index]).backward()
    optimizer.step()

# %%
# Each measure prunes a copy, more and more; the prediction and the loss are of the same data.


def loss_of(net):
    with torch.no_grad():
        return nn.functional.cross_entropy(net(data[0]), data[1]).item()


sparsities = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for axes, measure in zip(
    panels, ("magnitude", "loss_preservation", "obd"), strict=True
):
    scores = fp.scores(
        model, measure, data, exclude="0"
    )  # which sees pixels that are never lit
    predicted, errors, actual = [], [], []
    for sparsity in sparsities:
        pruned = deepcopy(model)
        fp.global_prune(pruned, scores=scores, sparsity=sparsity, exclude="0")
        prediction = fp.predict(model, fp.masks(pruned), data)
        predicted.append(prediction.loss_change)
        errors.append(prediction.error)
        actual.append(loss_of(pruned) - loss_of(model))
    axes.plot(sparsities, actual, color="black", marker="o", label="actual")
    axes.errorbar(
        sparsities, predicted, yerr=errors, marker="s", capsize=3, label="predicted"
    )
    axes.set(xlabel="sparsity", title=measure)
panels[0].set_ylabel("change of the loss")
panels[0].legend(frameon=False)

# %%
# The expansion is about the trained weights: it holds while little is taken away, and falls short of the truth beyond.
# Where the error bar is as wide as the prediction, prune in rounds.
