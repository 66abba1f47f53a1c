"""Stock models of transformers, pruned uniformly, are models of their class: from a folder, without this package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_models import ALL, build, generated, inputs, logits

import torch_flowprune as fp
from torch_flowprune.channels import channel_masks, couple, is_as_built, uniform_sizes
from torch_flowprune.channels.construction import constructor_of

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "language_models.md"
FAST = ["Llama", "GPT2", "T5", "ViT"]
NOTHING = ["Bloom"]
"""Of these every size follows the width of a residual stream that layer norms read."""
SPARSITY = 0.4


def cases(names):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


def pruned(name, sparsity=SPARSITY, **words):
    model, given = build(name), inputs(name)
    report = fp.global_prune(
        model, "magnitude", sparsity, granularity="channel", example_inputs=given, uniform=True, **words
    )
    return model, given, report


@pytest.mark.parametrize("name", cases([name for name in ALL if name not in NOTHING]))
def test_a_shrunk_model_is_one_of_its_class(tmp_path, name):
    model, given, report = pruned(name)
    expected = logits(model, given)
    small = fp.shrink(model, given)
    assert is_as_built(small)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert abs(report.pruned - round(SPARSITY * report.units)) <= 4
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, given), logits(small, given))
    assert (logits(small, given) - expected).abs().max() < 2e-6 * max(expected.abs().max(), 1)
    if model.can_generate() and "pixel_values" not in given:
        assert torch.equal(generated(again, given), generated(model, given))


@pytest.mark.parametrize("name", NOTHING)
def test_where_no_size_can_change_alone(name):
    with pytest.raises(ValueError, match="no other BloomForCausalLM has this narrower and computes the same"):
        pruned(name)


def test_a_process_without_this_package(tmp_path):
    for name in ("Llama", "Phi3", "GPT2"):
        model, given, _ = pruned(name, 0.5)
        small = fp.shrink(model, given)
        small.save_pretrained(tmp_path / name)
        torch.save((given, logits(model, given)), tmp_path / name / "given.pt")
    code = (
        "import sys, pathlib, torch, transformers\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    given, expected = torch.load(folder / 'given.pt')\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "    with torch.no_grad(): assert (model(**given).logits - expected).abs().max() < 1e-5, folder\n"
        "assert 'torch_flowprune' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)


def narrower(name):
    """The numbers of a config that become smaller, where all do that can."""
    model, given = build(name), inputs(name)
    coupling = couple(model, given)
    dials = uniform_sizes(model, coupling, given, [group.name for group in coupling.groups]).dials
    kept = {group: count for dial in dials for group, count in dial.kept(dial.steps * 3 // 4 or 1).items()}
    keep = {group: torch.arange(coupling[group].size) < count for group, count in kept.items()}
    small = fp.shrink(model, given, masks=channel_masks(coupling, keep, dict(model.named_parameters())))
    before, after = (constructor_of(one).numbers for one in (model, small))
    changed = {word for word, value in after.items() if type(value) is int and value != before.get(word)}
    return changed - {"head_dim"}  # which is then stated, and stays


def rows():
    """The guide's table: a name -> the numbers that it says become smaller."""
    text = GUIDE.read_text(encoding="utf-8")
    table = text[text.index("| model | becomes smaller") :].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {name: set(re.findall(r"`([\w.]+)`", said)) for names, said, _ in cells for name in names.split(", ")}


def test_the_guide_has_every_model():
    assert rows().keys() == ALL.keys()


@pytest.mark.parametrize("name", cases(ALL))
def test_the_guide_says_what_becomes_narrower(name):
    assert rows()[name] == narrower(name)
