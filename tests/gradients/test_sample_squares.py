"""Squares of sample gradients from one pass over a batch are those of a pass a sample, or are taken by such passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_flowprune as fp
from torch_flowprune.gradients.sample_squares.sample_squares import SampleSquares

SAMPLES = 5
IMAGES, CLASSES = torch.randn(SAMPLES, 4, 6, 6, dtype=torch.float64), torch.arange(SAMPLES) % 3
WORDS = torch.randint(7, (SAMPLES, 9))


class Stem(nn.Module):
    """A module, and the mean over all but samples and channels of what it gives, into three classes."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return self.head(y.flatten(2).mean(2) if y.dim() > 2 else y)


class Function(nn.Module):
    """Parameters, and a forward that reads them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def norm_with_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


CONVOLUTIONS: dict[str, nn.Module] = {
    "kernel": nn.Conv2d(4, 5, 3, padding=1),
    "one position": nn.Conv2d(4, 5, 6),
    "four positions": nn.Conv2d(4, 5, 3, stride=3),
    "pointwise": nn.Conv2d(4, 5, 1, stride=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2, dilation=2),
    "same": nn.Conv2d(4, 5, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(4, 5, 3, stride=2),
}
UNDERSTOOD: dict[str, tuple[nn.Module, Tensor]] = {
    **{
        name: (Stem(one, one.out_channels), IMAGES)  # type: ignore[arg-type]
        for name, one in CONVOLUTIONS.items()
        if name != "same"
    },
    "channels last": (Stem(nn.Conv2d(4, 5, 3), 5).to(memory_format=torch.channels_last), IMAGES),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.Tanh(), nn.Linear(6, 3)), IMAGES),
    "linear over positions": (
        Stem(Function(lambda m, x: functional.linear(rows(x), m.w, m.b), w=(5, 4), b=(5,)), 36),
        IMAGES,
    ),
    "windows": (
        Stem(
            Function(lambda m, x: functional.linear(rows(x).reshape(-1, 4, 4), m.w).view(len(x), 36, 5), w=(5, 4)), 36
        ),
        IMAGES,
    ),
    "time first": (
        Stem(Function(lambda m, x: functional.linear(rows(x).transpose(0, 1), m.w).transpose(0, 1), w=(5, 4)), 36),
        IMAGES,
    ),
    "positions and in them samples": (
        Stem(
            Function(
                lambda m, x: (
                    functional.linear(rows(x).transpose(0, 1).reshape(-1, 4), m.w).view(36, -1, 5).transpose(0, 1)
                ),
                w=(5, 4),
            ),
            36,
        ),
        IMAGES,
    ),
    "product": (Stem(Function(lambda m, x: rows(x) @ m.w, w=(4, 5)), 36), IMAGES),
    "addmm": (
        Stem(
            Function(lambda m, x: torch.addmm(m.b, rows(x).reshape(-1, 4), m.w).view(len(x), 36, 5), w=(4, 5), b=(5,)),
            36,
        ),
        IMAGES,
    ),
    "batch norm": (Stem(norm_with_statistics(), 4), IMAGES),
    "group norm": (Stem(nn.GroupNorm(2, 4), 4), IMAGES),
    "layer norm": (Stem(nn.LayerNorm((6, 6)), 4), IMAGES),
    "embedding": (Stem(nn.Embedding(7, 5, padding_idx=2), 9), WORDS),
    "positions": (
        Stem(Function(lambda m, x: torch.sin(rows(x) + m.place[:, : x.shape[2] * 6]), place=(1, 40, 4)), 36),
        IMAGES,
    ),
    "looked up positions": (
        Stem(
            Function(
                lambda m, x: torch.sin(rows(x) + functional.embedding(torch.arange(36)[None], m.place)), place=(40, 4)
            ),
            36,
        ),
        IMAGES,
    ),
    "token in front": (
        Stem(Function(lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), rows(x)], 1), token=(1, 1, 4)), 37),
        IMAGES,
    ),
    "scales": (Stem(Function(lambda m, x: rows(x) * m.scale + m.shift, scale=(4,), shift=(36, 4)), 36), IMAGES),
}
NOT_UNDERSTOOD: dict[str, tuple[nn.Module, Tensor, set[str]]] = {
    "used twice": (
        Stem(Function(lambda m, x: functional.linear(torch.tanh(functional.linear(rows(x), m.w)), m.w), w=(4, 4)), 36),
        IMAGES,
        {"inner.w"},
    ),
    "another operator": (
        Stem(Function(lambda m, x: torch.einsum("bni,oi->bno", rows(x), m.w), w=(5, 4)), 36),
        IMAGES,
        {"inner.w"},
    ),
    "a padding in words": (Stem(CONVOLUTIONS["same"], 5), IMAGES, {"inner.weight", "inner.bias"}),
    "recurrent": (
        Stem(Function(lambda m, x: m.lstm(rows(x))[0]), 36),
        IMAGES,
        {f"inner.lstm.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
}
NOT_UNDERSTOOD["recurrent"][0].inner.lstm = nn.LSTM(4, 3, batch_first=True)


def by_passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    totals, count = {name: torch.zeros_like(value) for name, value in named.items()}, 0
    for x, y in batches:
        for i in range(len(x)):
            grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), named.values(), allow_unused=True)
            for total, grad in zip(totals.values(), grads, strict=True):
                total.add_(0 if grad is None else grad.square())
            count += 1
    return {name: total / count for name, total in totals.items()}


@pytest.fixture
def taken_at_once(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The numbers of the parameters that one pass was seen to give the squares of."""
    seen: list[set[int]] = []
    probe = SampleSquares._probe

    def noted(self: SampleSquares, batch: Any) -> Any:
        axes = probe(self, batch)
        seen.append(set(axes))
        return axes

    monkeypatch.setattr(SampleSquares, "_probe", noted)
    return seen


def check(model: nn.Module, inputs: Tensor, **options: Any) -> None:
    model = model.double().eval()
    batches = [(inputs, CLASSES), (inputs[:4].flip(0), CLASSES[:4])]
    expected = by_passes(model, batches, functional.cross_entropy)
    for needs in (("g2_sample",), ("g", "g2", "g2_sample"), ("Hg", "g2_sample")):
        found = fp.flow(model, batches, needs=needs, loss=functional.cross_entropy, **options)
        for name, value in expected.items():
            torch.testing.assert_close(found.g2_sample[name], value, rtol=1e-12, atol=1e-16)
        plain = fp.flow(model, batches, needs=needs[:1], loss=functional.cross_entropy, **options)
        assert (found.loss, found.samples) == (pytest.approx(plain.loss, rel=1e-14), 9)
        if found.g is not None:
            torch.testing.assert_close(
                found.g, fp.flow(model, batches, needs=("g",), **options).g, rtol=1e-12, atol=1e-16
            )


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_one_pass_gives_what_passes_give(case: str, taken_at_once: list[set[int]]) -> None:
    model, inputs = UNDERSTOOD[case]
    check(model, inputs)
    assert taken_at_once
    assert all(seen == set(range(len(list(model.parameters())))) for seen in taken_at_once)


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_one_pass_does_not_give_falls_back_alone(case: str, taken_at_once: list[set[int]]) -> None:
    model, inputs, alone = NOT_UNDERSTOOD[case]
    check(model, inputs)
    names = [name for name, _ in model.named_parameters()]
    assert taken_at_once
    assert all(set(names) - {names[i] for i in seen} == alone for seen in taken_at_once)


def test_masked_weights_are_taken_at_once_with_zeros_under_their_masks(taken_at_once: list[set[int]]) -> None:
    model = Stem(nn.Conv2d(4, 5, 3), 5).double().eval()
    fp.global_prune(model, "magnitude", 0.5)
    found = fp.flow(model, (IMAGES, CLASSES), needs=("g2_sample",)).g2_sample
    expected = by_passes(model, [(IMAGES, CLASSES)], functional.cross_entropy)
    torch.testing.assert_close(found["inner.weight"], expected["inner.weight_orig"], rtol=1e-12, atol=0)
    assert taken_at_once == [{0, 1, 2, 3}]
    opened = fp.flow(model, (IMAGES, CLASSES), needs=("g2_sample",), under_masks=True).g2_sample["inner.weight"]
    assert (opened[~fp.masks(model)["inner.weight"]] > 0).all()


def test_samples_without_a_target_and_of_unequal_weight_count_as_in_passes() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()
    targets = torch.randint(7, WORDS.shape)
    targets[0, 3:], targets[2] = -100, -100

    wrapped = nn.Sequential(*model, Function(lambda _, x: x.transpose(1, 2)))
    counts = (targets != -100).sum(1)
    expected = {name: torch.zeros_like(value) for name, value in wrapped.named_parameters()}
    for i in range(SAMPLES):
        if counts[i]:
            value = functional.cross_entropy(wrapped(WORDS[i : i + 1]), targets[i : i + 1])
            for total, grad in zip(expected.values(), torch.autograd.grad(value, wrapped.parameters()), strict=True):
                total.add_(counts[i] * grad.square() / counts.sum())
    found = fp.flow(wrapped, (WORDS, targets), needs=("g2_sample",)).g2_sample
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-18)


def test_a_loss_that_looks_across_samples_is_refused_as_with_passes(taken_at_once: list[set[int]]) -> None:
    def centred(output: Tensor, _target: Tensor) -> Tensor:
        return (output - output.mean(0) * 0.5).square().mean()

    batch = IMAGES[:, :, 0, 0], CLASSES
    with pytest.raises(ValueError, match="no mean|the mean of its samples' losses"):
        fp.flow(nn.Linear(4, 3).double(), batch, loss=centred, needs=("g2_sample",))
    assert taken_at_once == [set()]


def test_a_batch_that_goes_another_way_is_taken_by_passes() -> None:
    def run(module: Any, x: Tensor) -> Tensor:
        y = functional.linear(x, module.w)
        large = x[:, :1] > 1e3
        return torch.where(large, functional.linear(y, module.w), y) if bool(large.any()) else y

    model = nn.Sequential(Function(run, w=(4, 4)), nn.Linear(4, 3)).double()
    x = IMAGES[:, :, 0, 0].clone()
    odd = x.clone()
    odd[0, 0] = 2e3
    batches = [(x, CLASSES), (odd, CLASSES)]
    found = fp.flow(model, batches, needs=("g2_sample",)).g2_sample
    torch.testing.assert_close(found, by_passes(model, batches, functional.cross_entropy), rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = Stem(nn.Conv2d(4, 5, 3), 5).double()
    model.inner.weight.requires_grad_(False)
    fp.flow(model, (IMAGES, CLASSES), needs=("g2_sample",))
    assert [one.requires_grad for one in model.parameters()] == [False, True, True, True]
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("samples", [10, 40])
def test_runs_of_the_model_do_not_grow_with_the_samples(samples: int) -> None:
    runs = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).double()
    model.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(samples, 144, dtype=torch.float64)
    fp.flow(model, (x, torch.zeros(samples, dtype=torch.long)), needs=("g2_sample",))
    assert len(runs) <= 4
