"""The measures as ``torch.nn.utils.prune`` methods of slices along ``dim``, in torch's naming."""

from __future__ import annotations

from torch_flowprune.pruning.methods.base_method import Structured
from torch_flowprune.pruning.methods.functional_forms import structured
from torch_flowprune.scoring import measures


class MagnitudeStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``magnitude``."""

    measure = measures.magnitude


class L1Structured(Structured):
    """Prune the slices along ``dim`` with the lowest ``l1``."""

    measure = measures.l1


class LossPreservationStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``loss_preservation``."""

    measure = measures.loss_preservation


class TaylorStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``taylor``."""

    measure = measures.taylor


class BiasedLossPreservationStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``biased_loss_preservation``."""

    measure = measures.biased_loss_preservation


class DistanceBiasedLossPreservationStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``distance_biased_loss_preservation``."""

    measure = measures.distance_biased_loss_preservation


class GradientNormIncreaseStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``gradient_norm_increase``."""

    measure = measures.gradient_norm_increase


class GradientNormPreservationStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``gradient_norm_preservation``."""

    measure = measures.gradient_norm_preservation


class FisherStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``fisher``."""

    measure = measures.fisher


class FisherSampleStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``fisher_sample``."""

    measure = measures.fisher_sample


class WandaStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``wanda``."""

    measure = measures.wanda


class ReconstructionStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``reconstruction``."""

    measure = measures.reconstruction


class ObdStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``obd``."""

    measure = measures.obd


class RandomStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``random``."""

    measure = measures.random


class SynflowStructured(Structured):
    """Prune the slices along ``dim`` with the lowest ``synflow``."""

    measure = measures.synflow


magnitude_structured = structured(MagnitudeStructured)
l1_structured = structured(L1Structured)
loss_preservation_structured = structured(LossPreservationStructured)
taylor_structured = structured(TaylorStructured)
biased_loss_preservation_structured = structured(BiasedLossPreservationStructured)
distance_biased_loss_preservation_structured = structured(DistanceBiasedLossPreservationStructured)
gradient_norm_increase_structured = structured(GradientNormIncreaseStructured)
gradient_norm_preservation_structured = structured(GradientNormPreservationStructured)
fisher_structured = structured(FisherStructured)
fisher_sample_structured = structured(FisherSampleStructured)
wanda_structured = structured(WandaStructured)
reconstruction_structured = structured(ReconstructionStructured)
obd_structured = structured(ObdStructured)
random_structured = structured(RandomStructured)
synflow_structured = structured(SynflowStructured)

__all__ = [
    "BiasedLossPreservationStructured",
    "DistanceBiasedLossPreservationStructured",
    "FisherSampleStructured",
    "FisherStructured",
    "GradientNormIncreaseStructured",
    "GradientNormPreservationStructured",
    "L1Structured",
    "LossPreservationStructured",
    "MagnitudeStructured",
    "ObdStructured",
    "RandomStructured",
    "ReconstructionStructured",
    "SynflowStructured",
    "TaylorStructured",
    "WandaStructured",
    "biased_loss_preservation_structured",
    "distance_biased_loss_preservation_structured",
    "fisher_sample_structured",
    "fisher_structured",
    "gradient_norm_increase_structured",
    "gradient_norm_preservation_structured",
    "l1_structured",
    "loss_preservation_structured",
    "magnitude_structured",
    "obd_structured",
    "random_structured",
    "reconstruction_structured",
    "synflow_structured",
    "taylor_structured",
    "wanda_structured",
]
