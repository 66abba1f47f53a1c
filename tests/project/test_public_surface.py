"""The public names: exported, documented, described; and nothing besides."""

import ast
import inspect
import re
import types
from pathlib import Path

import pytest

import torch_flowprune as fp
from torch_flowprune.pruning import methods

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torch_flowprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
UNSTARRED = ("range",)
"""Public too, and left out of ``__all__``: a star import must not hide Python's own."""
FUNCTIONS = [name for name in fp.__all__ if inspect.isfunction(getattr(fp, name)) and name not in methods.__all__]
FUNCTIONS += UNSTARRED
CLASSES = [name for name in fp.__all__ if inspect.isclass(getattr(fp, name)) and name not in methods.__all__]


def test_all_is_what_is_exported():
    public = {
        name for name, value in vars(fp).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert {*fp.__all__, *UNSTARRED} == public
    assert len(fp.__all__) == len(set(fp.__all__))


def test_every_measure_has_its_torch_methods():
    stems = {"".join(part.capitalize() for part in name.split("_")) for name in fp.MEASURES}
    expected = {f"{stem}{kind}" for stem in stems for kind in ("Structured", "Unstructured")}
    expected |= {f"{name}_{kind}" for name in fp.MEASURES for kind in ("structured", "unstructured")}
    assert set(methods.__all__) == expected
    assert len(methods.__all__) == len(expected)


def test_every_public_name_is_in_the_api_reference():
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    own, _, _ = text.partition(".. currentmodule:: torch_flowprune.scoring.measures")
    documented = re.findall(r"^(?:   |\.\. py:data:: )(\w+)$", own, re.MULTILINE)
    assert ".. automodule:: torch_flowprune.pruning.methods\n   :members:\n" in text  # follows its __all__
    assert sorted(documented) == sorted({*fp.__all__, *UNSTARRED} - set(methods.__all__))


def test_every_measure_is_in_the_api_reference_and_the_readme():
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = re.search(r"currentmodule:: torch_flowprune\.scoring\.measures\n(.*?)```", reference, re.DOTALL)[1]
    members = re.findall(r"^   (\w+)$", listed, re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert members == list(fp.MEASURES)
    assert rows == list(fp.MEASURES)


@pytest.mark.parametrize("name", fp.__all__)
def test_every_public_name_is_described(name):
    value = getattr(fp, name)
    if not isinstance(value, dict):
        assert inspect.getdoc(value), name
        assert inspect.getdoc(value).split("\n\n")[0].rstrip().endswith((".", ":")), "the first sentence is a sentence"


@pytest.mark.parametrize("name", [*FUNCTIONS, "Pruner"])
def test_a_functions_docstring_has_its_parts(name):
    text = inspect.getdoc(getattr(fp, name))
    listed = re.search(r"Args:\n(.*?)(\n\n|\Z)", text, re.DOTALL)
    shared = re.search(r"those of :func:`(\w+)`", text)  # a contract that several functions share is stated once
    described = (listed[1] if listed else text) + (inspect.getdoc(getattr(fp, shared[1])) if shared else "")
    arguments = [key for key in inspect.signature(getattr(fp, name)).parameters if key not in ("self", "model")]
    assert [key for key in arguments if not re.search(rf"\b{key}\b", described)] == [], (
        "arguments without a word on them"
    )
    assert ">>> " in text, "one example that runs"


@pytest.mark.parametrize("name", [name for name in CLASSES if hasattr(getattr(fp, name), "__dataclass_fields__")])
def test_a_dataclass_describes_its_fields(name):
    fields = [
        key for key in getattr(fp, name).__dataclass_fields__ if not key.startswith("_") and not key.endswith("_")
    ]
    text = inspect.getdoc(getattr(fp, name))
    assert [key for key in fields if not re.search(rf"\b{key}\b", text) and key not in ("n", "m", "dim")] == []


@pytest.mark.parametrize("name", list(fp.MEASURES))
def test_a_measure_has_a_source_and_an_example(name):
    text = inspect.getdoc(fp.MEASURES[name])
    assert ">>> " in text
    assert name == "random" or "Source:" in text


def test_only_two_modules_import_torchs_pruning():
    importers = {str(path.relative_to(PACKAGE)) for path in MODULES if _imports(path, "torch.nn.utils.prune")}
    assert importers == {"masking/carrier/hook.py", "pruning/methods/base_method.py"}


def test_files_stay_readable():
    counts = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in counts.items() if count >= 300} == {}


def test_the_modules_are_all_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [path.stem for path in MODULES if not path.stem.startswith("__") and f"`{path.stem}`" not in text] == []


def test_outside_a_folder_only_its_face_is_imported():
    """`from torch_flowprune.inputs import ...`, never `from torch_flowprune.inputs.numbers import ...`."""
    past_a_face = []
    for path in MODULES:
        here = path.relative_to(ROOT).parent
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_flowprune."):
                folder = Path(*node.module.split(".")).parent
                if not here.is_relative_to(folder):
                    past_a_face.append(f"{path.relative_to(ROOT)}: {node.module}")
    assert past_a_face == ["torch_flowprune/__init__.py: torch_flowprune.pruning.methods"]  # the star of what it lists


def _imports(path, module):
    parent, _, last = module.rpartition(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and any(alias.name == module for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (
            node.module == module or (node.module == parent and any(alias.name == last for alias in node.names))
        ):
            return True
    return False
