import json

import pytest
import torch

from torch_flowprune.cli import main

safetensors = pytest.importorskip("safetensors.torch")


def test_a_folder_in_and_a_folder_out(tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    safetensors.save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "dense" / "model.safetensors")
    call = ["prune-checkpoint", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--sparsity", "0.25"]
    assert main([*call, "--report", str(tmp_path / "report.json")]) == 0
    assert "16 of 64 units pruned" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["pruned"] == 16
    assert int((safetensors.load_file(tmp_path / "out" / "model.safetensors")["a.weight"] == 0).sum()) == 16
    assert main(call) == 2
    assert "is already there" in capsys.readouterr().err
