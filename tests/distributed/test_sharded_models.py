"""Models sharded over gloo ranks: one start of processes for all scenarios, which are functions in tests/support."""

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.current_stream(), "record_event"),
        reason="fully_shard of this torch does not run on the CPU (seen with 2.6)",
    ),
]


def test_four_ranks(tmp_path):
    import rank_group
    import shard_analyses
    import shard_channels
    import shard_choices
    import shard_loops
    import shard_masks

    modules = (shard_masks, shard_choices, shard_channels, shard_analyses, shard_loops)
    rank_group.on_ranks(4, tmp_path, [scenario for module in modules for scenario in module.SCENARIOS])


@pytest.mark.slow
def test_more_on_four_ranks(tmp_path):
    import rank_group
    import shard_channels
    import shard_choices

    rank_group.on_ranks(4, tmp_path, [*shard_choices.SLOW, *shard_channels.SLOW])


def test_two_ranks_by_the_guide(tmp_path):
    import rank_group
    import sharded_ranks

    rank_group.on_ranks(2, tmp_path, sharded_ranks.SCENARIOS)


def test_a_rank_that_dies_leaves_the_other_as_it_was(tmp_path):
    import rank_group
    import shard_loops

    rank_group.start(2, shard_loops.killed, str(tmp_path / "store"))
