"""Models that return losses in train mode and answers in eval mode, and losses that meet the other."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp

X = torch.ones(2, 3)


class Detector(nn.Module):
    """As torchvision's: lists of images and targets to a dict of losses in train mode, to a list of dicts else."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, images, targets=None):
        boxes = [self.net(image).mean(0) for image in images]
        if not self.training:
            return [{"boxes": box} for box in boxes]
        if targets is None:
            raise AssertionError("targets should not be none when in training mode")
        errors = torch.stack(
            [(box - target["boxes"]).square().sum() for box, target in zip(boxes, targets, strict=True)]
        )
        return {"box": errors.mean(), "size": errors.sqrt().mean()}


def data():
    return [([torch.randn(3, 4), torch.randn(2, 4)], [{"boxes": torch.ones(2)}, {"boxes": torch.zeros(2)}])]


def added(model, batch):
    return sum(model(*batch).values())


CLOSURES = {
    "values": added,
    "a key": lambda model, batch: model(*batch)["box"],
    "an attribute": lambda model, batch: model(*batch).get("box"),
    "two of them": lambda model, batch: (lambda box, size: box + size)(*model(*batch).values()),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_loss_of_train_mode_in_eval_mode_is_told_of(name):
    model = Detector()
    with pytest.raises(ValueError, match='fails on what the model returns in eval mode.*: pass mode="train"'):
        fp.scores(model, "snip", data(), closure=CLOSURES[name])
    found = fp.flow(model, data(), needs=("g",), closure=CLOSURES[name], mode="train")
    assert found.g["net.weight"].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: fp.global_prune(model, "snip", 0.5, data=data(), closure=added),
        lambda model: fp.compare(model, "magnitude", 0.5, data(), closure=added),
        lambda model: fp.diagnose(model, data(), closure=added),
        lambda model: fp.predict(model, {"net.weight": torch.eye(2, 4) > 0}, data(), closure=added),
    ],
    ids=["global_prune", "compare", "diagnose", "predict"],
)
def test_whatever_call_it_is(call):
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="fails on what the model returns in eval mode"):
        call(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_loss_of_a_model_that_takes_its_targets_is_told_of(mode):
    with pytest.raises(ValueError, match='from inputs and targets, .*: pass mode="train" and closure= in its place'):
        fp.scores(Detector(), "snip", data(), loss=lambda output, _: sum(output.values()), mode=mode)


def test_a_loss_that_fails_in_either_mode_says_what_it_says():
    for mode in ("eval", "train"):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            fp.scores(nn.Linear(3, 2), "snip", (X, torch.ones(2)), closure=lambda m, b: m.nothing, mode=mode)
