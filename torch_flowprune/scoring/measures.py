"""What removing a unit costs: one formula each.

A measure is a plain function. Its parameter names say what it reads, so the engine knows what to compute:

=============  =====================================================================  ==================
name           value                                                                  sweeps over the data
=============  =====================================================================  ==================
``theta``      the parameters as the forward uses them                                0
``theta0``     the parameters at a reference point (initialisation)                   0
``generator``  the source of randomness                                               0
``gR``         gradient of the data-free synaptic-flow objective R                    0 (one backward pass)
``x2``         mean over samples and positions of the squared input it meets          1 (forwards alone)
``g``          gradient of the loss, sample-weighted mean over the batches            1
``g2``         mean over batches of the *squared batch gradients*                     1
``g2_sample``  mean over samples of the *squared sample gradients*                    1
``Hg``         Hessian of the loss times its gradient                                 2 (1 if one batch)
``diagH``      diagonal of the Hessian, estimated by probes                           1 (a product a probe)
=============  =====================================================================  ==================

Every tensor argument holds **rows**: a unit's elements along the last axis, shape ``(..., unit, element)``. The result
holds one score per unit, shape ``(..., unit)``; the lowest scores are pruned and nothing takes their absolute value
later. A single weight is a unit of one element. Any function of this shape, yours included, can be passed wherever a
measure's name can; yours may ask for ``name`` and ``shape`` too, the parameter's.

Several measures differ only in where they take the absolute value, inside or outside the sum: read the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = Tensor
UnitScores: TypeAlias = Tensor
Measure: TypeAlias = Callable[..., Tensor]


def magnitude(theta: Rows) -> UnitScores:
    """‖θ‖₂, the zeroth-order measure; the other measures read how its square changes.

    Source: Lubana & Dick 2021 (``mag_based``); Han et al. 2015 on weights.

    >>> magnitude(torch.tensor([[3.0, -4.0]]))
    tensor([5.])
    """
    norm: UnitScores = torch.linalg.vector_norm(theta, dim=-1)
    return norm


def l1(theta: Rows) -> UnitScores:
    """Σ|θ|. Source: Li et al., ICLR 2017 (``l1``).

    >>> l1(torch.tensor([[3.0, -4.0]]))
    tensor([7.])
    """
    return theta.abs().sum(-1)


def loss_preservation(theta: Rows, g: Rows) -> UnitScores:
    """Σ|θ g|, the first-order measure: |dθ²/dt| = 2|θ g| under gradient flow, summed over the unit.

    On single weights this is SNIP. Source: Lubana & Dick 2021 (``loss_based``); Lee et al., ICLR 2019.

    >>> loss_preservation(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    tensor([5.])
    """
    return (theta * g).abs().sum(-1)


def taylor(theta: Rows, g: Rows) -> UnitScores:
    """|Σ θ g|: the size of the first-order change of the loss when the whole unit is removed.

    Source: Molchanov et al., ICLR 2017 (``tfo``).

    >>> taylor(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    tensor([1.])
    """
    return (theta * g).sum(-1).abs()


def biased_loss_preservation(theta: Rows, g: Rows) -> UnitScores:
    """Σ|θ|·|θ g|: loss preservation biased towards removing small weights.

    Source: Lubana & Dick 2021 (``biased_loss``).

    >>> biased_loss_preservation(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    tensor([7.])
    """
    return (theta.square() * g).abs().sum(-1)


def distance_biased_loss_preservation(theta: Rows, theta0: Rows, g: Rows) -> UnitScores:
    """Σ|θ−θ₀|·|θ g|: loss preservation biased towards removing weights that training has moved little.

    Source: the code of Lubana & Dick 2021 (``biased_loss`` with ``use_init``).

    >>> theta, theta0, g = torch.tensor([[[1.0, 2.0]], [[1.0, 1.0]], [[3.0, -1.0]]])
    >>> distance_biased_loss_preservation(theta, theta0, g)
    tensor([2.])
    """
    return ((theta - theta0) * theta * g).abs().sum(-1)


def gradient_norm_increase(theta: Rows, Hg: Rows) -> UnitScores:
    """Σ θ·Hg, signed: half the first-order *decrease* of ‖g‖² when the unit is removed; the lowest raise ‖g‖² most.

    With logits divided by T = 200 this is GraSP. Source: Lubana & Dick 2021 (``grasp``); Wang et al., ICLR 2020.

    >>> gradient_norm_increase(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]]))
    tensor([-1.])
    """
    return (theta * Hg).sum(-1)


def gradient_norm_preservation(theta: Rows, Hg: Rows) -> UnitScores:
    """|Σ θ·Hg|, the second-order measure: the units with the lowest scores change ‖g‖² least.

    Source: Lubana & Dick 2021 (``grad_preserve``).

    >>> gradient_norm_preservation(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]]))
    tensor([1.])
    """
    return (theta * Hg).sum(-1).abs()


def fisher(theta: Rows, g2: Rows) -> UnitScores:
    """Σ θ²·E[g²], with the *batchwise* mean of squared batch gradients, as the paper's code has it.

    The estimate depends on the batch size; :func:`fisher_sample` does not. Source: Theis et al. 2018 (``fisher``).

    >>> fisher(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
    tensor([7.])
    """
    return (theta.square() * g2).sum(-1)


def fisher_sample(theta: Rows, g2_sample: Rows) -> UnitScores:
    """Σ θ²·E[g²] with the mean over single samples: the diagonal of the empirical Fisher matrix.

    Source: Theis et al. 2018; Kunstner et al. 2019 on what "empirical" means.

    >>> fisher_sample(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
    tensor([7.])
    """
    return (theta.square() * g2_sample).sum(-1)


def random(theta: Rows, generator: torch.Generator) -> UnitScores:
    """Uniform in [0, 1), drawn on the CPU, so that one seed gives one mask on every device.

    >>> random(torch.zeros(3, 2), torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    return torch.rand(theta.shape[:-1], generator=generator, device="cpu").to(theta.device)


def synflow(theta: Rows, gR: Rows) -> UnitScores:
    """Σ|θ ∂R/∂θ| for R, the summed output of the network with absolute values of all parameters, on an input of ones.

    It needs no data and no labels. Dead filters with ReLU in front of batch norm score highest: their running variance
    is 0, so R is multiplied by 1/√ε. Source: Tanaka et al., NeurIPS 2020.

    >>> synflow(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
    tensor([5.])
    """
    return (theta * gR).abs().sum(-1)


def wanda(theta: Rows, x2: Rows) -> UnitScores:
    """Σ|θ|·√E[x²]: each weight times the size of its input. It needs no labels and no backward pass.

    With ``allocation="row"`` this is the published method. Source: Sun et al., ICLR 2024.

    >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([[9.0, 4.0]]))
    tensor([7.])
    """
    return (theta.abs() * x2.sqrt()).sum(-1)


def reconstruction(theta: Rows, x2: Rows) -> UnitScores:
    """Σ θ²·E[x²]: the diagonal part of the mean squared error in the layer's output when the unit is removed.

    It ignores correlations between the inputs of a unit's weights. Source: Dong et al., NeurIPS 2017.

    >>> reconstruction(torch.tensor([[1.0, -2.0]]), torch.tensor([[9.0, 4.0]]))
    tensor([25.])
    """
    return (theta.square() * x2).sum(-1)


def obd(theta: Rows, diagH: Rows) -> UnitScores:
    """½ Σ θ²·diag H: optimal brain damage, the second-order change of the loss at a minimum, signed.

    The diagonal is estimated by random probes (``probes=``); the flow holds its error. Source: LeCun et al., NeurIPS
    1989; the probes, Bekas et al. 2007.

    >>> obd(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -1.0]]))
    tensor([0.])
    """
    return (theta.square() * diagH).sum(-1) / 2


MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        magnitude,
        l1,
        loss_preservation,
        taylor,
        biased_loss_preservation,
        distance_biased_loss_preservation,
        gradient_norm_increase,
        gradient_norm_preservation,
        fisher,
        fisher_sample,
        wanda,
        reconstruction,
        obd,
        random,
        synflow,
    )
}
ALIASES = {"l2": "magnitude", "snip": "loss_preservation", "tfo": "taylor", "grasp": "gradient_norm_increase"}
