"""The measures as ``torch.nn.utils.prune`` methods: drop-in classes and functions, in torch's naming.

Every measure has a class and a function for single weights (``LossPreservationUnstructured``,
``loss_preservation_unstructured``) and one of each for slices (``LossPreservationStructured``,
``loss_preservation_structured``). They take torch's arguments and keep torch's ``weight_orig``, ``weight_mask`` and
hook. The contract they share:

- ``amount`` is torch's: a float is a fraction of what is left, an int a number of units.
- ``importance_scores`` are used as given: signed, the lowest go; nan is refused. Unstructured methods take one score a
  weight; structured ones one score a slice, or one a weight, which are then summed over the slice. (Given through
  ``prune.global_unstructured``, measures of ``theta`` alone take them for weights: torch does not say which they are.)
- Without scores a measure of ``theta`` reads the masked weight, and one of ``g`` the parameter's ``.grad``; one that
  needs more (``Hg``, ``g2``, ``gR``, ``theta0``) raises an error that shows the call which computes scores.
- Every owner of a tied parameter inside the module gets the mask; owners outside of it are not known here, and keep
  the weight dense: prune the model that holds them all, by ``global_prune``.
- Everything is checked before the module is touched.
"""

from __future__ import annotations

from torch_flowprune.pruning.base_method import Structured, Unstructured, structured, unstructured
from torch_flowprune.scoring import measures


class MagnitudeUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.magnitude` goes, of single weights."""

    measure = measures.magnitude


class MagnitudeStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.magnitude` goes, of slices along ``dim``."""

    measure = measures.magnitude


class L1Unstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.l1` goes, of single weights."""

    measure = measures.l1


class L1Structured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.l1` goes, of slices along ``dim``."""

    measure = measures.l1


class LossPreservationUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.loss_preservation` goes, of single weights."""

    measure = measures.loss_preservation


class LossPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.loss_preservation` goes, of slices along ``dim``."""

    measure = measures.loss_preservation


class TaylorUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.taylor` goes, of single weights."""

    measure = measures.taylor


class TaylorStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.taylor` goes, of slices along ``dim``."""

    measure = measures.taylor


class BiasedLossPreservationUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.biased_loss_preservation` goes, of single weights."""

    measure = measures.biased_loss_preservation


class BiasedLossPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.biased_loss_preservation` goes, of slices along ``dim``."""

    measure = measures.biased_loss_preservation


class DistanceBiasedLossPreservationUnstructured(Unstructured):
    """The lowest :func:`~.measures.distance_biased_loss_preservation` goes, of single weights."""

    measure = measures.distance_biased_loss_preservation


class DistanceBiasedLossPreservationStructured(Structured):
    """The lowest :func:`~.measures.distance_biased_loss_preservation` goes, of slices along ``dim``."""

    measure = measures.distance_biased_loss_preservation


class GradientNormIncreaseUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_increase` goes, of single weights."""

    measure = measures.gradient_norm_increase


class GradientNormIncreaseStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_increase` goes, of slices along ``dim``."""

    measure = measures.gradient_norm_increase


class GradientNormPreservationUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_preservation` goes, of single weights."""

    measure = measures.gradient_norm_preservation


class GradientNormPreservationStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.gradient_norm_preservation` goes, of slices along ``dim``."""

    measure = measures.gradient_norm_preservation


class FisherUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher` goes, of single weights."""

    measure = measures.fisher


class FisherStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher` goes, of slices along ``dim``."""

    measure = measures.fisher


class FisherSampleUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher_sample` goes, of single weights."""

    measure = measures.fisher_sample


class FisherSampleStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.fisher_sample` goes, of slices along ``dim``."""

    measure = measures.fisher_sample


class WandaUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.wanda` goes, of single weights."""

    measure = measures.wanda


class WandaStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.wanda` goes, of slices along ``dim``."""

    measure = measures.wanda


class ReconstructionUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.reconstruction` goes, of single weights."""

    measure = measures.reconstruction


class ReconstructionStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.reconstruction` goes, of slices along ``dim``."""

    measure = measures.reconstruction


class ObdUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.obd` goes, of single weights."""

    measure = measures.obd


class ObdStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.obd` goes, of slices along ``dim``."""

    measure = measures.obd


class RandomUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.random` goes, of single weights."""

    measure = measures.random


class RandomStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.random` goes, of slices along ``dim``."""

    measure = measures.random


class SynflowUnstructured(Unstructured):
    """The lowest :func:`~torch_flowprune.scoring.measures.synflow` goes, of single weights."""

    measure = measures.synflow


class SynflowStructured(Structured):
    """The lowest :func:`~torch_flowprune.scoring.measures.synflow` goes, of slices along ``dim``."""

    measure = measures.synflow


magnitude_unstructured = unstructured(MagnitudeUnstructured)
magnitude_structured = structured(MagnitudeStructured)
l1_unstructured = unstructured(L1Unstructured)
l1_structured = structured(L1Structured)
loss_preservation_unstructured = unstructured(LossPreservationUnstructured)
loss_preservation_structured = structured(LossPreservationStructured)
taylor_unstructured = unstructured(TaylorUnstructured)
taylor_structured = structured(TaylorStructured)
biased_loss_preservation_unstructured = unstructured(BiasedLossPreservationUnstructured)
biased_loss_preservation_structured = structured(BiasedLossPreservationStructured)
distance_biased_loss_preservation_unstructured = unstructured(DistanceBiasedLossPreservationUnstructured)
distance_biased_loss_preservation_structured = structured(DistanceBiasedLossPreservationStructured)
gradient_norm_increase_unstructured = unstructured(GradientNormIncreaseUnstructured)
gradient_norm_increase_structured = structured(GradientNormIncreaseStructured)
gradient_norm_preservation_unstructured = unstructured(GradientNormPreservationUnstructured)
gradient_norm_preservation_structured = structured(GradientNormPreservationStructured)
fisher_unstructured = unstructured(FisherUnstructured)
fisher_structured = structured(FisherStructured)
fisher_sample_unstructured = unstructured(FisherSampleUnstructured)
fisher_sample_structured = structured(FisherSampleStructured)
wanda_unstructured = unstructured(WandaUnstructured)
wanda_structured = structured(WandaStructured)
reconstruction_unstructured = unstructured(ReconstructionUnstructured)
reconstruction_structured = structured(ReconstructionStructured)
obd_unstructured = unstructured(ObdUnstructured)
obd_structured = structured(ObdStructured)
random_unstructured = unstructured(RandomUnstructured)
random_structured = structured(RandomStructured)
synflow_unstructured = unstructured(SynflowUnstructured)
synflow_structured = structured(SynflowStructured)

__all__ = [
    "BiasedLossPreservationStructured",
    "BiasedLossPreservationUnstructured",
    "DistanceBiasedLossPreservationStructured",
    "DistanceBiasedLossPreservationUnstructured",
    "FisherSampleStructured",
    "FisherSampleUnstructured",
    "FisherStructured",
    "FisherUnstructured",
    "GradientNormIncreaseStructured",
    "GradientNormIncreaseUnstructured",
    "GradientNormPreservationStructured",
    "GradientNormPreservationUnstructured",
    "L1Structured",
    "L1Unstructured",
    "LossPreservationStructured",
    "LossPreservationUnstructured",
    "MagnitudeStructured",
    "MagnitudeUnstructured",
    "ObdStructured",
    "ObdUnstructured",
    "RandomStructured",
    "RandomUnstructured",
    "ReconstructionStructured",
    "ReconstructionUnstructured",
    "SynflowStructured",
    "SynflowUnstructured",
    "TaylorStructured",
    "TaylorUnstructured",
    "WandaStructured",
    "WandaUnstructured",
    "biased_loss_preservation_structured",
    "biased_loss_preservation_unstructured",
    "distance_biased_loss_preservation_structured",
    "distance_biased_loss_preservation_unstructured",
    "fisher_sample_structured",
    "fisher_sample_unstructured",
    "fisher_structured",
    "fisher_unstructured",
    "gradient_norm_increase_structured",
    "gradient_norm_increase_unstructured",
    "gradient_norm_preservation_structured",
    "gradient_norm_preservation_unstructured",
    "l1_structured",
    "l1_unstructured",
    "loss_preservation_structured",
    "loss_preservation_unstructured",
    "magnitude_structured",
    "magnitude_unstructured",
    "obd_structured",
    "obd_unstructured",
    "random_structured",
    "random_unstructured",
    "reconstruction_structured",
    "reconstruction_unstructured",
    "synflow_structured",
    "synflow_unstructured",
    "taylor_structured",
    "taylor_unstructured",
    "wanda_structured",
    "wanda_unstructured",
]
