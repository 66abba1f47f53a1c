"""Flows of models that gloo ranks hold in parts: one start of processes for all that is done on as many ranks."""

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.current_stream(), "record_event"),
        reason="fully_shard of this torch does not run on the CPU (seen with 2.6)",
    ),
]


def test_two_ranks(tmp_path):
    import rank_group
    import shard_ingredients
    import sharded_flows

    rank_group.on_ranks(2, tmp_path, [*sharded_flows.ON_TWO, *shard_ingredients.ON_TWO])


@pytest.mark.slow
def test_more_on_two_ranks(tmp_path):
    import rank_group
    import shard_ingredients
    import sharded_flows

    rank_group.on_ranks(2, tmp_path, [*sharded_flows.MORE_ON_TWO, *shard_ingredients.MORE_ON_TWO])


@pytest.mark.slow
def test_four_ranks(tmp_path):
    import rank_group
    import shard_ingredients
    import sharded_flows

    rank_group.on_ranks(4, tmp_path, [*sharded_flows.ON_FOUR, *shard_ingredients.ON_FOUR])
