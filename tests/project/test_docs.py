"""Every Python snippet of the README and of the docs runs, in order, as a reader would type it."""

import doctest
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<kind>python|pycon)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if FENCE.search(page.read_text(encoding="utf-8"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_snippets(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for fence in FENCE.finditer(text):
        line = text[: fence.start("code")].count("\n")
        if fence["kind"] == "python":
            exec(compile("\n" * line + fence["code"], page, "exec"), names)
        else:
            test = doctest.DocTestParser().get_doctest(fence["code"], names, page.name, str(page), line)
            assert doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed == 0
            names.update(test.globs)


def test_the_pages_with_code_are_there():
    named = {"README.md", "docs/explanation/theory.md"} | {
        f"docs/guide/{name}.md" for name in ("quickstart", "structured", "torch", "measures")
    }
    assert named <= set(map(name_of, WITH_CODE))


def test_the_readme_has_two_commands():
    commands = re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert [len(command.strip().splitlines()) for command in commands] == [1, 1]
    assert "torch_flowprune demo" in commands[0]
    assert "pytest" in commands[1]


def test_the_readmes_first_snippet_is_short():
    first = FENCE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(first["code"].splitlines()) <= 12


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("address", [None, "https://example.org/owner/name"])
def test_edit_links_are_one_setting(address, monkeypatch):
    pytest.importorskip("sphinx")
    known = importlib.metadata.metadata("torch-flowprune")
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: known)
    monkeypatch.setattr(known, "get_all", lambda _: [f"Repository, {address}"] if address else None)
    options = runpy.run_path(str(ROOT / "docs" / "conf.py"))["html_theme_options"]
    assert options.get("source_repository") == address


def test_commands_in_the_docs_parse():
    """The `console` blocks name options that exist."""
    from torch_flowprune.cli.commands import parser

    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", "")
        for line in re.findall(r"^python -m torch_flowprune (.*)$", text, re.MULTILINE):
            parser().parse_args(line.split())
            found += 1
    assert found


def lines_of(page):
    """Each line with its number, and whether a page shows it as code; what Sphinx is told is neither code nor prose."""
    fence = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence is None or not fence.startswith("{"):
            yield number, line, fence is not None or line.startswith("    ")


def too_long(line, code):
    """A row of a table is one line; where a link leads does not count."""
    if code:
        return len(line) > 88
    return not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > 120


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "benchmarks").rglob("*.md"))], ids=name_of)
def test_lines_fit(page):
    """Prose as wide as the code; code as narrow as a page shows it without cutting it."""
    assert [f"{page.name}:{number}: {line}" for number, line, code in lines_of(page) if too_long(line, code)] == []


def test_importing_the_package_imports_no_extra():
    extras = {"timm", "torchvision", "sklearn", "matplotlib", "safetensors", "transformers"}
    code = f"import sys, torch_flowprune; print(*({extras} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
