"""Norms of a part of their channels: what the dense norm gives where the other channels are zero."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from channel_cases import OWN_NORMS, NormedByItself
from torch import Tensor, nn

import torch_flowprune as fp
from torch_flowprune.channels import NarrowLayerNorm, NarrowRMSNorm
from torch_flowprune.channels.shrinking.own_code.dense_spans import OVER
from torch_flowprune.channels.shrinking.written.narrow_norms import narrowed
from torch_flowprune.channels.tracing.tellable import SPANNING

KEPT = torch.tensor([0, 2, 3, 6])
NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "layer norm": (lambda: nn.LayerNorm(8), -1),
    "layer norm without bias": (lambda: nn.LayerNorm(8, bias=False), -1),
    "layer norm without affine": (lambda: nn.LayerNorm(8, elementwise_affine=False), -1),
    "rms norm": (lambda: nn.RMSNorm(8), -1),
    "rms norm with its own eps": (lambda: nn.RMSNorm(8, eps=0.1), -1),
    "rms norm without affine": (lambda: nn.RMSNorm(8, elementwise_affine=False), -1),
    "group norm": (lambda: nn.GroupNorm(1, 8), 1),
    "group norm without affine": (lambda: nn.GroupNorm(1, 8, affine=False), 1),
}


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A dense norm, the narrow one, and what each is given: zeros on the channels that are gone."""
    make, dim = NORMS[name]
    torch.manual_seed(0)
    dense = make()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    small = copy.deepcopy(dense)
    for key, parameter in dense.named_parameters():
        small._parameters[key] = nn.Parameter(parameter.detach()[KEPT])
    left = torch.zeros(8, dtype=torch.bool).index_fill_(0, KEPT, value=True)
    small = narrowed(small, {"": {dim: left}})
    shape = (3, 8) if dim == -1 else (3, 8, 5)
    x = torch.zeros(shape).index_copy_(dim, KEPT, torch.randn(shape).index_select(dim, KEPT) + 0.7)
    x = x.to(dtype)
    return dense.to(dtype), small.to(dtype), x, x.index_select(dim, KEPT)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_what_the_dense_norm_gives_on_the_channels_that_are_left(name: str, dtype: torch.dtype, bound: float) -> None:
    dense, small, x, left = pair(name, dtype)
    expected = dense(x).index_select(NORMS[name][1], KEPT).detach()
    out = small(left).detach()
    assert out.dtype is dtype
    assert float((out - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("name", NORMS)
def test_its_gradients_are_the_dense_norms(name: str) -> None:
    dense, small, x, left = pair(name)
    x.requires_grad_(), left.requires_grad_()
    dim = NORMS[name][1]
    torch.sin(dense(x).index_select(dim, KEPT)).sum().backward()
    torch.sin(small(left)).sum().backward()
    torch.testing.assert_close(left.grad, x.grad.index_select(dim, KEPT), rtol=1e-10, atol=1e-12)
    for key, parameter in dense.named_parameters():
        torch.testing.assert_close(small.get_parameter(key).grad, parameter.grad[KEPT], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_it_is_copied_stored_exported_and_says_its_dense_width(name: str) -> None:
    _, small, _, left = pair(name)
    assert "dense_width=8" in repr(small)
    assert torch.equal(copy.deepcopy(small)(left), small(left))
    assert torch.equal(pickle.loads(pickle.dumps(small))(left), small(left))
    program = torch.export.export(nn.Sequential(small), (left,))
    torch.testing.assert_close(program.module()(left), small(left), rtol=1e-12, atol=1e-12)


def test_every_operator_that_divides_has_its_function() -> None:
    assert set(OVER) - {"forward"} == SPANNING


# -- in models ------------------------------------------


class Stream(nn.Module):
    """A residual stream with a norm before each branch."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.end = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.end(x + self.down(torch.relu(self.up(self.norm(x))))))


WIDTHS: dict[str, Callable[[], nn.Module]] = {"layer norm": lambda: nn.LayerNorm(8), "rms norm": lambda: nn.RMSNorm(8)}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_residual_width_is_pruned_trained_shrunk_and_saved_round_after_round(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(4, 6, 5), torch.randint(3, (4, 6))
    model = Stream(WIDTHS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for width in (6, 4):
        share = 1 - width / model.end.normalized_shape[0]
        words = {"granularity": "channel", "example_inputs": x, "allocation": {"first": share, "up": 0.5}}
        fp.global_prune(model, "magnitude", **words)
        expected = model(x)
        model = fp.shrink(model, x, optimizer=optimizer)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert model.first.out_features == model.end.normalized_shape[0] == width
        assert (type(model.norm), model.norm.dense_width) == ({"l": NarrowLayerNorm, "r": NarrowRMSNorm}[name[0]], 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    pytest.importorskip("safetensors")
    fp.save_pruned(model, tmp_path / "small.safetensors")
    again = fp.load_pruned(Stream(WIDTHS[name]), tmp_path / "small.safetensors")
    assert torch.equal(again(x), model(x))


def test_a_masked_and_a_shrunk_model_train_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    model = Stream(WIDTHS["layer norm"]).double()
    fp.global_prune(model, "magnitude", granularity="channel", example_inputs=x, allocation={"first": 0.5, "up": 0.5})
    small = fp.shrink(model, x)
    for one in (model, small):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OWN_NORMS)
def test_code_that_divides_by_a_number_of_channels_says_the_dense_one(name: str) -> None:
    torch.manual_seed(0)
    model, x = NormedByItself(OWN_NORMS[name]), torch.randn(2, 5, 8)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    said = fp.replaced_modules(small)
    assert set(said) == {"norm"}
    assert all(line.endswith("as over 6 channels") for line in said["norm"])
    again = io.BytesIO()
    torch.save(small, again)
    again.seek(0)
    assert torch.equal(torch.load(again, weights_only=False)(x), small(x))
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
