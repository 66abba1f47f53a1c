"""The measures as ``torch.nn.utils.prune`` methods of slices along ``dim``, in torch's naming."""

from __future__ import annotations

from torch_flowprune.pruning.methods.base_method import Structured, structured
from torch_flowprune.scoring import measures


class MagnitudeStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.magnitude` goes, of slices along ``dim``."""

    measure = measures.magnitude


class L1Structured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.l1` goes, of slices along ``dim``."""

    measure = measures.l1


class LossPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.loss_preservation` goes, of slices along ``dim``."""

    measure = measures.loss_preservation


class TaylorStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.taylor` goes, of slices along ``dim``."""

    measure = measures.taylor


class BiasedLossPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.biased_loss_preservation` goes, of slices along ``dim``."""

    measure = measures.biased_loss_preservation


class DistanceBiasedLossPreservationStructured(Structured):
    """The lowest :func:`~.measures.distance_biased_loss_preservation` goes, of slices along ``dim``."""

    measure = measures.distance_biased_loss_preservation


class GradientNormIncreaseStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_increase` goes, of slices along ``dim``."""

    measure = measures.gradient_norm_increase


class GradientNormPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_preservation` goes, of slices along ``dim``."""

    measure = measures.gradient_norm_preservation


class FisherStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher` goes, of slices along ``dim``."""

    measure = measures.fisher


class FisherSampleStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher_sample` goes, of slices along ``dim``."""

    measure = measures.fisher_sample


class WandaStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.wanda` goes, of slices along ``dim``."""

    measure = measures.wanda


class ReconstructionStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.reconstruction` goes, of slices along ``dim``."""

    measure = measures.reconstruction


class ObdStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.obd` goes, of slices along ``dim``."""

    measure = measures.obd


class RandomStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.random` goes, of slices along ``dim``."""

    measure = measures.random


class SynflowStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.synflow` goes, of slices along ``dim``."""

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
