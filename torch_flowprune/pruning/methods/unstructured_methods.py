"""The measures as ``torch.nn.utils.prune`` methods of single weights, in torch's naming."""

from __future__ import annotations

from torch_flowprune.pruning.methods.base_method import Unstructured
from torch_flowprune.pruning.methods.functional_forms import unstructured
from torch_flowprune.scoring import measures


class MagnitudeUnstructured(Unstructured):
    """Prune the weights with the lowest ``magnitude``."""

    measure = measures.magnitude


class L1Unstructured(Unstructured):
    """Prune the weights with the lowest ``l1``."""

    measure = measures.l1


class LossPreservationUnstructured(Unstructured):
    """Prune the weights with the lowest ``loss_preservation``."""

    measure = measures.loss_preservation


class TaylorUnstructured(Unstructured):
    """Prune the weights with the lowest ``taylor``."""

    measure = measures.taylor


class BiasedLossPreservationUnstructured(Unstructured):
    """Prune the weights with the lowest ``biased_loss_preservation``."""

    measure = measures.biased_loss_preservation


class DistanceBiasedLossPreservationUnstructured(Unstructured):
    """Prune the weights with the lowest ``distance_biased_loss_preservation``."""

    measure = measures.distance_biased_loss_preservation


class GradientNormIncreaseUnstructured(Unstructured):
    """Prune the weights with the lowest ``gradient_norm_increase``."""

    measure = measures.gradient_norm_increase


class GradientNormPreservationUnstructured(Unstructured):
    """Prune the weights with the lowest ``gradient_norm_preservation``."""

    measure = measures.gradient_norm_preservation


class FisherUnstructured(Unstructured):
    """Prune the weights with the lowest ``fisher``."""

    measure = measures.fisher


class FisherSampleUnstructured(Unstructured):
    """Prune the weights with the lowest ``fisher_sample``."""

    measure = measures.fisher_sample


class WandaUnstructured(Unstructured):
    """Prune the weights with the lowest ``wanda``."""

    measure = measures.wanda


class ReconstructionUnstructured(Unstructured):
    """Prune the weights with the lowest ``reconstruction``."""

    measure = measures.reconstruction


class ObdUnstructured(Unstructured):
    """Prune the weights with the lowest ``obd``."""

    measure = measures.obd


class RandomUnstructured(Unstructured):
    """Prune the weights with the lowest ``random``."""

    measure = measures.random


class SynflowUnstructured(Unstructured):
    """Prune the weights with the lowest ``synflow``."""

    measure = measures.synflow


magnitude_unstructured = unstructured(MagnitudeUnstructured)
l1_unstructured = unstructured(L1Unstructured)
loss_preservation_unstructured = unstructured(LossPreservationUnstructured)
taylor_unstructured = unstructured(TaylorUnstructured)
biased_loss_preservation_unstructured = unstructured(BiasedLossPreservationUnstructured)
distance_biased_loss_preservation_unstructured = unstructured(DistanceBiasedLossPreservationUnstructured)
gradient_norm_increase_unstructured = unstructured(GradientNormIncreaseUnstructured)
gradient_norm_preservation_unstructured = unstructured(GradientNormPreservationUnstructured)
fisher_unstructured = unstructured(FisherUnstructured)
fisher_sample_unstructured = unstructured(FisherSampleUnstructured)
wanda_unstructured = unstructured(WandaUnstructured)
reconstruction_unstructured = unstructured(ReconstructionUnstructured)
obd_unstructured = unstructured(ObdUnstructured)
random_unstructured = unstructured(RandomUnstructured)
synflow_unstructured = unstructured(SynflowUnstructured)

__all__ = [
    "BiasedLossPreservationUnstructured",
    "DistanceBiasedLossPreservationUnstructured",
    "FisherSampleUnstructured",
    "FisherUnstructured",
    "GradientNormIncreaseUnstructured",
    "GradientNormPreservationUnstructured",
    "L1Unstructured",
    "LossPreservationUnstructured",
    "MagnitudeUnstructured",
    "ObdUnstructured",
    "RandomUnstructured",
    "ReconstructionUnstructured",
    "SynflowUnstructured",
    "TaylorUnstructured",
    "WandaUnstructured",
    "biased_loss_preservation_unstructured",
    "distance_biased_loss_preservation_unstructured",
    "fisher_sample_unstructured",
    "fisher_unstructured",
    "gradient_norm_increase_unstructured",
    "gradient_norm_preservation_unstructured",
    "l1_unstructured",
    "loss_preservation_unstructured",
    "magnitude_unstructured",
    "obd_unstructured",
    "random_unstructured",
    "reconstruction_unstructured",
    "synflow_unstructured",
    "taylor_unstructured",
    "wanda_unstructured",
]
