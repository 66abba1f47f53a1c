"""Every measure as a torch pruning method.

By its class, by its function, inside torch's own functions, on top of each other.
"""

import re

import cases
import oracles
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.scoring import measure_lookup

CAMEL = {name: "".join(part.capitalize() for part in name.split("_")) for name in fp.MEASURES}
FROM_MODULE = [name for name in fp.MEASURES if set(measure_lookup.needs(name)) <= {"theta", "g"}]
FROM_FLOW = [name for name in fp.MEASURES if not set(measure_lookup.needs(name)) <= {"theta", "g", "generator"}]
CUTS = {"Unstructured": lambda t: t.reshape(-1, 1), "Structured": lambda t: t.flatten(1)}


def layer():
    """A convolution after a backward pass."""
    model, (x, y) = cases.cnn(), CASES["cnn"].batch(6)
    F.cross_entropy(model(x), y).backward()
    return model[3]


def method(name, kind):
    return getattr(fp, CAMEL[name] + kind), getattr(fp, f"{name}_{kind.lower()}")


def expected_mask(scores, k, kind, shape):
    (keep,) = oracles.lowest([scores], k)
    return keep.view(shape) if kind == "Unstructured" else keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("name", FROM_MODULE)
def test_what_a_module_holds_is_enough_for_some(name, kind):
    """The weight and .grad are read where no scores are given; class and function do the same."""
    module, other = layer(), layer()
    weight, grad = module.weight.detach().clone(), module.weight.grad.clone()
    rows = [CUTS[kind]({"theta": weight, "g": grad}[read]) for read in measure_lookup.needs(name)]
    scores = oracles.PAPER[name](*rows)
    cls, function = method(name, kind)
    k = round(0.5 * len(scores))
    made = cls.apply(module, "weight", 0.5)
    assert isinstance(made, cls)
    assert function(other, "weight", amount=k) is other
    for one in (module, other):
        assert torch.equal(one.weight_mask, expected_mask(scores, k, kind, weight.shape))
        assert prune.is_pruned(one)
    prune.remove(module, "weight")
    assert torch.equal(module.weight == 0, ~other.weight_mask)


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("name", [*FROM_MODULE, *FROM_FLOW])
@pytest.mark.parametrize("shaped", [False, True])
def test_given_scores_are_used_as_they_are(name, kind, shaped):
    """Signed: the lowest go, whatever the measure. One score a weight is summed over the slice."""
    module = layer()
    shape = module.weight.shape
    scores = torch.randn(shape if shaped or kind == "Unstructured" else shape[0], dtype=torch.float64) * 100
    units = scores.flatten() if kind == "Unstructured" else scores.flatten(1).sum(1) if shaped else scores
    cls, function = method(name, kind)
    cls.apply(module, "weight", 1, importance_scores=scores)
    assert torch.equal(module.weight_mask, expected_mask(units, 1, kind, shape))
    other = layer()
    function(other, "weight", 1, importance_scores=scores)
    assert torch.equal(other.weight_mask, module.weight_mask)


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("name", FROM_FLOW)
def test_the_others_show_the_call_that_computes_scores(name, kind):
    module, (cls, _) = layer(), method(name, kind)
    word = "weight" if kind == "Unstructured" else "filter"
    missing = ", ".join(sorted(set(measure_lookup.needs(name)) - {"theta", "g", "generator"}))
    with pytest.raises(ValueError, match=rf"{cls.__name__} needs {missing}, which a module does not hold") as error:
        cls.apply(module, "weight", 0.5)
    assert f"scores = fp.scores(model, {name!r}, data=loader, granularity={word!r})" in str(error.value)
    assert f"fp.global_prune(model, {name!r}, sparsity, granularity={word!r}, data=loader)" in str(error.value)
    assert not prune.is_pruned(module)
    assert type(module) is nn.Conv2d


@pytest.mark.parametrize("kind", CUTS)
def test_a_gradient_that_is_not_there(kind):
    module = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match=f"Taylor{kind} reads .grad, which is None for 'weight': run loss.backward\\(\\) before"
    ):
        method("taylor", kind)[0].apply(module, "weight", 0.5)


def test_the_way_out_works_as_it_stands():
    """What the error says to write."""
    model, loader = cases.cnn(), CASES["cnn"].batches((4, 3))
    scores = fp.scores(model, "gradient_norm_increase", data=loader, granularity="filter")
    fp.GradientNormIncreaseStructured.apply(model[3], "weight", 1, importance_scores=scores["3.weight"])
    assert torch.equal(model[3].weight_mask, expected_mask(scores["3.weight"], 1, "Structured", model[3].weight.shape))


def test_amounts_are_of_what_is_left():
    module = nn.Linear(10, 10)
    for amount, left in ((0.2, 80), (0.2, 64), (4, 60), (0.5, 30)):
        fp.magnitude_unstructured(module, "weight", amount)
        assert int(module.weight_mask.sum()) == left


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_any_axis(dim):
    module = nn.Conv2d(4, 5, 3)
    weight = module.weight.detach().clone()
    fp.l1_structured(module, "weight", 2, dim=dim)
    sums = weight.abs().movedim(dim, 0).flatten(1).sum(1)
    gone = ~module.weight_mask.movedim(dim, 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1))
    assert sorted(gone.all(1).nonzero().flatten().tolist()) == sorted(sums.argsort()[:2].tolist())


@pytest.mark.parametrize("kind", CUTS)
def test_random(kind):
    masks = []
    for seed in (1, 1, 2):
        module = nn.Linear(30, 30)
        method("random", kind)[1](module, "weight", 0.5, generator=torch.Generator().manual_seed(seed))
        masks.append(module.weight_mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_in_torchs_global_unstructured_without_scores():
    """Measures of the weights alone need none, as L1Unstructured does not."""
    ours, torchs = cases.mlp(), cases.mlp()
    pairs = lambda model: [(model[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(pairs(ours), fp.MagnitudeUnstructured, amount=0.4)
    prune.global_unstructured(pairs(torchs), prune.L1Unstructured, amount=0.4)
    assert all(torch.equal(ours[i].weight, torchs[i].weight) for i in (0, 2, 4))


def test_in_torchs_global_unstructured_a_gradient_measure_needs_scores():
    model = cases.mlp()
    with pytest.raises(ValueError, match="TaylorUnstructured reads more than the weights. Compute scores first"):
        prune.global_unstructured([(model[0], "weight")], fp.TaylorUnstructured, amount=0.4)


@pytest.mark.parametrize("first", ["ours", "torchs"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("unstructured", "unstructured"),
        ("structured", "unstructured"),
        ("unstructured", "structured"),
        ("structured", "structured"),
    ],
)
def test_under_and_over_torchs_own(first, kinds):
    """Each removes its share of what the other has left, and remove makes both permanent."""
    module = nn.Linear(8, 8)
    weight = module.weight.detach().clone()

    def apply(whose, kind):
        if kind == "structured":
            args = {"n": 1, "dim": 0} if whose == "torchs" else {"dim": 0}
            (prune.ln_structured if whose == "torchs" else fp.l1_structured)(module, "weight", amount=2, **args)
        else:
            (prune.l1_unstructured if whose == "torchs" else fp.l1_unstructured)(module, "weight", amount=10)

    masks = []
    for whose, kind in zip((first, "torchs" if first == "ours" else "ours"), kinds, strict=True):
        apply(whose, kind)
        masks.append(module.weight_mask.bool().clone())
        assert torch.equal(module.weight, weight * masks[-1])
    assert (masks[1] <= masks[0]).all()
    if kinds == ("unstructured", "unstructured"):
        assert int((~masks[1]).sum()) == 20
    if kinds == ("structured", "structured"):
        assert int((~masks[1]).all(1).sum()) == 4
    prune.remove(module, "weight")
    assert torch.equal(module.weight, weight * masks[1])
    if first == "ours":  # where torch came first it has moved the weight behind the bias already
        assert list(module._parameters) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("wieght", 0.5), {}, ValueError, "Linear has no parameter 'wieght'; its parameters are ['weight', 'bias']"),
        (("weight", 1.5), {}, ValueError, "amount=1.5 should be from 0.0 to 1.0"),
        (
            ("weight", 17),
            {},
            ValueError,
            "amount=17 units should be pruned: expected 0 to 16, the number of units left to prune",
        ),
        (
            ("weight", "half"),
            {},
            TypeError,
            "amount should be a fraction of what is left (float) or a number of units (int), got 'half'",
        ),
        (
            ("weight", 0.5),
            {"importance_scores": torch.ones(3, 3)},
            ValueError,
            "importance_scores of 'weight' should have shape (4, 4) or (16,), got (3, 3)",
        ),
        (
            ("weight", 0.5),
            {"importance_scores": torch.full((4, 4), float("nan"))},
            ValueError,
            "importance_scores of 'weight' hold nan",
        ),
    ],
)
def test_bad_arguments_leave_the_module_alone(arguments, options, error, text):
    module = nn.Linear(4, 4)
    before = dict(module.__dict__)
    with pytest.raises(error, match=re.escape(text)):
        fp.magnitude_unstructured(module, *arguments, **options)
    assert type(module) is nn.Linear
    assert list(module._parameters) == ["weight", "bias"]
    assert not module._forward_pre_hooks
    assert dict(module.__dict__).keys() == before.keys()


@pytest.mark.parametrize("granularity", ["2:4", "1:2"])
def test_scores_of_units_in_another_order_are_refused(granularity, tmp_path):
    """Blocks run along the inputs of a kernel, so that scores one by one do not lie as its weights do."""
    conv = nn.Conv2d(4, 2, 3)
    scores = fp.scores(conv, granularity=granularity)
    scores.save(tmp_path / "scores.safetensors")
    for given in (scores["weight"], dict(scores)["weight"], fp.Scores.load(tmp_path / "scores.safetensors")["weight"]):
        with pytest.raises(ValueError, match=f"importance_scores of 'weight' are of units '{granularity}'"):
            fp.MagnitudeUnstructured.apply(conv, "weight", 36, importance_scores=given)
    assert not prune.is_pruned(conv)
    fp.MagnitudeUnstructured.apply(conv, "weight", 36, importance_scores=fp.scores(conv)["weight"])
    assert int((conv.weight == 0).sum()) == 36


@pytest.mark.parametrize("dim", [1.0, None, True, "0"])
def test_an_axis_that_is_no_number(dim):
    with pytest.raises(TypeError, match="dim should be an int, the axis whose slices are pruned, got"):
        fp.magnitude_structured(nn.Linear(4, 4), "weight", 0.5, dim=dim)


def test_gradients_that_are_not_finite():
    module = nn.Linear(2, 2)
    module.weight.grad = torch.full((2, 2), float("inf"))
    with pytest.raises(
        ValueError, match="the scores of 'weight' are not all finite: its weights or gradients hold nan or inf"
    ):
        fp.taylor_unstructured(module, "weight", 0.5)


def with_nan():
    module = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.arange(1.0, 17).view(4, 4))
        module.weight[0, 3] = module.weight[2, 2] = float("nan")
    return module


NAN = {
    "global_unstructured": lambda m: prune.global_unstructured([(m, "weight")], fp.MagnitudeUnstructured, amount=3),
    "given to global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], fp.TaylorUnstructured, {(m, "weight"): m.weight.detach()}, amount=3
    ),
    "compute_mask": lambda m: fp.L1Structured(1).compute_mask(m.weight.detach(), torch.ones(4, 4)),
    "compute_mask of scores": lambda m: fp.FisherUnstructured(1).compute_mask(m.weight.detach(), torch.ones(4, 4)),
}


@pytest.mark.parametrize("call", NAN.values(), ids=NAN)
def test_nan_is_refused_through_torchs_own_entry_too(call):
    module = with_nan()
    with pytest.raises(ValueError, match=r"what \w+ ranks by is nan in places, and cannot be ranked"):
        call(module)
    assert "weight" in module._parameters
    assert not prune.is_pruned(module)


def test_nan_under_the_mask_is_no_matter():
    module, mask = with_nan(), torch.ones(4, 4)
    mask[0, 3] = mask[2, 2] = 0
    found = fp.MagnitudeUnstructured(2).compute_mask(module.weight.detach(), mask)
    assert (found == 0).nonzero().tolist() == [[0, 0], [0, 1], [0, 3], [2, 2]]


@pytest.mark.parametrize("base", [prune.L1Unstructured, fp.MagnitudeUnstructured, fp.TaylorStructured])
def test_a_subclass_chooses_by_its_own_compute_mask(base):
    class FirstRow(base):
        def compute_mask(self, t, default_mask):
            mask = default_mask.clone()
            mask[0] = 0
            return mask

    module = nn.Linear(3, 3)
    FirstRow.apply(module, "weight", 1)
    assert torch.equal(module.weight == 0, torch.tensor([[True] * 3, [False] * 3, [False] * 3]))


def test_the_way_out_names_the_axis_of_the_outputs():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(3))
    batch = (torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
    model(batch[0])
    with pytest.raises(ValueError, match=r"importance_scores=scores\['layer.weight'\], dim=1; or prune"):
        fp.GradientNormIncreaseStructured.apply(model[1], "weight", 2)
    scores = fp.scores(model, "gradient_norm_increase", batch, granularity="filter")["1.weight"]
    fp.GradientNormIncreaseStructured.apply(model[1], "weight", 2, importance_scores=scores, dim=1)
    gone = (~model[1].weight_mask).all(dim=0).flatten()
    assert sorted(gone.nonzero().flatten().tolist()) == sorted(scores.argsort()[:2].tolist())


def test_scores_of_filters_along_another_axis_are_refused():
    """Of a square transposed convolution they fit both axes, and cut its inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3))
    scores = fp.scores(model, "magnitude", granularity="filter")
    with pytest.raises(ValueError, match=r"are of its filters, the slices along axis 1, .* along dim=0: pass dim=1"):
        fp.MagnitudeStructured.apply(model[1], "weight", 2, importance_scores=scores["1.weight"])
    assert not prune.is_pruned(model)
    fp.MagnitudeStructured.apply(model[1], "weight", 2, dim=1, importance_scores=scores["1.weight"])
    fp.MagnitudeStructured.apply(model[0], "weight", 2, importance_scores=scores["0.weight"])
    gone = [i for i in range(8) if not model[1].weight_mask[:, i].any()]
    assert gone == sorted(scores["1.weight"].argsort()[:2].tolist())


@pytest.mark.parametrize("kind", [fp.MagnitudeUnstructured, fp.L1Unstructured, fp.TaylorUnstructured])
def test_the_prune_of_a_tensor_uses_given_scores_signed(kind):
    scores = torch.tensor([[-5.0, 1.0], [2.0, 3.0]])
    pruned = kind(1).prune(torch.ones(2, 2), importance_scores=scores)
    assert torch.equal(pruned, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    twice = kind(1).prune(torch.ones(2, 2), (pruned != 0).float(), scores)
    assert torch.equal(twice, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(fp.L1Unstructured(1).prune(scores), torch.tensor([[-5.0, 0.0], [2.0, 3.0]]))
    with pytest.raises(ValueError, match=r"importance_scores should have the tensor's shape \(2, 2\), got \(4,\)"):
        kind(1).prune(torch.ones(2, 2), importance_scores=torch.ones(4))
