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


def on_ranks(count, scenarios, tmp_path):
    import sharded_flows

    torch.multiprocessing.spawn(sharded_flows.run, (count, str(tmp_path / "store"), scenarios), nprocs=count)


def test_two_ranks(tmp_path):
    import sharded_flows

    on_ranks(2, sharded_flows.ON_TWO, tmp_path)


@pytest.mark.slow
def test_more_on_two_ranks(tmp_path):
    import sharded_flows

    on_ranks(2, sharded_flows.MORE_ON_TWO, tmp_path)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    import sharded_flows

    on_ranks(4, sharded_flows.ON_FOUR, tmp_path)
