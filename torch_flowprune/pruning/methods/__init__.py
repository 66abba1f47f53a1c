"""The measures as ``torch.nn.utils.prune`` methods: drop-in classes and functions, in torch's naming.

Every measure has a class and a function for single weights (``LossPreservationUnstructured``,
``loss_preservation_unstructured``) and one of each for slices (``LossPreservationStructured``,
``loss_preservation_structured``). They take torch's arguments and keep torch's ``weight_orig``, ``weight_mask`` and
hook. The contract they share:

- ``amount`` is torch's: a float is a fraction of what is left, an int a number of units.
- ``importance_scores`` are used as given: signed, the lowest are pruned; nan is refused. Unstructured methods take one
  score per weight. Structured methods take one score per slice, or one per weight, which are summed over the slice.
  (``prune.global_unstructured`` passes scores and weights in the same way, so measures that read only ``theta`` treat
  what they get there as weights.)
- Without scores, ``theta`` is the masked weight and ``g`` the parameter's ``.grad``. A measure that reads more (``Hg``,
  ``g2``, ``gR``, ``theta0``) raises an error that shows how to compute scores.
- Every owner of a tied parameter inside the module gets the mask. Owners outside of the module are not known here and
  keep the weight dense: prune the model that holds all of them, with ``global_prune``.
- Everything is checked before the module is touched.
"""

from __future__ import annotations

from torch_flowprune.pruning.methods import structured_methods as _structured
from torch_flowprune.pruning.methods import unstructured_methods as _unstructured
from torch_flowprune.pruning.methods.structured_methods import *  # noqa: F403
from torch_flowprune.pruning.methods.unstructured_methods import *  # noqa: F403

__all__: list[str] = []
__all__ += _structured.__all__
__all__ += _unstructured.__all__
