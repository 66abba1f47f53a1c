"""The guides take their code from the stories: what stands between `# guide: page` and `# end` is on that page."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORIES = sorted((ROOT / "tests" / "stories").glob("test_*.py"))
REGION = re.compile(r"^ *# guide: (?P<page>\w+)\n(?P<code>.*?)^ *# end$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def regions(story):
    found = REGION.finditer(story.read_text(encoding="utf-8"))
    return [(one["page"], textwrap.dedent(one["code"])) for one in found]


def statements(code):
    return [ast.dump(node) for node in ast.parse(f"def _():\n{textwrap.indent(code, ' ')}").body[0].body]


def blocks(page):
    """Every list of statements on the page, at any depth, as text that layout does not change."""
    for fence in FENCE.finditer((ROOT / "docs" / "guide" / f"{page}.md").read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(fence["code"])):
            if isinstance(body := getattr(node, "body", None), list):
                yield [ast.dump(statement) for statement in body]


@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_the_guides_take_their_code_from_it(story):
    assert regions(story), "a story has code that a guide shows"
    for page, code in regions(story):
        wanted = statements(code)
        assert any(
            wanted == block[start : start + len(wanted)] for block in blocks(page) for start in range(len(block))
        ), f"docs/guide/{page}.md does not have, line after line:\n{code}"


def test_the_stories_are_there_and_slow():
    assert len(STORIES) >= 9
    assert all("pytestmark = pytest.mark.slow" in story.read_text(encoding="utf-8") for story in STORIES)
