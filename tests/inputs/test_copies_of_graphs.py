"""A copy of a model is in the mode that the model is in."""

from __future__ import annotations

import pytest
import torch

from torch_flowprune.inputs import copied_model


def test_a_graph_with_another_one_for_training_stays_in_eval_mode() -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = extraction.create_feature_extractor(models.squeezenet1_1(), {"features.5": "out"}).eval()
    copied, x = copied_model(model), torch.randn(1, 3, 64, 64)
    assert not any(module.training for module in copied.modules())
    assert torch.equal(copied(x)["out"], model(x)["out"])
