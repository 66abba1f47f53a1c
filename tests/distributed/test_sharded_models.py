"""Models sharded over gloo ranks: one start of processes for all checks of a kind."""

import importlib

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.current_stream(), "record_event"),
        reason="fully_shard of this torch does not run on the CPU (seen with 2.6)",
    ),
]


@pytest.mark.parametrize(("scenarios", "ranks"), [("sharded_ranks", 2), ("shard_masks", 4)])
def test_on_ranks(scenarios, ranks, tmp_path):
    module = importlib.import_module(scenarios)
    torch.multiprocessing.spawn(module.run, args=(str(tmp_path / "store"),), nprocs=ranks)
