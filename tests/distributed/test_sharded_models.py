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

    modules = ("shard_masks", "shard_choices", "shard_loops")
    torch.multiprocessing.spawn(rank_group.run_all, args=(4, str(tmp_path / "store"), modules), nprocs=4)


def test_two_ranks_by_the_guide(tmp_path):
    import sharded_ranks

    torch.multiprocessing.spawn(sharded_ranks.run, args=(str(tmp_path / "store"),), nprocs=2)


def test_a_rank_that_dies_leaves_the_other_as_it_was(tmp_path):
    import shard_loops

    torch.multiprocessing.spawn(shard_loops.killed, args=(str(tmp_path / "store"),), nprocs=2)
