"""A detector of torchvision: losses that the model returns, lists of images, boxes; cut twice while it trains."""

import copy

import pytest
import torch
from torch import nn

import torch_flowprune as fp

pytestmark = pytest.mark.slow

torchvision = pytest.importorskip("torchvision")
from torchvision.models.detection import RetinaNet  # noqa: E402 - after the check that it is there
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.retinanet import RetinaNetHead  # noqa: E402
from torchvision.ops import box_iou  # noqa: E402

SIDE = 64


def scenes(count, seed):
    """Pictures with one or two rectangles in them, red or green, and the boxes around these."""
    source, images, targets = torch.Generator().manual_seed(seed), [], []
    for _ in range(count):
        picture, boxes, labels = 0.2 * torch.rand(3, SIDE, SIDE, generator=source), [], []
        for _ in range(int(torch.randint(1, 3, (), generator=source))):
            w, h = (10 + 18 * torch.rand(2, generator=source)).int().tolist()
            x, y = (int(torch.randint(0, SIDE - size, (), generator=source)) for size in (w, h))
            colour = int(torch.randint(2, (), generator=source))
            picture[:, y : y + h, x : x + w] = 0.1
            picture[colour, y : y + h, x : x + w] = 0.9
            boxes.append([x, y, x + w, y + h])
            labels.append(colour + 1)
        images.append(picture)
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})
    return images, targets


def detector():
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 32))
    body.out_channels = 32
    anchors = AnchorGenerator(((12, 20, 28),), ((0.5, 1.0, 2.0),))
    head = RetinaNetHead(32, 9, 3, norm_layer=nn.BatchNorm2d)  # without norms it learns late, and on some machines not
    return RetinaNet(body, 3, SIDE, SIDE, anchor_generator=anchors, head=head, detections_per_img=10)


# guide: several_models
def losses(model, batch):
    images, targets = batch
    return sum(model(images, targets).values())  # of train mode


# end


def train(model, optimizer, batches, epochs, pruner=None):
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            losses(model, batch).backward()
            if pruner is not None:
                pruner.track()
            optimizer.step()


@torch.no_grad()
def found(model, images, targets):
    """The share of rectangles that a box of their colour is on."""
    hits = []
    for one, target in zip(model.eval()(images), targets, strict=True):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            boxes = one["boxes"][(one["labels"] == label) & (one["scores"] > 0.3)]
            hits.append(bool(len(boxes)) and float(box_iou(box[None], boxes).max()) > 0.5)
    return sum(hits) / len(hits)


def same(one, other):
    return all(torch.equal(a[word], b[word]) for a, b in zip(one, other, strict=True) for word in a)


def pruner_of(model, images):
    # guide: several_models
    example = (images[:2],)  # the model is called with a list
    options = dict(granularity="channel", cost="flops", example_inputs=example, rounds=2)
    pruner = fp.Pruner(model, "taylor", 0.5, mode="train", closure=losses, **options)
    # end
    return pruner, example


@pytest.mark.filterwarnings("ignore::torch_flowprune.TiedScoresWarning")  # channels that its training left dead
def test_a_detector_is_cut_while_it_trains(tmp_path):
    torch.manual_seed(0)
    batches, held_out = [scenes(8, seed) for seed in range(24)], scenes(60, 99)
    model = detector()
    dense, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, optimizer, batches, 8)
    before = found(model, *held_out)
    assert before > 0.7

    pruner, example = pruner_of(model, held_out[0])
    train(model, optimizer, batches, 1, pruner)
    pruner.step()
    masked = model.eval()(held_out[0])
    small = fp.shrink(model, example, optimizer=optimizer, pruner=pruner)
    assert fp.replaced_modules(small) == {} and type(small) is type(dense)
    for one, other in zip(small.eval()(held_out[0]), masked, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=1e-2)
        assert torch.equal(one["labels"], other["labels"])
    train(small, optimizer, batches, 2)

    fp.save_pruned(small, tmp_path / "small.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = fp.load_pruned(copy.deepcopy(dense), tmp_path / "small.safetensors")
    assert same(resumed.eval()(held_out[0]), small.eval()(held_out[0]))
    its_optimizer = torch.optim.AdamW(resumed.parameters(), lr=2e-3)
    its_optimizer.load_state_dict(state["optimizer"])
    its, _ = pruner_of(resumed, held_out[0])
    its.load_state_dict(state["pruner"])
    report = its.step(batches[:8])  # by sweeps over data this time
    assert str(report) == str(pruner.step(batches[:8]))
    assert 0.45 < report.left.flops / report.dense.flops <= 0.5

    final = fp.shrink(resumed, example, optimizer=its_optimizer, pruner=its)
    train(final, its_optimizer, batches, 10)
    print(before, found(final, *held_out))
    assert found(final, *held_out) > before - 0.1
    fp.save_pruned(final, tmp_path / "final.safetensors")
    again = fp.load_pruned(copy.deepcopy(dense), tmp_path / "final.safetensors")
    assert same(again.eval()(held_out[0]), final.eval()(held_out[0]))
    assert fp.export(final.backbone, torch.stack(held_out[0][:2]), tmp_path / "body.onnx").difference < 1e-3
