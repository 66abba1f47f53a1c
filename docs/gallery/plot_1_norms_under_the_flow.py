"""
Norms under gradient flow
=========================

Under gradient flow, :math:`d\\theta/dt = -g`, the norm of a layer's weights moves by

.. math:: \\frac{d\\|\\theta\\|^2}{dt} = -2\\,\\theta^\\top g, \\qquad
          \\frac{d^2\\|\\theta\\|^2}{dt^2} = 2\\,\\|g\\|^2 + 2\\,\\theta^\\top H g.

The three families of measures read these three quantities: ``magnitude`` the norm itself, ``loss_preservation`` the
terms :math:`\\theta g` of its first derivative, ``gradient_norm_preservation`` the terms :math:`\\theta\\,Hg` of its
second. One call of :func:`torch_flowprune.flow` gives all of them. Here we train by small steps of full-batch gradient
descent, and lay the two expansions at the start over the path that the norm takes.
"""

import matplotlib.pyplot as plt
import torch
import torch_flowprune as fp
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = (torch.tensor(images / 16)[:600], torch.tensor(labels)[:600])
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()

# %%
# Scores and expansions come from one flow: θ, g and the exact Hessian-vector product H·g.

start = fp.flow(model, data)
layers = ["0.weight", "2.weight"]
theta = {name: model.get_parameter(name).detach().clone() for name in layers}
first = {name: -2 * (theta[name] * start.g[name]).sum() for name in layers}
second = {
    name: 2 * (start.g[name].square() + theta[name] * start.Hg[name]).sum()
    for name in layers
}

# %%
# Then the model follows the flow, in steps of 0.02 up to time 6.

step, end = 0.02, 6.0
times = torch.arange(0, end + step / 2, step)
norms = {name: [] for name in layers}
for _ in times:
    for name in layers:
        norms[name].append(model.get_parameter(name).detach().square().sum().item())
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(model(data[0]), data[1]),
        list(model.parameters()),
    )
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(step * gradient)

figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axes, name in zip(panels, layers, strict=True):
    norm = theta[name].square().sum()
    axes.plot(times, norms[name], color="black", label="trained")
    axes.plot(times, norm + first[name] * times, "--", label="first order: θ g")
    axes.plot(
        times,
        norm + first[name] * times + second[name] * times**2 / 2,
        ":",
        label="second order: θ g, ‖g‖², θ Hg",
    )
    axes.set(
        xlabel="time",
        ylabel="squared norm",
        title=name,
        ylim=(min(norms[name]) - 0.3, max(norms[name]) + 0.3),
    )
axes.legend(frameon=False)

# %%
# The second-order curve follows the path further than the straight line. Both hold for a short time only: that is why
# scores are taken anew after training went on, as a :class:`torch_flowprune.Pruner` does in rounds.
