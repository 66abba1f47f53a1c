"""Each sentence of the guides that says never, always, exactly or any names tests that hold it."""

import ast
from pathlib import Path

import cases
import claims
import pytest
import torch
from cases import CASES

import torch_flowprune as fp

WAY_OUT = "name its tests in tests/project/claims.json (python tests/support/claims.py lists them), or say less"


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_strong_sentence_names_its_tests():
    nameless = [sentence for sentence in claims.claims() if not claims.tests().get(sentence)]
    assert nameless == [], WAY_OUT


def test_no_sentence_is_listed_that_no_page_has():
    assert sorted({*claims.tests()} - {*claims.claims()}) == []


@pytest.mark.parametrize("test", sorted({test for named in claims.tests().values() for test in named}))
def test_the_tests_are_there(test):
    file, _, name = test.partition("::")
    assert name in functions_in(claims.ROOT / file)


def test_a_sentence_without_a_test_is_found(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Any\n\nThis never fails. That may.\n\n    code never counts\n\n| always | so |\n", "utf-8")
    monkeypatch.setattr(claims, "PAGES", [page])
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    assert claims.claims() == {"This never fails.": "page.md", "always": "page.md"}


@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1e30])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_scores_of_any_size_rank_alike(factor, granularity):
    """They are compared with each other, never with a constant."""
    batch = CASES["mlp"].batch(6)
    kept = []
    for scale in (1.0, factor):
        model = cases.mlp()
        scores = fp.scores(model, "snip", batch, granularity=granularity)
        scaled = {name: value.double() * scale for name, value in scores.items()}
        fp.global_prune(model, scores=scaled, sparsity=0.5, granularity=granularity)
        kept.append(fp.masks(model))
    assert all(torch.equal(kept[0][name], mask) for name, mask in kept[1].items())
