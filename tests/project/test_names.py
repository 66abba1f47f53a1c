"""Names: one meaning for each across the package, an underscore where a module keeps it to itself, one way to write."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torch_flowprune"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {path: tree for path, tree in TREES.items() if path.name != "__init__.py"}


def test_a_name_has_one_meaning():
    places = defaultdict(set)
    for path, tree in MODULES.items():
        for name in _defined(tree):
            places[name].add(str(path.relative_to(PACKAGE)))
    shared = {name: sorted(paths) for name, paths in places.items() if len(paths) > 1 and name != "__all__"}
    assert shared == {}


def test_a_function_that_only_its_module_uses_begins_with_an_underscore():
    others = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    }
    used = {path: set(_mentioned(tree)) for path, tree in {**TREES, **others}.items()}
    kept = {
        f"{path.relative_to(PACKAGE).as_posix()}: {node.name}"
        for path, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if node.name not in _in_public_tables(tree)
        if not any(node.name in names for user, names in used.items() if user != path)
    }
    assert kept == set()


def test_only_a_folders_face_lists_its_names():
    lists = {str(path.relative_to(PACKAGE)) for path, tree in MODULES.items() if "__all__" in set(_defined(tree))}
    # The package exports the methods with a star; the last has no folder, and is its own face.
    methods = {f"pruning/methods/{name}.py" for name in ("structured_methods", "unstructured_methods")}
    assert lists == {*methods, "torch_internals.py"}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_write_code_in_double_backticks_and_cannot_in_one_word(path):
    text = "\n".join(_docstrings(TREES[path]))
    assert re.findall(r"[Cc]an not", text) == []
    assert re.findall(r"`[^`\n]+`", re.sub(r"``[^`]+``|:[\w:]+:`[^`]+`", "", text)) == []


def _defined(tree):
    """The names of a module's functions, classes and values."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for target in _targets(node):
            yield target.id


def _targets(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def _in_public_tables(tree):
    """What a module hands out in a value of its own: ``SCHEDULES``, ``MEASURES``, rules by operator."""
    tables = [node for node in tree.body if any(not target.id.startswith("_") for target in _targets(node))]
    return {node.id for table in tables for node in ast.walk(table) if isinstance(node, ast.Name)}


def _mentioned(tree):
    """Names that are imported, read off something, or end a text: ``monkeypatch.setattr("module.name", ...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.rpartition(".")[2]


def _docstrings(tree):
    """Every text that stands as a statement: those under values too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
