"""The k lowest of many tensors, against one stable sort; also where the sampled bracket has to be right by itself.

Only the CPU is here: that scores on several devices compare as on one cannot be shown by these tests.
"""

import math

import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_flowprune.scoring import stacks
from torch_flowprune.selection.ranking import lowest_k, sampled_bracket
from torch_flowprune.selection.ranking.lowest_k import lowest, lowest_in_blocks, with_floors

examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
FEW = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 1e-30, 1e-12, 0.5, 1.0, 2.0, math.inf])
ANY = st.floats(width=16, allow_nan=False)


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    """Several tensors of one dtype, many ties, some empty, and which of them still live."""
    values = draw(st.lists(st.lists(FEW | ANY, max_size=12), min_size=1, max_size=5))
    dtype = draw(st.sampled_from(dtypes))
    scores = [torch.tensor(layer, dtype=dtype) for layer in values]
    alive = [
        torch.tensor(draw(st.lists(st.booleans(), min_size=len(layer), max_size=len(layer))), dtype=torch.bool)
        for layer in values
    ]
    return scores, draw(st.sampled_from([None, alive]))


@pytest.fixture(params=[1 << 16, 4], ids=["sorted", "bracketed"])
def _sample(request, monkeypatch):
    """The second forces the sampled bracket on small data: it is then often wrong, and must not matter."""
    monkeypatch.setattr(sampled_bracket, "_SMALLEST_SAMPLE", request.param)


def count(scores, alive):
    return sum(map(len, scores)) if alive is None else sum(int(left.sum()) for left in alive)


def check(scores, k, alive=None, floors=None):
    """The selection against the oracle, with the threshold and its ties read off what went and what stayed."""
    cut = lowest(scores, k, alive) if floors is None else with_floors(scores, k, floors, alive)
    assert_same(cut.keep, oracles.lowest(scores, k, alive, floors))
    alive = [None] * len(scores) if alive is None else alive
    gone = [
        v
        for s, keep, left in zip(scores, cut.keep, alive, strict=True)
        for v in s[~keep if left is None else left & ~keep].double().tolist()
    ]
    assert len(gone) == k
    assert cut.threshold == max(gone, default=None)
    if floors is None:
        stay = [v for s, keep in zip(scores, cut.keep, strict=True) for v in s[keep].double().tolist()]
        assert cut.tied == sum(value == cut.threshold for value in stay)
    return cut.keep


def assert_same(found, expected):
    assert [keep.dtype for keep in found] == [torch.bool] * len(expected)
    assert [keep.tolist() for keep in found] == [keep.tolist() for keep in expected]


@pytest.mark.usefixtures("_sample")
@examples
@given(layers(), st.data())
def test_lowest_is_a_stable_sort(case, data):
    scores, alive = case
    k = data.draw(st.integers(0, count(scores, alive)))
    keeps = check(scores, k, alive)
    assert count(scores, alive) - sum(int(keep.sum()) for keep in keeps) == k


@pytest.mark.usefixtures("_sample")
@examples
@given(layers(), st.data())
def test_more_nests_in_fewer(case, data):
    scores, alive = case
    few, many = sorted(data.draw(st.tuples(*[st.integers(0, count(scores, alive))] * 2)))
    at_once = lowest(scores, many, alive).keep
    stepwise = lowest(scores, many - few, lowest(scores, few, alive).keep).keep
    assert_same(stepwise, at_once)


@pytest.mark.usefixtures("_sample")
@examples
@given(layers(), st.data())
def test_floors_protect_the_best_of_each_layer(case, data):
    scores, alive = case
    floors = data.draw(st.lists(st.integers(0, 6), min_size=len(scores), max_size=len(scores)))
    left = [len(s) for s in scores] if alive is None else [int(a.sum()) for a in alive]
    removable = sum(max(0, n - floor) for n, floor in zip(left, floors, strict=True))
    k = data.draw(st.integers(0, removable))
    for keep, floor, n in zip(check(scores, k, alive, floors), floors, left, strict=True):
        assert keep.sum() >= min(floor, n)
    with pytest.raises(
        ValueError,
        match=rf"{removable + 1} units should be pruned, but min_keep leaves only {removable} of {sum(left)} "
        r"removable: lower min_keep",
    ):
        with_floors(scores, removable + 1, floors, alive)


def test_ties_are_counted_with_floors_too():
    assert with_floors([torch.zeros(4), torch.zeros(2)], 2, [1, 1]).tied == 4


@examples
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_blocks_lose_their_own_lowest(blocks, m, data):
    values = data.draw(st.lists(st.lists(FEW, min_size=m, max_size=m), min_size=blocks, max_size=blocks))
    k = data.draw(st.integers(0, m))
    left = data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=blocks, max_size=blocks))
    found = lowest_in_blocks(torch.tensor(values), k)
    assert_same(list(found), [oracles.lowest([row], k)[0] for row in torch.tensor(values)])
    pruned = lowest_in_blocks(torch.tensor(values), k, torch.tensor(left))
    for keep, row, alive in zip(pruned, torch.tensor(values), torch.tensor(left), strict=True):
        dead = int((~alive).sum())
        assert_same([keep], oracles.lowest([row], max(0, k - dead), [alive]))


def test_ties_in_long_blocks_go_in_model_order():
    """Of 16 units at most any sort is stable."""
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (6, 50), generator=source).float()
    alive = torch.rand(6, 50, generator=source) < 0.7
    for k in (1, 20, 35, 50):
        assert_same(list(lowest_in_blocks(scores, k)), [oracles.lowest([row], k)[0] for row in scores])
        for keep, row, left in zip(lowest_in_blocks(scores, k, alive), scores, alive, strict=True):
            assert_same([keep], oracles.lowest([row], max(0, k - int((~left).sum())), [left]))


@pytest.mark.parametrize("k", [-1, 4, 100])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"{k} units cannot be pruned: there are 3 to choose from"):
        lowest([torch.zeros(2), torch.ones(1)], k)
    with pytest.raises(ValueError, match="2 units cannot be pruned: there are 1 to choose from"):
        lowest([torch.zeros(3)], 2, [torch.tensor([False, True, False])])


def test_none_among_the_masks_means_all():
    keeps = lowest([torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])], 2, [None, torch.tensor([False, True])]).keep
    assert_same(keeps, [torch.tensor([True, False]), torch.tensor([False, False])])


def test_scores_of_any_shape_give_flat_flags():
    scores = torch.tensor([[3.0, 1.0], [0.0, 2.0]], requires_grad=True)
    for k in (0, 1, 2, 4):
        (keep,) = lowest([scores], k).keep
        assert keep.shape == (4,)
        assert_same([keep], oracles.lowest([scores.detach().flatten()], k))


def test_ties_go_in_model_order():
    keeps = lowest([torch.zeros(3), torch.zeros(4), torch.zeros(2)], 5).keep
    assert_same(keeps, [torch.zeros(3).bool(), torch.tensor([False, False, True, True]), torch.ones(2).bool()])


def test_minus_zero_ties_with_zero():
    """The two have different bits, which a radix sort would tell apart."""
    scores = torch.tensor([0.0, -0.0] * 40)
    (keep,) = lowest([scores], 41).keep
    assert keep.tolist() == [False] * 41 + [True] * 39


def test_tiny_scores_are_told_apart():
    """Scores of second derivatives at high temperatures are of this size; nothing compares them with a constant."""
    scores = torch.arange(100, 0, -1, dtype=torch.float32) * 1e-38
    (keep,) = lowest([scores], 30).keep
    assert keep.tolist() == [True] * 70 + [False] * 30
    (keep,) = lowest([scores.double() * 1e-200], 30).keep
    assert keep.tolist() == [True] * 70 + [False] * 30


def test_half_precision_and_single_precision_side_by_side():
    scores = [
        torch.tensor([1.0, 0.25], dtype=torch.bfloat16),
        torch.tensor([0.3, 2.0]),
        torch.tensor([0.2999999999], dtype=torch.float64),
    ]
    assert_same(
        lowest(scores, 2).keep, [torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([False])]
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_numbers_are_told_apart(dtype):
    """float32 would round both to 16777216."""
    assert_same(lowest([torch.tensor([16777217, 16777216], dtype=dtype)], 1).keep, [torch.tensor([True, False])])


N = 20_000
ADVERSARIES = {
    "constant": torch.zeros(N),
    "one heavy value": torch.cat([torch.full((N - 100,), 0.5), torch.linspace(0, 1, 100)]),
    "one heavy value first": torch.cat([torch.linspace(0, 1, 100), torch.full((N - 100,), 0.5)]),
    "periodic": (torch.arange(N) % 10).float(),  # every stride of the sample sees one phase only
    "periodic, one phase low": torch.where(
        torch.arange(N) % 10 == 0, torch.arange(N) * 1e-6 - 1, torch.arange(N) * 1e-6
    ),
    "periodic, one phase high": torch.where(
        torch.arange(N) % 10 == 0, torch.arange(N) * 1e-6 + 9, torch.arange(N) * 1e-6
    ),
    "two values": (torch.arange(N) % 3 == 0).float(),
    "rising": torch.arange(N).float(),
    "falling": -torch.arange(N).float(),
    "infinite ends": torch.cat(
        [
            torch.full((5000,), -math.inf),
            torch.randn(N - 10_000, generator=torch.Generator().manual_seed(0)),
            torch.full((5000,), math.inf),
        ]
    ),
    "all infinite": torch.full((N,), math.inf),
    "normal": torch.randn(N, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("sizes", [(N,), (7, 3 * N // 4, N - 7 - 3 * N // 4)], ids=["one tensor", "three"])
@pytest.mark.parametrize("sparse", [False, True], ids=["all alive", "few alive"])
def test_a_misleading_sample_does_not_matter(monkeypatch, name, sizes, sparse):
    monkeypatch.setattr(sampled_bracket, "_SMALLEST_SAMPLE", 2000)
    flat = ADVERSARIES[name]
    scores = list(flat.split(list(sizes)))
    left = (
        torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.3 if sparse else torch.ones(N, dtype=torch.bool)
    )
    alive = list(left.split(list(sizes))) if sparse else None
    candidates = int(left.sum())
    order = flat.masked_fill(~left, math.nan).sort(stable=True).indices  # nan comes last
    for k in (
        0,
        1,
        50,
        candidates // 10,
        candidates // 4 + 1,
        candidates // 2,
        candidates - 60,
        candidates - 1,
        candidates,
    ):
        expected = left.clone()
        expected[order[:k]] = False
        assert torch.equal(torch.cat(lowest(scores, k, alive).keep), expected), k


def test_a_value_is_where_the_cut_lies_only_if_one_of_its_ties_goes():
    """Else the highest that went is another score, and the bracket has to be looked for elsewhere."""
    laid = stacks([torch.tensor([3.0, 1.0, 3.0]), torch.tensor([2.0, 5.0])], [None, None])
    found = [lowest_k._cut_ties(laid, torch.float32, k, 3.0) for k in range(1, 6)]
    assert [cut and (cut.threshold, cut.tied, cut.kept) for cut in found] == [
        None,
        None,
        (3.0, 1, [1, 1]),
        (3.0, 0, [0, 1]),
        None,
    ]


def test_the_bracket_spares_the_sort(monkeypatch):
    """On ordinary scores the bracket holds, and only a small part is sorted."""
    monkeypatch.setattr(sampled_bracket, "_SMALLEST_SAMPLE", 2000)
    ranked, cut_between = [], lowest_k._cut_between
    monkeypatch.setattr(
        lowest_k, "_cut_between", lambda swept, k: ranked.append(len(swept.values)) or cut_between(swept, k)
    )
    lowest([ADVERSARIES["normal"]], N // 2)
    assert 0 < max(ranked) < N / 4


def test_a_million_scores():
    scores = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (600_000, 10, 400_000)]
    order = torch.cat(scores).sort(stable=True).indices
    for k in (1, 123_456, 900_000):
        expected = torch.ones(1_000_010, dtype=torch.bool)
        expected[order[:k]] = False
        assert torch.equal(torch.cat(lowest(scores, k).keep), expected)
