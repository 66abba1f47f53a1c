"""Torch's names of what is pruned: one module spells them, and a name that only looks like one is left alone."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_flowprune
from torch_flowprune.inputs import is_mask, mask_of, masked_name, original, parameters_of, plain_name

PACKAGE = Path(torch_flowprune.__file__).parent


def test_they_are_what_torch_calls_them():
    layer = prune.identity(nn.Linear(2, 2), "weight")
    assert set(layer._parameters) == {"bias", original("weight")}
    assert set(layer._buffers) == {mask_of("weight")}


@pytest.mark.parametrize("path", ["", "encoder.0."])
def test_there_and_back(path):
    name = f"{path}weight"
    assert plain_name(original(name), {mask_of(name)}) == name
    assert plain_name(name, {mask_of(name)}) == name
    assert is_mask(mask_of(name), {original(name)})
    assert masked_name(mask_of(name)) == name


def test_a_name_without_its_partner_is_the_users_own():
    assert plain_name("weight_orig", {}) == "weight_orig"
    assert not is_mask("attention_mask", {"attention"})
    assert not is_mask("weight_orig", {"weight_orig"})


def test_a_parameter_of_such_a_name_keeps_it():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_orig = nn.Parameter(torch.ones(2))
            self.register_buffer("w_mask", None)

    (target,) = parameters_of(Own()).values()
    assert (target.name, target.mask, target.owners[0][1]) == ("w_orig", None, "w_orig")


def test_no_other_module_spells_them():
    spelled = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE) != Path("inputs", "named_parameters", "names.py")
        for text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if re.search(r"^(\w*(weight|bias))?_(orig|mask)$", text)
    }
    assert spelled == set()


def texts(tree):
    """Every piece of text in the code; what is said of it in prose does not end in a name."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
