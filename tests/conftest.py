"""What every test stands on: the shared tables importable, one thread, one seed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importlib mode puts no test folder on the path


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny nets gain nothing from threads, and results must not depend on them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _denormals():
    """Benchmarks flush them for the whole process: what comes after computes as users do."""
    yield
    torch.set_flush_denormal(False)
