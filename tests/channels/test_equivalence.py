"""The trial itself: which differences it finds, in which mode, and from which size on.

What is held against the masked model here is that model again with one fault, so that nothing but the fault differs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.channels import ShrinkError
from torch_flowprune.channels.coupling import reading_of
from torch_flowprune.channels.shrinking.proof.equivalence import Trial, relative_error, tolerance_of, training
from torch_flowprune.channels.shrinking.surgery import Surgery

X = torch.linspace(-1, 1, 20).view(5, 4)
UNCUT = Surgery({}, {})


def normed() -> nn.Module:
    """Every kind of vector, at its default."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def trial_of(model: nn.Module, *args: Any, surgery: Surgery = UNCUT, tolerance: float | None = None) -> Trial:
    return Trial(model, {}, surgery, args or (X,), {}, tolerance)


def same(trial: Trial) -> nn.Module:
    return copy.deepcopy(trial.model)


class Off(nn.Module):
    """A model whose output is off by a known share, in one mode."""

    def __init__(self, model: nn.Module, share: float, in_training: bool) -> None:
        super().__init__()
        self.model, self.share, self.in_training = model, share, in_training

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return found * (1 + self.share) if self.training is self.in_training else found


def test_attention_over_nothing_is_no_call() -> None:
    """Kernels of torch 2.6 divide by the number of heads, and end the process."""

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, value=k, enable_gqa=True)

    trial = trial_of(Attends(), torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2))
    trial.args = (trial.args[0], trial.args[1][:, :0])
    with pytest.raises(ValueError, match="attention over nothing: an operand is empty"):
        trial.run(trial.model)


# -- which mode ------------------------------------------


class NoiseOfItsWidth(nn.Module):
    """A scale read off the width, and a training forward that draws by width: eval mode alone can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden + torch.randn_like(hidden) if self.training else hidden.div(math.sqrt(len(hidden[0]))))


def test_a_difference_in_eval_mode_alone_is_found_out() -> None:
    model, x = NoiseOfItsWidth(), torch.randn(4, 8)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    with pytest.raises(ShrinkError, match=r"the smaller model's output differs from the masked model's by"):
        fp.shrink(model, x)


def test_where_the_inputs_do_not_do_for_training_eval_mode_is_compared() -> None:
    trial = trial_of(normed(), X[:1])
    assert trial.trained is None
    trial.check(same(trial))
    with pytest.raises(ShrinkError, match="output differs"):
        trial.check(Off(same(trial), 1e-3, in_training=False))


@pytest.mark.parametrize("in_training", [False, True], ids=["eval", "train"])
def test_each_mode_is_compared_by_itself(in_training: bool) -> None:
    trial = trial_of(normed())
    with pytest.raises(ShrinkError, match="output in train mode differs" if in_training else "output differs"):
        trial.check(Off(same(trial), 1e-3, in_training))


# -- from which size on ------------------------------------------


class Insists(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError(f"float32 wanted, got {x.dtype}")
        return self.layer(x)


@pytest.mark.parametrize(
    ("make", "tolerance", "in_training", "passes", "fails"),
    [
        (normed, None, False, 5e-10, 2e-9),
        (normed, None, True, 5e-10, 2e-9),
        (normed, 1e-4, False, 5e-6, 2e-5),
        (normed, 1e-4, True, 5e-5, 2e-4),
        (Insists, None, False, 5e-6, 2e-5),
        (Insists, None, True, 5e-4, 2e-3),
        (Insists, 1e-4, False, 5e-6, 2e-5),
        (Insists, 1e-4, True, 5e-4, 2e-3),
    ],
)
def test_how_far_outputs_may_differ(
    make: Callable[[], nn.Module], tolerance: float | None, in_training: bool, passes: float, fails: float
) -> None:
    """In float32 by what rounding does to the model, here next to nothing; in train mode by a wide tolerance."""
    trial = trial_of(make(), tolerance=tolerance)
    trial.check(Off(same(trial), passes, in_training))
    with pytest.raises(ShrinkError, match=r"differs from the masked model's by 2\.0e-"):
        trial.check(Off(same(trial), fails, in_training))


class Casts(nn.Module):
    def __init__(self, to: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.to_ = nn.Linear(4, 6), nn.Linear(6, 3), to

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(self.to_(hidden).to(hidden) if self.to_(hidden).is_floating_point() else hidden)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (lambda t: t, None),
        (lambda t: t.double(), None),
        (lambda t: t.long(), None),
        (lambda t: t.to(torch.float32), 1e-4),
        (lambda t: t.half(), 1e-4),
        (lambda t: t.to(torch.bfloat16), 1e-4),
        (lambda t: torch.ops.aten._to_copy(t, dtype=torch.float32), 1e-4),
    ],
    ids=["no cast", "double", "long", "float", "half", "bfloat16", "operator"],
)
def test_models_that_cast_below_float64_are_given_room(to: Callable[[Tensor], Tensor], expected: float | None) -> None:
    assert tolerance_of(reading_of(Casts(to).double(), X.double())) == expected


# -- away from the defaults ------------------------------------------


@pytest.mark.parametrize(
    ("name", "default"),
    [("1.running_mean", 0), ("1.running_var", 1), ("1.weight", 1), ("1.bias", 0)],
)
def test_no_default_hides_a_difference(name: str, default: float) -> None:
    """A smaller model that lost what a vector holds computes the same as long as it holds zeros or ones."""
    trial = trial_of(normed())
    lost = same(trial)
    lost.state_dict()[name].fill_(default)
    with pytest.raises(ShrinkError, match="output differs"):
        trial.check(lost)


def test_what_goes_is_zero_all_the_same() -> None:
    """Shaken off zero, the bias of a dead unit would reach the outputs of the masked model."""
    kept = torch.tensor([True, False, True, True, False, True])
    trial = trial_of(normed(), surgery=Surgery({"1.bias": {0: kept}}, {}))
    shaken = trial.model.state_dict()
    assert ((shaken["1.bias"] != 0) == kept).all()
    assert (shaken["1.weight"] != 1).all()
    assert (shaken["1.weight"] != 0).all()


def test_only_vectors_are_shaken() -> None:
    """Not matrices or whole numbers; a scale of (1, channels, 1, 1) is a vector, and a single gain too."""
    model = normed()
    model.register_parameter("scale", nn.Parameter(torch.ones(1, 3, 1, 1)))
    model.register_parameter("gain", nn.Parameter(torch.ones(())))
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    before, after = model.state_dict(), trial_of(model).model.state_dict()
    still = {name for name in before if torch.equal(before[name].to(after[name]), after[name])}
    assert still == {"0.weight", "2.weight", "table", "empty", "1.num_batches_tracked"}


def test_what_is_shaken_moves_a_little_and_no_two_entries_alike() -> None:
    """Far enough to be seen, near enough for the signal to live; were two entries the same, a swap would be hidden."""
    shaken = trial_of(nn.Sequential(nn.Linear(4, 99), nn.BatchNorm1d(99))).model.state_dict()
    for name, low, high in (
        ("1.weight", 0.4, 1.6),
        ("1.bias", -0.1, 0.1),
        ("1.running_mean", -0.2, 0.2),
        ("1.running_var", 0.5, 1.5),
    ):
        assert len(shaken[name].unique()) == 99, name
        assert low <= shaken[name].min() < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < shaken[name].max() <= high, name


def test_what_the_masks_leave_out_is_zero_and_the_rest_as_it_was() -> None:
    mask = torch.arange(24).view(6, 4) % 3 != 1
    model = normed()
    trial = Trial(model, {"0.weight": mask}, UNCUT, (X,), {}, None)
    assert torch.equal(trial.model[0].weight, torch.where(mask, model[0].weight, 0).double())
    unmasked = same(trial)
    unmasked[0].weight.data.copy_(model[0].weight)
    with pytest.raises(ShrinkError, match="output differs"):
        trial.check(unmasked)


def test_the_model_that_is_tried_is_a_copy() -> None:
    model = normed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trial = trial_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not trial.model.training
    assert trial.model[1].running_mean.dtype is torch.float64
    assert not trial.model[1].num_batches_tracked, "its own training mode is tried on a copy, too"


# -- what is compared ------------------------------------------


class Gives(nn.Module):
    """Fixed outputs."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return self.outputs


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((torch.ones(3),), "output has 1 tensors instead of 2"),
        ((torch.ones(3), torch.arange(3), torch.ones(1)), "output has 3 tensors instead of 2"),
        ((torch.ones(1), torch.arange(3)), r"output has shape \(1,\) instead of \(3,\)"),
        ((torch.ones(3, 1), torch.arange(3)), r"output has shape \(3, 1\) instead of \(3,\)"),
        ((torch.ones(3), torch.arange(3) + 1), "output differs from the masked model's by nan"),
        ((torch.full((3,), math.nan), torch.arange(3)), "output differs from the masked model's by nan"),
        ((torch.tensor([1, 1, 1.01]), torch.arange(3)), r"output differs from the masked model's by 1\.0e-02"),
    ],
)
def test_number_shapes_and_values_of_all_outputs(found: tuple[Tensor, ...], text: str) -> None:
    trial = trial_of(Gives(torch.ones(3), {"ids": torch.arange(3)}, None))
    trial.check(Gives(torch.ones(3), torch.arange(3), "no tensor"))
    with pytest.raises(ShrinkError, match=rf"the smaller model's {text}"):
        trial.check(Gives(*found))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([1.0, -4.0], [1.0, -2.0], 0.5),
        ([0.0, 0.0], [0.0, -3.0], 3.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, math.nan], [1.0, math.nan], math.nan),
        ([1.0, math.inf], [1.0, math.inf], math.nan),
        ([1, 2], [1, 2], 0.0),
        ([1, 2], [1, 3], math.nan),
        ([], [], 0.0),
    ],
)
def test_the_error_is_relative_to_the_largest_entry(one: list[float], other: list[float], expected: float) -> None:
    assert relative_error(torch.tensor(one), torch.tensor(other)) == pytest.approx(expected, nan_ok=True)


def test_a_model_that_changes_its_input_is_given_a_new_one_each_time() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return x.mul_(2).add_(y.add_(1))

    trial = Trial(InPlace(), {}, UNCUT, (X,), {"y": torch.ones(4)}, None)
    trial.check(InPlace())
    assert torch.equal(trial.args[0], X.double())
    assert torch.equal(trial.kwargs["y"], torch.ones(4).double())


def test_inputs_that_are_no_floats_are_handed_on_as_they_are() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, x: Tensor, ids: Tensor, how: str, *, scale: float | None = None) -> Tensor:
            assert (how, scale) == ("sum", None)
            return x + self.table(ids)

    trial = Trial(Embeds(), {}, UNCUT, (X, torch.arange(5), "sum"), {"scale": None}, None)
    trial.check(same(trial))
    assert [value.dtype for value in trial.args[:2]] == [torch.float64, torch.int64]


@pytest.mark.parametrize(("text", "said"), [("no such token\nat position 3", "no such token"), ("", "")])
def test_a_model_that_does_not_run_says_why(text: str, said: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(text)

    with pytest.raises(ShrinkError, match=rf"^the model does not run on the example inputs: {said}$"):
        trial_of(Fails())


# -- what training does otherwise ------------------------------------------


class Draws(nn.Module):
    """Noise in training, of whatever kind."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.noise = nn.Linear(4, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.layer(x)) if self.training else self.layer(x)


@pytest.mark.parametrize("noise", [torch.randn_like, lambda t: t + 1e-6 * torch.randn_like(t)], ids=["all", "little"])
def test_what_training_draws_is_left_out_of_the_comparison(noise: Callable[[Tensor], Tensor]) -> None:
    trial = trial_of(Draws(noise))
    assert trial.is_random()
    trial.check(Off(same(trial), 0.5, in_training=True))


@pytest.mark.parametrize(
    "noise",
    [
        lambda t: F.dropout(t, 0.5),
        lambda t: torch.dropout(input=t, p=0.5, train=True),
        lambda t: F.alpha_dropout(t, 0.5, True),
        lambda t: F.scaled_dot_product_attention(t[None], t[None], t[None], dropout_p=0.5),
        nn.Dropout(0.5),
    ],
    ids=["function", "by keyword", "alpha", "attention", "module"],
)
def test_dropout_of_any_kind_is_off_and_the_rest_is_compared(noise: Callable[[Tensor], Tensor]) -> None:
    trial = trial_of(Draws(noise))
    assert not trial.is_random()
    trial.check(same(trial))
    with pytest.raises(ShrinkError, match="output in train mode differs"):
        trial.check(Off(same(trial), 0.5, in_training=True))


def test_modules_that_hold_nothing_stay_in_eval_mode() -> None:
    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.bernoulli(x.new_full((len(x), 1), 0.5)) if self.training else x

    class Buffered(DropPath):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("drawn", torch.zeros(()))

    found = training(nn.Sequential(nn.Linear(4, 4), DropPath(), Buffered(), nn.Sequential(DropPath())).eval())
    assert [module.training for module in found.modules()] == [True, True, False, True, True, False]
    assert not trial_of(nn.Sequential(nn.Linear(4, 4), DropPath())).is_random()


def test_the_random_numbers_of_the_user_are_left_alone() -> None:
    model, before = Draws(torch.randn_like), torch.get_rng_state()
    trial = trial_of(model)
    trial.check(same(trial))
    assert torch.equal(torch.get_rng_state(), before)


# -- what users do besides ------------------------------------------


class Does(nn.Module):
    """A small model whose forward may do something else than it should."""

    def __init__(self, forward: Callable[..., Any], other: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.does, self.does_otherwise = forward, other or forward
        self.is_small = False

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, twice: bool = False) -> Tensor:
        return (self.does_otherwise if self.is_small else self.does)(self, x, scale, mask, twice)


def right(s: Does, x: Tensor, scale: float, mask: Tensor | None, twice: bool) -> Tensor:
    h = F.batch_norm(s.drop(s.layer(x)), s.norm.running_mean, s.norm.running_var, training=s.norm.training) * scale
    return (2 if twice else 1) * (h if mask is None else h * mask)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "a batch baked in": (
        lambda s, x, *o: right(s, x, *o).view(5, -1),
        "gives no output for a batch of 6|output for a batch of 6 has shape",
    ),
    "an average over a batch of five": (
        lambda s, x, *o: right(s, x, *o) * (len(x) / 5),
        "output for a batch of 6 differs",
    ),
    "the example's number": (
        lambda s, x, scale, *o: right(s, x, 0.5, *o),
        r"output (without scale|with scale=2\.0) differs",
    ),
    "the example's mask": (
        lambda s, x, scale, mask, *o: right(s, x, scale, X[0].to(x), *o),
        "output without mask differs",
    ),
    "a flag ignored": (
        lambda s, x, scale, mask, twice: right(s, x, scale, mask, False),
        "output with twice=True differs",
    ),
    "frozen norms thaw": (
        lambda s, x, *o: right(Thawed(s), x, *o),
        "output in train mode with norms in eval mode differs",
    ),
    "dropout gone": (
        lambda s, x, *o: right(Without(s), x, *o),
        r"output in train mode .*has dropout rates \[\] instead of \[0\.5\]",
    ),
    "no gradient": (
        lambda s, x, *o: right(s, x, *o).detach() + 0 * right(s, x, *o),
        r"gradient of layer\.weight differs",
    ),
    "no graph": (lambda s, x, *o: right(s, x, *o).detach(), "no gradient passes through the smaller model"),
}


class Thawed:
    """A module's own parts, but for the mode of its norm."""

    def __init__(self, of: Does) -> None:
        self.layer, self.drop, self.norm = of.layer, of.drop, copy.copy(of.norm)
        self.norm.training = of.training


class Without:
    """A module's own parts, but for its dropout."""

    def __init__(self, of: Does) -> None:
        self.layer, self.norm, self.drop = of.layer, of.norm, lambda h: h


@pytest.mark.parametrize("name", FAULTS)
def test_what_another_call_or_mode_would_show(name: str) -> None:
    fault, text = FAULTS[name]
    trial = Trial(Does(right, fault), {}, UNCUT, (X, 0.5, X[0]), {}, None)
    small = same(trial)
    trial.check(copy.deepcopy(small), thorough=True)
    small.is_small = True
    with pytest.raises(ShrinkError, match=text):
        trial.check(small, thorough=True)


def test_a_number_of_positions_baked_in_is_found_by_another_length() -> None:
    class Reads(nn.Module):
        def __init__(self, length: int | None = None) -> None:
            super().__init__()
            self.layer, self.length = nn.Linear(4, 3), length

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / (self.length or x.shape[1])

    trial = Trial(Reads(), {}, UNCUT, (torch.randn(2, 6, 4),), {}, None)
    small = same(trial)
    trial.check(small, thorough=True)
    small.length = 6
    trial.check(small)
    with pytest.raises(ShrinkError, match="output for sizes of 3 in place of 6 differs"):
        trial.check(small, thorough=True)


def test_what_the_masked_model_does_not_take_is_not_tried() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.asked = nn.Linear(4, 3), list[tuple[Any, ...]]()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.asked.append((*x.shape, scale))
            if x.shape != (2, 6, 4) or scale != 1.0:
                raise ValueError("the example alone")
            return self.layer(x)

    trial = Trial(Insists(), {}, UNCUT, (torch.randn(2, 6, 4),), {}, None)
    small = same(trial)
    small.asked = []
    trial.check(small, thorough=True)
    assert set(small.asked) == {(2, 6, 4, 1.0)}
    assert not trial.further


def test_dropout_of_attention_is_asked_for_wherever_it_is_called() -> None:
    attention = nn.MultiheadAttention(4, 2, dropout=0.25, batch_first=True)
    trial = Trial(attention, {}, UNCUT, (X[None], X[None], X[None]), {}, None)
    assert trial.trained is not None
    assert trial.trained.dropped == [0.25]
    assert trial.expected.dropped == []
    assert not trial.is_random()


def test_what_is_not_proved_is_built_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "__init__", lambda *_: pytest.fail("tried"))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=X)
    small = fp.shrink(model, X, verify=False)
    assert small[0].out_features == 3
    assert torch.allclose(model(X), small(X))


def test_functions_without_a_signature_are_called_as_they_are() -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) ** 2 + 2 ** self.layer(x)

    trial_of(Powers())


def test_the_gradients_of_one_sample_are_right_where_torch_mixes_up_layouts() -> None:
    """Attention over the tokens of a batch norm: torch's own gradient is wrong, and other widths by other numbers."""

    class Tokens(nn.Module):
        def __init__(self, norm: Callable[[nn.BatchNorm2d, Tensor], Tensor]) -> None:
            super().__init__()
            self.norm, self.of = nn.BatchNorm2d(3), norm

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.of(self.norm, x).flatten(2)
            return (tokens.mT @ tokens).softmax(-1) @ tokens.mT

    def by_hand(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if t is not None
        )
        return (x - mean) / (var + norm.eps).sqrt() * weight + bias

    x = torch.randn(1, 3, 4, 5)
    trial = trial_of(Tokens(lambda norm, x: norm(x)), x)
    gradients = trial.learning.masked.gradients
    trial.model.of = by_hand
    expected = trial.learning._gradients_of(trial.model)
    assert expected is not None
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-12, atol=1e-12), name


class InFloat32(nn.Module):
    """Attention whose code divides by the width that it sees, after an embedding that is float32 whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x + self.embed(torch.arange(8).float() / 8)).chunk(3, -1)
        weights = (0.003 * q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out(weights @ v)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_a_model_that_is_float32_inside_is_held_to_what_rounding_does_to_it(sparsity: float) -> None:
    """A scale of attention that is a little off moves outputs by less than a wide tolerance allows."""
    torch.manual_seed(0)
    model, x = InFloat32().eval(), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        copy.deepcopy(model).double()(x.double())
    fp.global_prune(model, "magnitude", sparsity, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert small.qkv.out_features < 24
    assert relative_error(model(x), small(x)) < 2e-6
