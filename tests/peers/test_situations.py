"""What libraries for pruning channels have to read: half of it goes, and what is left is what the masks made of it."""

import json

import pytest

from benchmarks.common.record import RESULTS
from benchmarks.models import peers
from benchmarks.models.situations import SITUATIONS

REFUSED = {"an orthogonal weight": "no channel can be pruned"}
"""With what the error says."""
COMPUTED = {"weight norm", "spectral norm", "an orthogonal weight"}


@pytest.mark.parametrize("name", SITUATIONS)
def test_half_of_the_channels_go(name):
    if name in REFUSED:
        outcome = peers.tried("this package", name)
        assert outcome["state"] == "refused"
        assert REFUSED[name] in outcome["said"]
    else:
        found = peers.this_package(name)
        assert found["state"] == "equal"
        assert found["removed"] > 0.25


@pytest.mark.parametrize("name", sorted({*SITUATIONS} - COMPUTED))
def test_torchs_pruning_makes_nothing_smaller(name):
    assert peers.torchs_prune(name) == {"state": "runs", "removed": 0.0}


def test_the_page_has_every_net_and_what_the_tests_say():
    record = json.loads((RESULTS / "models" / "peers.json").read_text())
    assert list(record["results"]) == list(SITUATIONS)
    refused = {name for name, row in record["results"].items() if row["this package"]["state"] != "equal"}
    assert refused == {*REFUSED}
    page = (RESULTS.parents[1] / "docs" / "results" / "how_it_compares.md").read_text()
    assert page == peers.page(record)


def test_an_error_is_an_outcome():
    assert peers.tried("torch.nn.utils.prune", "weight norm")["said"].startswith("TypeError: cannot assign")
