"""Values of a wrong kind are refused in words, and nothing is touched."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.channels import channel_masks

BATCH = (torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]))


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


REFUSED = {
    "a list for a mask": (
        lambda model: fp.apply_masks(model, {"2.bias": torch.ones(2).bool(), "0.weight": [[True] * 4] * 6}),
        TypeError,
        "the mask of '0.weight' should be a bool tensor .*, got list: ",
    ),
    "none for a mask": (lambda model: fp.apply_masks(model, {"0.weight": None}), TypeError, "got NoneType"),
    "a list for a mask to predict": (
        lambda model: fp.predict(model, {"0.weight": [True]}, BATCH),
        TypeError,
        "the mask of '0.weight' should be a bool tensor",
    ),
    "no masks to predict": (lambda model: fp.predict(model, fp.masks(model), BATCH), ValueError, "masks= is empty"),
    "two measures where there is one answer": (
        lambda model: fp.importance_scores(model, ["snip", "l1"], BATCH),
        TypeError,
        r"importance_scores takes one measure, got \['snip', 'l1'\]: call it once for each",
    ),
    "a tensor that no flow has": (
        lambda model: fp.flow(model, BATCH).tensors("zz"),
        ValueError,
        "a flow has no 'zz': it has Hg, diagH, g, g2",
    ),
    "a state with an entry that is no tensor": (
        lambda model: fp.load_state_dict(model, {**net().state_dict(), "2.bias": None}),
        ValueError,
        r"nothing was loaded: other shape 2.bias: NoneType for \(2,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, text):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        call(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_flags_of_channels_may_be_numbers(dtype):
    """Inverted bit by bit, whole numbers named other units."""
    model = net()
    coupling, keep = fp.couple(model, BATCH[0]), torch.tensor([0, 1, 1, 0, 1, 1]).to(dtype)
    masks = channel_masks(coupling, {coupling.groups[0].name: keep}, dict(model.named_parameters()))
    assert (
        masks["0.weight"].all(1).tolist() == masks["2.weight"].all(0).tolist() == [False, True, True, False, True, True]
    )
