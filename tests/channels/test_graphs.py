"""A graph in a module's place: what it was built for is compared at each call, and modes are those of the modules."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.channels.shrinking.graphs.call_guard import BuiltForError
from torch_flowprune.channels.shrinking.graphs.exported_module import ExportedModule

X = torch.linspace(-1, 1, 4 * 3 * 6 * 6).view(4, 3, 6, 6)


class Net(nn.Module):
    """Convolutions with code between them that reads a width off a tensor, where nothing can be put in its place."""

    def __init__(self, norm: nn.Module | None = None, always: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), norm or nn.Identity(), nn.Conv2d(8, 4, 1)
        self.always = always

    def forward(
        self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, flags: dict[str, bool] | None = None
    ) -> Tensor:
        h = self.norm(self.a(x)) * scale
        if self.always is not None:
            h = F.dropout(h, 0.5, training=self.always)
        if flags and flags["double"]:
            h = 2 * h
        if mask is not None:
            h = h * mask
        return self.b(h.div(h.shape[1]))


def shrunk(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    args = args or (X,)
    words = {"example_inputs": args, "granularity": "channel", "scope": "layer", "min_keep": 1}
    fp.global_prune(model, "magnitude", 0.5, **words)
    small = fp.shrink(model, args, graphs=True, **kwargs)
    assert any(isinstance(module, ExportedModule) for module in small.modules())
    return small


def equal(model: nn.Module, small: nn.Module, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        return torch.allclose(model(*args, **kwargs), small(*args, **kwargs), atol=1e-6)


# -- calls ------------------------------------------


def test_the_call_it_was_built_for_in_every_form_and_other_batches() -> None:
    model = Net().eval()
    small = shrunk(model)
    for call in [(X,), (X[:2],), (torch.cat([X, X]),), (X, 1.0), (X, 1.0, None)]:
        assert equal(model, small, *call), call
    assert equal(model, small, x=X, scale=1.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((X, 3.0), {}, r"built for scale = 1\.0, and was called with 3\.0"),
        ((X,), {"scale": 3.0}, r"built for scale = 1\.0, and was called with 3\.0"),
        ((X,), {"scale": 1}, r"built for scale = 1\.0, and was called with 1:"),
        ((X,), {"mask": torch.ones(1)}, "built for mask = None, and was called with a float32 tensor of 1"),
        ((X,), {"flags": {"double": True}}, "built for flags = "),
        (
            (X.double(),),
            {},
            r"x = a float32 tensor of s\d+ x 3 x 6 x 6, .* a float64 tensor of 4 x 3",
        ),
        ((X[..., :4],), {}, r"of s\d+ x 3 x 6 x 6, and was called with a float32 tensor of 4 x 3 x 6 x 4"),
        ((X[0],), {}, "and was called with a float32 tensor of 3 x 6 x 6"),
    ],
    ids=["number", "by keyword", "kind of number", "no longer None", "structure", "dtype", "size", "rank"],
)
def test_any_other_call_is_an_error_that_says_what_it_was_built_for(
    args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    small = shrunk(Net().eval())
    with pytest.raises(BuiltForError, match=text):
        small(*args, **kwargs)


def test_tensors_that_were_given_have_to_be_given() -> None:
    mask = torch.ones(6)
    model = Net().eval()
    small = shrunk(model, X, 0.5, mask, {"double": True})
    assert equal(model, small, X, 0.5, mask + 1, {"double": True})
    with pytest.raises(BuiltForError, match="built for mask = a float32 tensor of 6, and was called with None"):
        small(X, 0.5, None, {"double": True})
    with pytest.raises(BuiltForError, match="built for flags = True, and was called with False"):
        small(X, 0.5, mask, {"double": False})


class Loops(nn.Module):
    """As many times as the input has steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, steps = x.new_zeros(len(x), 8), []
        for at in range(x.shape[1]):
            state = 0.5 * state + self.a(x[:, at])
            steps.append(state)
        return self.b(torch.stack(steps, 1).div(len(state[0])))


def test_another_number_of_steps_is_an_error() -> None:
    model, x = Loops().eval(), torch.randn(2, 6, 4)
    small = shrunk(model, x)
    assert equal(model, small, x)
    with pytest.raises(BuiltForError, match="x 6 x 4, and was called with a float32 tensor of 2 x 9 x 4"):
        small(torch.randn(2, 9, 4))


# -- modes ------------------------------------------


def test_norms_frozen_in_training_stay_frozen() -> None:
    model = Net(nn.BatchNorm2d(8)).train()
    model.norm.eval()
    small = shrunk(model)
    assert not small.norm.training
    before = small.norm.running_mean.clone()
    assert equal(model, small, X)
    assert torch.equal(small.norm.running_mean, before)
    small.norm.train(), model.norm.train()
    assert equal(model, small, X)
    assert not torch.equal(small.norm.running_mean, before)
    assert int(small.norm.num_batches_tracked) == int(model.norm.num_batches_tracked)


class Fixed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.InstanceNorm2d(8), lambda: nn.BatchNorm2d(8, track_running_stats=False), lambda: Fixed(8)],
    ids=["instance", "without running statistics", "never in train mode"],
)
def test_norms_of_all_kinds(norm: Callable[[], nn.Module]) -> None:
    model = Net(norm()).eval()
    small = shrunk(model)
    for mode in (False, True):
        assert equal(model.train(mode), small.train(mode), X)


@pytest.mark.parametrize("always", [True, False])
def test_dropout_that_the_mode_does_not_switch(always: bool) -> None:
    small = shrunk(Net(always=always).eval())
    for mode in (False, True):
        small.train(mode)
        assert torch.equal(small(X), small(X)) is not always


def test_dropout_of_attention_is_on_in_training() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
            p = 0.9 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=math.exp(-q.shape[1]))
            return self.out(y.transpose(1, 2).reshape(b, n, 16))

    x = torch.randn(3, 6, 8)
    small = shrunk(Attends().eval(), x)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(x.new_full((len(x), 1, 1, 1), 0.5)) if self.training else x


def test_what_training_alone_does_is_an_error_and_not_left_out() -> None:
    model = Net(DropPath()).eval()
    small = shrunk(model)
    small.train()
    with pytest.raises(BuiltForError, match="graph of a forward in eval mode, and norm is in train mode"):
        small(X)
    small.norm.eval()
    model.train().norm.eval()
    assert equal(model, small, X)


def test_code_of_its_own_for_training_is_refused() -> None:
    class Halves(Net):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x) + (self.b(self.a(x)) if self.training else 0)

    model = Halves().eval()
    with pytest.raises(fp.ShrinkError, match=r"no output in train mode: Halves is the graph of a forward in eval mode"):
        shrunk(model)


# -- what it is besides ------------------------------------------


def test_its_modules_are_the_models_own() -> None:
    model = Net(nn.BatchNorm2d(8)).eval()
    model.register_buffer("table", torch.ones(3), persistent=False)
    small = shrunk(model)
    assert type(small.a) is nn.Conv2d
    assert small.state_dict().keys() == Net(nn.BatchNorm2d(8)).state_dict().keys()
    with torch.no_grad():
        small.a.weight.mul_(2)
    before = small(X)
    fp.global_prune(small, "magnitude", 0.5, include=["a.weight"])
    assert not torch.equal(small(X), before), "masks put on later count"


def test_it_is_copied_pickled_and_switched_between_modes() -> None:
    small = shrunk(Net(nn.BatchNorm2d(8)).eval())
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(again(X), small(X))
        again.train()
        assert not again.norm.eval().training
        with pytest.raises(BuiltForError, match=r"scale = 1\.0"):
            again(X, 2.0)
    code = small.built_graph.code
    assert small.train().eval().built_graph.code is code
