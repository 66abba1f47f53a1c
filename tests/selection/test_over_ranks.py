"""The k lowest of scores that lie on several ranks are those of one machine, bit for bit: ranks are threads here."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_threads

from torch_flowprune.inputs import Box, HeldUnits
from torch_flowprune.scoring import measures
from torch_flowprune.scoring.stacked import Computed
from torch_flowprune.selection.ranking import digit_search, lowest, lowest_of_each, over_ranks, with_floors
from torch_flowprune.selection.ranking.digit_search import KEY_BITS, key_of, keys_of, kth_of_each, value_of

KINDS = {
    "plain": lambda n, g: torch.randn(n, generator=g),
    "ties": lambda n, g: torch.randint(0, 4, (n,), generator=g).float(),
    "one value": lambda n, g: torch.zeros(n),
    "infinities": lambda n, g: torch.randn(n, generator=g).masked_fill(torch.rand(n, generator=g) < 0.3, inf).neg(),
    "zeros of both signs": lambda n, g: torch.randn(n, generator=g).round(),
    "subnormal": lambda n, g: torch.randn(n, generator=g) * 1e-43,
    "half": lambda n, g: torch.randn(n, generator=g).bfloat16(),
    "double": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
    "whole": lambda n, g: torch.randint(-(1 << 30), 1 << 30, (n,), generator=g),
}
WAYS = ("rows", "columns", "replicas", "pipeline", "one")


def portion(way, rank, size, i, shape, ranks):
    """What a rank has of a layer: uneven, and of some layers nothing."""
    rows, columns = shape
    counts, box = True, Box((0, 0), shape)
    if way == "replicas":
        counts, size, rank = rank < 2, 2, rank % 2
    if way in ("rows", "replicas"):
        step = -(-rows // size)
        box = Box((min(rows, rank * step), 0), (max(0, min(step, rows - rank * step)), columns))
    elif way == "columns":
        step = -(-columns // size)
        box = Box((0, min(columns, rank * step)), (rows, max(0, min(step, columns - rank * step))))
    elif (way == "pipeline" and i % size != rank) or (way == "one" and rank != size - 1):
        box = Box((0, 0), (0, columns))
    return HeldUnits(shape, box, counts, ranks)


def layers(draw, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = [(draw(st.sampled_from([1, 2, 3, 7, 64])), draw(st.sampled_from([1, 3, 8, 300]))) for _ in range(4)]
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    scores = [kind(rows * columns, g) for rows, columns in shapes]
    alive = [None if i % 2 else torch.rand(len(one), generator=g) < 0.8 for i, one in enumerate(scores)]
    return shapes, scores, alive


def parts_of(rank_s, way, shapes, scores, alive):
    held = [portion(way, rank_s.rank, rank_s.size, i, shape, rank_s) for i, shape in enumerate(shapes)]
    own = [one.part(values) for one, values in zip(held, scores, strict=True)]
    flags = [None if some is None else one.part(some) for one, some in zip(held, alive, strict=True)]
    return own, flags, held


def check(cut, expected, held):
    assert [torch.equal(keep, one.part(whole)) for keep, one, whole in zip(cut.keep, held, expected.keep, strict=True)]
    for keep, one, whole in zip(cut.keep, held, expected.keep, strict=True):
        assert torch.equal(keep, one.part(whole))
    assert (cut.kept, cut.threshold, cut.tied) == (expected.kept, expected.threshold, expected.tied)


@settings(max_examples=60)
@given(st.data(), st.integers(0, 1000))
def test_masks_counts_threshold_and_ties_are_those_of_one_machine(data, seed):
    shapes, scores, alive = layers(data.draw, seed)
    way, size = data.draw(st.sampled_from(WAYS)), data.draw(st.sampled_from([2, 4]))
    candidates = sum(len(one) if some is None else int(some.sum()) for one, some in zip(scores, alive, strict=True))
    k = data.draw(st.sampled_from(sorted({0, 1, candidates // 3, candidates // 2, candidates - 1, candidates})))
    k = min(max(k, 0), candidates)
    expected = lowest(scores, k, alive)

    def work(ranks):
        own, flags, held = parts_of(ranks, way, shapes, scores, alive)
        return lowest(own, k, flags, held), held

    for found in on_threads(size, work):
        check(*found[:1], expected, found[1])


@settings(max_examples=40)
@given(st.data(), st.integers(0, 1000))
def test_each_layer_by_itself_and_floors(data, seed):
    shapes, scores, alive = layers(data.draw, seed)
    way = data.draw(st.sampled_from(WAYS))
    counts = [len(one) if some is None else int(some.sum()) for one, some in zip(scores, alive, strict=True)]
    ks = [data.draw(st.integers(0, count)) for count in counts]
    floors = [count // 3 for count in counts]
    k = sum(counts) // 2
    each, floored = lowest_of_each(scores, ks, alive), with_floors(scores, k, floors, alive)

    def work(ranks):
        own, flags, held = parts_of(ranks, way, shapes, scores, alive)
        return lowest_of_each(own, ks, flags, held), with_floors(own, k, floors, flags, held), held

    for found_each, found_floored, held in on_threads(3, work):
        for cut, expected, one in zip(found_each, each, held, strict=True):
            check(cut, expected, [one])
        check(found_floored, floored, held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ["apart", "tied"])
def test_what_is_sent_does_not_grow_with_the_model(dtype, values):
    """At most 14 sums and 0.3 MB in float32, where the sample leads to the k-th, and where it does not."""
    seen = []
    for rows in (64, 4096):
        scores = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0), dtype=dtype).flatten()
        scores = scores.clamp(min=0) if values == "tied" else scores

        def work(ranks, rows=rows, scores=scores):
            held = [portion("rows", ranks.rank, ranks.size, 0, (rows, 64), ranks)]
            cut = lowest([held[0].part(scores)], len(scores) // 4, None, held)
            return cut, held, ranks.calls, ranks.bytes

        for cut, held, calls, sent in on_threads(4, work):
            check(cut, lowest([scores], len(scores) // 4), held)
            seen.append((calls, sent))
    assert max(calls for calls, _ in seen) <= (14 if dtype is torch.float32 else 18)
    assert max(sent for _, sent in seen) <= (300_000 if dtype is torch.float32 else 400_000)


def test_a_score_that_is_not_finite_on_one_rank_is_an_error_on_all():
    weights = torch.ones(8, 4)
    weights[5, 2] = torch.nan

    def work(ranks):
        held = portion("rows", ranks.rank, ranks.size, 0, (8, 4), ranks)
        rows = held.part(weights).unsqueeze(1)
        scores = Computed("fc.weight", "magnitude", measures.magnitude, ("theta",), lambda _: rows)
        return lowest([scores], 4, None, [held])

    errors = on_threads(4, work)
    assert [str(error) for error in errors] == [str(errors[0])] * 4
    assert "magnitude scores of fc.weight are not all finite" in str(errors[0])


def test_too_many_are_an_error_on_all_ranks():
    def work(ranks):
        held = [portion("rows", ranks.rank, ranks.size, 0, (3, 1), ranks)]
        return lowest([held[0].part(torch.arange(3.0))], 4, None, held)

    assert {str(error) for error in on_threads(4, work)} == {"4 units cannot be pruned: there are 3 to choose from"}


@settings(max_examples=60)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=30))
def test_keys_are_in_the_order_of_the_numbers_and_lead_back(numbers):
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor(numbers, dtype=dtype)
        keys = [key % (1 << KEY_BITS[dtype]) for key in keys_of(values).tolist()]
        assert sorted(range(len(keys)), key=lambda i: keys[i]) == values.argsort(stable=True).tolist()
        assert [value_of(key, dtype) for key in keys] == values.tolist()
        assert [key_of(value, dtype) for value in values.tolist()] == keys


@pytest.mark.parametrize("pools", [1, 3, 700])
def test_many_pools_are_searched_by_narrower_digits(pools, monkeypatch):
    monkeypatch.setattr(digit_search, "_WIDEST_DIGIT", 5)
    g = torch.Generator().manual_seed(1)
    numbers = [torch.randint(0, 1 << 20, (50,), generator=g) for _ in range(pools)]
    ks = [1 + i % 50 for i in range(pools)]

    def work(ranks):
        own = [one[ranks.rank :: ranks.size] for one in numbers]
        return kth_of_each([lambda one=one: [one] for one in own], ks, 20, ranks)

    for found in on_threads(2, work):
        for one, k, result in zip(numbers, ks, found, strict=True):
            value = int(one.sort().values[k - 1])
            assert (result.value, result.below) == (value, int((one < value).sum()))
            assert result.equal == int((one == value).sum())


def test_layers_are_searched_together_up_to_a_size(monkeypatch):
    monkeypatch.setattr(over_ranks, "_TOGETHER", 10)
    assert list(over_ranks._batches([4, 6, 1, 20, 3, 3])) == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 4),
        slice(4, 6),
    ]
