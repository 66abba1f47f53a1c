"""docs/guide/troubleshooting.md and the code say the same: every text that a user can meet, and no other."""

import ast
import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import torch_flowprune as fp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("torch_flowprune/**/*.py"))}
FUNCTIONS = {}
for _node in (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
    FUNCTIONS.setdefault(_node.name, []).append(_node)
SAYS_ITSELF = re.compile(r"\bshould (be|have|hold|give)\b|\bexpected\b|^unknown |\bdoes not take\b|\bis empty\b|^give ")
"""What an argument should be, and what was given: such a text needs no page."""
UNSEEN = {"_Kernel", "SystemExit"}
"""Raised for the package itself, or by ``python -m``."""

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests alone, without docs/")


class Text(NamedTuple):
    kind: str
    """The class of the error, or of the warning."""
    words: str
    """What it says, with … for what is filled in."""
    place: str


@functools.cache
def texts():
    return [
        Text(kind, re.sub("…([ .]?…)+", "…", words), f"{path.relative_to(ROOT)}:{call.lineno}")
        for path, tree in TREES.items()
        for call, scopes in calls(tree, (tree,))
        if (kind := kind_of(call)) and call.args
        for words in said(call.args[0], scopes, call.lineno)
    ]


def calls(node, scopes):
    """Every call, with the functions that it stands in, innermost first, and the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, scopes
        yield from calls(child, (child, *scopes) if isinstance(child, ast.FunctionDef) else scopes)


def kind_of(call):
    name = name_of(call.func)
    if name == "warn":
        return name_of(call.args[1])
    return "UnrecordableError" if name == "refuse" else name if name.endswith("Error") else None


def name_of(node):
    return ast.unparse(node).rpartition(".")[2]


def said(node, scopes, line):
    """The texts that an expression can have; … for what is known at run time alone."""
    match node:
        case ast.Constant(str(value)):
            return [value]
        case ast.JoinedStr(parts):
            return joined(said(part, scopes, line) for part in parts)
        case ast.FormattedValue(ast.Name() | ast.IfExp() as value, -1):
            return said(value, scopes, line)
        case ast.BinOp(left, ast.Add(), right):
            return joined([said(left, scopes, line), said(right, scopes, line)])
        case ast.IfExp(_, one, other):
            return [*said(one, scopes, line), *said(other, scopes, line)]
        case ast.Name(name):
            return said_by_name(name, scopes, line)
        case ast.Call(ast.Attribute(ast.JoinedStr() as text, "lstrip")):
            return said(text, scopes, line)
        case ast.Call(function) if len(found := FUNCTIONS.get(name_of(function), ())) == 1:
            returned = [one for one in ast.walk(found[0]) if isinstance(one, ast.Return) and has_words(one)]
            return [words for one in returned for words in said(one.value, found, one.lineno)] or ["…"]
    return ["…"]


def has_words(statement):
    return any(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in ast.walk(statement))


def joined(parts):
    return ["".join(choice) for choice in itertools.product(*parts)]


def said_by_name(name, scopes, line):
    """What was last assigned to the name above this line, in the nearest scope where anything was."""
    for scope in scopes:
        nodes = scope.body if isinstance(scope, ast.Module) else ast.walk(scope)
        assigned = [node for node in nodes if name in names_assigned(node) and node.lineno <= line]
        if assigned:
            return said(max(assigned, key=lambda node: node.lineno).value, scopes, line)
    return ["…"]


def names_assigned(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.NamedExpr) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def entries():
    """The texts that stand at the head of the page's items."""
    heads = re.findall(r"^- (`[^`]+`(?:,\s+`[^`]+`)*) \\$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [" ".join(entry.split()) for head in heads for entry in re.findall(r"`([^`]+)`", head)]


def begins(words, entry):
    return re.match(re.escape(entry) + r"(?!\w)", words) is not None


def says_itself(kind, words):
    return kind in ("ValueError", "TypeError", "ArgumentTypeError") and SAYS_ITSELF.search(words)


def test_every_text_is_on_the_page():
    known = entries()
    missing = [
        f"{place}: {words}"
        for kind, words, place in texts()
        if words != "…" and not says_itself(kind, words) and not any(begins(words, entry) for entry in known)
    ]
    assert missing == []


def test_every_item_is_a_text_of_the_code():
    words = [text.words for text in texts()]
    assert [entry for entry in entries() if not any(begins(text, entry) for text in words)] == []


def test_an_item_says_enough_to_be_found():
    assert [entry for entry in entries() if len(re.findall(r"\w\w+", entry)) < 2] == []
    assert len(set(entries())) == len(entries())


def test_every_class_of_error_and_warning_is_named():
    page = PAGE.read_text(encoding="utf-8")
    own = {name for name in fp.__all__ if isinstance(value := getattr(fp, name), type) and issubclass(value, Exception)}
    seen = {text.kind for text in texts() if text.kind.endswith("Warning")}
    assert [name for name in sorted({*own, *seen, "UnrecordableError"}) if f"`{name}`" not in page] == []


def test_nothing_is_raised_past_these_tests():
    """A helper that makes an error is one whose text is read here, or else is a new kind."""
    raised = {
        name_of(node.exc.func)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    makers = {name for name in raised - UNSEEN if not name.endswith("Error") and name != "refuse"}
    assert {name for name in makers if name not in FUNCTIONS} == set()
    assert {text.kind for text in texts() if text.words == "…"} == {"UnrecordableError"}  # its reasons: refuse(...)
