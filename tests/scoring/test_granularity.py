"""Rows out, masks back: every cut against plain indexing."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import prunable
from torch_flowprune.scoring.granularity import GroupedOutputs, alive, parse_granularity

SHAPES = [(6,), (4, 8), (4, 8, 3), (4, 8, 3, 2), (2, 4, 2, 1, 3)]
CUTS = {
    "weights": fp.Weights(),
    "dim 0": fp.Slices(0),
    "dim 1": fp.Slices(1),
    "last dim": fp.Slices(-1),
    "2:4": fp.Blocks(2, 4),
}


def fits(cut, shape):
    if isinstance(cut, fp.Slices):
        return -len(shape) <= cut.dim < len(shape)
    return not isinstance(cut, fp.Blocks) or cut.fits(torch.Size(shape))


CASES = [
    pytest.param(cut, shape, id=f"{name}-{shape}") for name, cut in CUTS.items() for shape in SHAPES if fits(cut, shape)
]


@pytest.mark.parametrize(("cut", "shape"), CASES)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "strided"])
def test_a_units_mask_covers_exactly_its_row(cut, shape, permuted):
    """Number the weights; what the mask of one unit removes must be the numbers in its row.

    Together the units are the whole.
    """
    numbered = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    if permuted:
        numbered = numbered.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    rows = cut.rows(numbered)
    assert sorted(rows.flatten().tolist()) == list(range(numbered.numel()))
    for unit, row in enumerate(rows):
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[unit] = False
        mask = cut.mask(keep, torch.Size(shape))
        assert mask.shape == numbered.shape
        assert mask.dtype is torch.bool
        assert sorted(numbered[~mask].tolist()) == sorted(row.tolist())


def test_slices_are_those_of_torch():
    """`ln_structured` removes whole slices: each is a unit, and its norm is the unit's score."""
    from torch.nn.utils import prune

    for dim in (0, 1, -1):
        layer = nn.Conv2d(6, 5, 3)
        weight = layer.weight.detach().clone()
        prune.ln_structured(layer, "weight", amount=2, n=2, dim=dim)
        other = nn.Conv2d(6, 5, 3)
        other.weight.data = weight
        fp.magnitude_structured(other, "weight", amount=2, dim=dim)
        assert torch.equal(layer.weight_mask.bool(), other.weight_mask)


def test_blocks_run_along_the_input_axis():
    weight = torch.zeros(2, 4, 1, 3)
    weight[1, :, 0, 2] = torch.arange(1, 5)
    rows = fp.Blocks(2, 4).rows(weight).view(-1, 4)
    assert [1.0, 2.0, 3.0, 4.0] in rows.tolist()
    assert fp.Blocks(2, 4).fits(torch.Size((3, 8)))
    assert not fp.Blocks(2, 4).fits(torch.Size((8, 3)))
    assert not fp.Blocks(2, 4).fits(torch.Size((8,)))


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[True, False], [False, False], [True, True]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])],
)
def test_a_unit_lives_while_one_weight_does(mask):
    assert alive(fp.Slices(0), mask).tolist() == [True, False, True]
    assert alive(fp.Slices(1), mask).tolist() == [True, True]
    assert alive(fp.Weights(), mask).tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("word", "module", "expected"),
    [
        ("weight", nn.Linear(2, 3), fp.Weights()),
        ("filter", nn.Linear(2, 3), fp.Slices(0)),
        ("filter", nn.Conv2d(2, 3, 1), fp.Slices(0)),
        ("filter", nn.ConvTranspose2d(2, 3, 1), fp.Slices(1)),
        ("filter", nn.MultiheadAttention(2, 1), fp.Slices(0)),
        ("2:4", nn.Linear(4, 3), fp.Blocks(2, 4)),
        ("1:16", nn.Linear(4, 3), fp.Blocks(1, 16)),
    ],
)
def test_words(word, module, expected):
    assert parse_granularity(word)(prunable(module)[0]) == expected


def test_ones_own_cut():
    target = prunable(nn.Linear(2, 3))[0]
    own = fp.Slices(1)
    assert parse_granularity(own)(target) is own
    assert parse_granularity(lambda target: fp.Slices(target.parameter.dim() - 1))(target) == fp.Slices(1)


@pytest.mark.parametrize(
    ("granularity", "error", "text"),
    [
        ("weights", ValueError, r"unknown granularity 'weights': expected 'weight', .*; did you mean 'weight'\?"),
        ("2:4:8", ValueError, "unknown granularity '2:4:8'"),
        ("4:2", ValueError, r"granularity '4:2' keeps 4 of 2: expected 0 < n < m, as in '2:4'"),
        ("0:4", ValueError, "granularity '0:4' keeps 0 of 4"),
        ("4:4", ValueError, "granularity '4:4' keeps 4 of 4"),
        (4, TypeError, "granularity should be 'weight', 'filter', .* got 4"),
    ],
)
def test_bad_words(granularity, error, text):
    with pytest.raises(error, match=text):
        parse_granularity(granularity)


@pytest.mark.parametrize("dim", [2, -3, 9])
def test_an_axis_that_is_not_there(dim):
    with pytest.raises(ValueError, match=rf"dim={dim} is not an axis of a tensor of shape \(4, 8\): expected -2 to 1"):
        fp.Slices(dim).rows(torch.zeros(4, 8))


@pytest.mark.parametrize("dim", [1, -2, 5])
def test_an_axis_that_a_vector_has_not(dim):
    with pytest.raises(ValueError, match=rf"dim={dim} is not an axis of a tensor of shape \(4,\)"):
        fp.Slices(dim).rows(torch.zeros(4))


def test_filters_of_a_transposed_convolution_in_groups_are_its_output_channels():
    """The weight is (inputs, outputs / groups, ...): a slice along the second axis would be an output of each group."""
    for groups, outputs in ((2, 4), (6, 6)):
        layer = nn.ConvTranspose2d(6, outputs, 3, groups=groups, bias=False)
        report = fp.global_prune(layer, "magnitude", 0.5, granularity="filter")
        assert (report.units, report.pruned) == (outputs, outputs // 2)
        y = layer(torch.randn(2, 6, 5, 5))
        assert int((y.abs().amax((0, 2, 3)) == 0).sum()) == outputs // 2
    weight = torch.randn(6, 2, 3, 3)
    cut = fp.scores(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), granularity="filter")["weight"]
    assert len(cut) == 4
    rows = GroupedOutputs(2).rows(weight)
    assert torch.equal(rows[3], weight[3:, 1].flatten())
    keep = torch.tensor([True, False, True, True])
    assert torch.equal(GroupedOutputs(2).rows(GroupedOutputs(2).mask(keep, weight.shape)).all(1), keep)


@pytest.mark.parametrize(
    ("of", "pruned"), [("weight", "2:4"), ("2:4", "weight"), ("filter", fp.Slices(1)), (fp.Slices(1), "filter")]
)
def test_scores_know_what_they_are_of(of, pruned):
    model = nn.Linear(8, 8)
    scores = fp.scores(model, "magnitude", granularity=of)
    with pytest.raises(ValueError, match="these scores are of units .*, and granularity=.* was asked for"):
        fp.global_prune(model, sparsity=0.5, scores=scores, granularity=pruned)
    assert not hasattr(model, "weight_mask")


def test_scores_of_slices_are_pruned_with_also_from_a_file(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Linear(6, 4)
    scores = fp.scores(model, "magnitude", granularity=fp.Slices(1))
    scores.save(tmp_path / "scores.safetensors")
    report = fp.global_prune(model, sparsity=0.5, scores=fp.Scores.load(tmp_path / "scores.safetensors"))
    assert (report.units, report.pruned) == (6, 3)
    assert (model.weight_mask.any(0).sum(), model.weight_mask.any(1).all()) == (3, True)
