"""Models sharded over two gloo ranks: one start of processes for all checks."""

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"),
    reason="fully_shard of this torch does not run on the CPU (seen with 2.6)",
)
def test_two_ranks(tmp_path):
    import sharded_ranks

    torch.multiprocessing.spawn(sharded_ranks.run, args=(str(tmp_path / "store"),), nprocs=2)
