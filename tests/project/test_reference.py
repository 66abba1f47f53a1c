"""The API reference: every keyword of every function is described on its page."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import torch_flowprune as fp

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location(
    "keyword_descriptions", ROOT / "docs" / "extensions" / "keyword_descriptions.py"
)
keywords = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keywords)

CALLED = [name for name in fp.__all__ if inspect.isfunction(getattr(fp, name)) and name not in fp.MEASURES]


def lines_of(function):
    return inspect.getdoc(function).splitlines()


def taken(function):
    """What a call may say by name."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            yield name
        elif name == "options":
            yield from keywords._options(function)


@pytest.mark.parametrize("name", [*CALLED, "Pruner"])
def test_every_keyword_is_described_where_it_is_taken(name):
    described = keywords.descriptions(getattr(fp, name))
    assert [word for word in taken(getattr(fp, name)) if word not in described] == []
    assert [word for word, text in described.items() if "see :func:`~torch_flowprune.flow`" in " ".join(text)] == []


NAMED = [name for name in [*fp.__all__, "range"] if callable(getattr(fp, name))]
WARNED = [name for name in NAMED if inspect.isclass(found := getattr(fp, name)) and issubclass(found, Exception)]


@pytest.mark.parametrize("name", [name for name in NAMED if name not in WARNED])
def test_an_example_runs_as_it_is_pasted(name):
    """With nothing imported before; what is only a part of another value points to that."""
    text = inspect.getdoc(getattr(fp, name))
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    if not examples.examples:
        assert inspect.isclass(getattr(fp, name)) and "See Also:\n    :" in text
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(examples).failed == 0


@pytest.mark.parametrize("name", NAMED)
def test_a_page_leads_on(name):
    """To the function that gives it, or that is called before or after."""
    assert re.search(r":(func|class|meth):`", inspect.getdoc(getattr(fp, name))) or name == "ShrinkError"


def test_what_a_function_says_itself_is_kept():
    described = keywords.descriptions(fp.global_prune)
    assert described["generator"] != keywords.descriptions(fp.flow).get("generator")
    assert "exactly this many samples" in " ".join(described["max_samples"])
    assert "the units of lowest score" not in " ".join(described["loss"])


def test_keywords_of_options_have_their_types():
    text = "\n".join(keywords.complete(fp.Pruner, lines_of(fp.Pruner)))
    assert "\n    mode (str): " in text
    assert "\n    rounds: how many rounds.\n" in text
    assert "options:" not in text


def test_all_but_the_arguments_is_left_as_it_is():
    before, after = lines_of(fp.scores), keywords.complete(fp.scores, lines_of(fp.scores))
    start = before.index("Args:") + 1
    rest = before[before.index("Raises:") - 1 :]
    assert after[:start] == before[:start]
    assert after[-len(rest) :] == rest
    assert keywords.complete(fp.MEASURES["magnitude"], lines := lines_of(fp.MEASURES["magnitude"])) == lines
