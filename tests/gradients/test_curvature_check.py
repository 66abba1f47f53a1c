"""Operators that cannot be trusted twice are found by a difference of gradients."""

import warnings

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.operators import double_backward, one_sample_norms


class Hidden(torch.autograd.Function):
    """x², whose backward reads a detached x: right once, wrong twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.x * dy


class Square(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def net(function):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), Square(function), nn.Linear(6, 4))


def batches(count, size=3):
    torch.manual_seed(1)
    return [(torch.randn(size, 5), torch.randint(4, (size,))) for _ in range(count)]


WARNING = r"H·g is not the change of g along g: off by \d+%, most in .*weight"


@pytest.mark.parametrize("count", [1, 3])
def test_a_hidden_dependence_is_named(count):
    with pytest.warns(UserWarning, match=WARNING):
        fp.flow(net(Hidden.apply), batches(count), check=True)


def test_by_default_where_it_costs_little():
    with pytest.warns(UserWarning, match=WARNING):
        fp.scores(net(Hidden.apply), "grasp", batches(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(net(Hidden.apply), batches(15))
        fp.flow(net(Hidden.apply), batches(16), check=False)
        fp.flow(net(Hidden.apply), batches(16), needs=("g",), check=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sound_models_pass(mode, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).to(dtype)
    data = [(torch.randn(4, 2, 6, 6, dtype=dtype), torch.randint(4, (4,))) for _ in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fp.flow(model, data, mode=mode, check=True)  # a warning would be an error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype is before[name].dtype for name, value in model.state_dict().items())


def in_few_digits(x):
    """As the norms of language models compute, whatever they are given."""
    x = x.to(torch.float32)
    scaled = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.softmax(scaled, -1, dtype=torch.float32) * 6


class Rounded(torch.autograd.Function):
    """Rounds to float32 where no function of torch is asked to."""

    @staticmethod
    def forward(x):
        return torch.from_numpy(x.detach().numpy().astype("float32")).to(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize("function", [in_few_digits, lambda x: Rounded.apply(x).tanh()], ids=["told to", "by itself"])
def test_code_that_computes_in_float32_is_no_fault(function):
    """A difference over such a small step is then all rounding."""
    fp.flow(net(function), batches(16))
    fp.flow(net(function), batches(2), check=True)


def test_a_hidden_dependence_is_found_beside_code_in_float32():
    with pytest.warns(UserWarning, match=WARNING):
        fp.flow(net(lambda x: Hidden.apply(in_few_digits(x).to(x))), batches(2), check=True)


EYE = torch.eye(6)


def test_code_fixed_to_a_dtype_is_left_out_unless_asked_for():
    model = net(lambda x: x @ EYE)
    fp.flow(model, batches(16))
    with pytest.raises(RuntimeError, match="check=True runs the model in float64, where it fails"):
        fp.flow(model, batches(16), check=True)


class Stem(nn.Module):
    """A convolution's channels as tokens, as hybrid transformers have them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.mix, self.out = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        return self.out(self.mix(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).tanh().mean(1))


class InPlace(nn.Module):
    """What is written is read, and what is returned is not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.a(x)
        nn.functional.hardsigmoid(h, inplace=True)
        return self.b(h)


def without_guard_of_norms(patch):
    patch.setattr(one_sample_norms, "_layouts_are_mixed_up", lambda: False)
    patch.delitem(double_backward._SUBSTITUTES, nn.functional.batch_norm)


def without_the_write(patch):
    lost = lambda x, inplace=False: nn.functional.relu6(x + 3) / 6
    for function, substitute in [*double_backward._SUBSTITUTES.items()]:
        if "hardsigmoid" in str(substitute):
            patch.setitem(double_backward._SUBSTITUTES, function, lost)


def without_the_formula(patch):
    patch.delitem(double_backward._SUBSTITUTES, double_backward.fused_weight_norm)


FAULTS = {
    "layouts of one sample": (Stem, (3, 6, 6), without_guard_of_norms),
    "a write in place that is lost": (InPlace, (5,), without_the_write),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4)),
        (5,),
        without_the_formula,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_there_were_would_have_been_found(name):
    """Each is put right elsewhere: taken out, the check says so; with it, nothing."""
    torch.manual_seed(0)
    build, shape, take_out = FAULTS[name]
    model = build().train()
    model(torch.randn(8, *shape))
    model.eval()
    data = 2 * torch.randn(1, *shape), torch.randint(4, (1,))
    fp.flow(model, data, check=True)
    with pytest.MonkeyPatch.context() as patch:
        take_out(patch)
        with pytest.warns(UserWarning, match=r"H·g is not the change of g along g: off by \d+%"):
            fp.flow(model, data, check=True)


class TiedTokens(nn.Module):
    """The table of embeddings is the output's weight, its row of padding among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.mix = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4)
        self.double()
        nn.init.normal_(self.rows.weight)

    def forward(self, ids):
        return self.read(self.rows(ids))

    def read(self, h):
        return self.mix(h).tanh().sum(1) @ self.rows.weight.mT


def test_the_row_of_padding_stands_still_as_a_lookup_reads_it():
    """As in training: g is of the loss with that row for a constant there, and H·g its derivative."""
    model, ids, y = TiedTokens(), torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]]), torch.tensor([1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fp.flow(model, (ids, y), check=True)
    here, row = (ids == 0).unsqueeze(-1), model.rows.weight[0].detach()
    parameters = list(model.parameters())
    looked_up = torch.where(here, row, model.rows.weight[ids])
    loss = F.cross_entropy(model.read(looked_up), y)
    g = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(g, parameters, [value.detach() for value in g])
    for kind, expected in (("g", g), ("Hg", product)):
        oracles.assert_named_close(getattr(found, kind), dict(zip(found.theta, expected, strict=True)), 1e-12)
