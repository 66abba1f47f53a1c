"""What contributors and CI read beside the code: it parses, and says what the rest of the project says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import torch_flowprune as fp

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
CHECK = ROOT / ".ci" / "check"
CONTRIBUTING = ROOT / "docs" / "CONTRIBUTING.md"
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))

pytestmark = pytest.mark.skipif(not CHECK.exists(), reason="the tests alone, without .ci/")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(name):
    return yaml.safe_load(read(name))


def linters():
    """The lines of .ci/check that run one."""
    return re.findall(r"^(?:ruff|mypy|lint-imports).*$", CHECK.read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_has_one_list_of_checks():
    assert "bash .ci/check --no-tests" in read(".ci/run").splitlines()
    assert [line.split()[0] for line in linters()] == ["ruff", "ruff", "mypy", "lint-imports"]
    assert not re.findall(r"^(?:ruff|mypy|lint-imports|sphinx-build)\b", read(".ci/run"), re.MULTILINE)


def test_a_commit_is_stopped_by_what_stops_ci():
    (local,) = parsed(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == linters()
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in local["hooks"])


def test_the_workflow_runs_what_there_is():
    jobs = parsed(".github/workflows/ci.yml")["jobs"].values()
    commands = [shlex.split(row["command"]) for job in jobs for row in job["strategy"]["matrix"]["include"]]
    cases = re.findall(r"^(\w+)\)$", read(".ci/versions"), re.MULTILINE)
    assert sorted(commands) == sorted([["run"], *(["versions", case] for case in cases)])
    assert all((ROOT / ".ci" / script).exists() for script, *_ in commands)
    assert [job["steps"][-1]["run"] for job in jobs] == ["bash .ci/${{ matrix.command }}"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_what_was_printed(form):
    asked = [part for part in parsed(form)["body"] if part["type"] == "textarea"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert "printed" in {part["id"] for part in asked if part.get("validations", {}).get("required")}


def test_the_command_for_the_versions_prints_them():
    (part,) = [part for part in parsed(".github/ISSUE_TEMPLATE/bug.yml")["body"] if part.get("id") == "versions"]
    python, *arguments = shlex.split(re.search(r"`(python -c .*?)`", part["attributes"]["description"])[1])
    assert python == "python"
    printed = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert fp.__version__ in printed
    assert len(printed.split()) == 4


def test_the_citation_is_of_this_version():
    citation, package = parsed("CITATION.cff"), read("pyproject.toml")
    assert citation["version"] == fp.__version__
    assert f'name = "{citation["title"]}"' in package
    assert f'description = "{citation["abstract"]}"' in package
    assert f'license = "{citation["license"]}"' in package
    assert [reference["url"] for reference in citation["references"]] == ["https://arxiv.org/abs/2009.11839"]


def test_editors_and_ruff_agree_on_the_length_of_a_line():
    (length,) = re.findall(r"^max_line_length = (\d+)$", read(".editorconfig"), re.MULTILINE)
    assert f"line-length = {length}" in read("pyproject.toml")


def test_what_contributing_names_is_there():
    """The files, and the tables in them."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/])(?:\.ci|docs|tests|torch_flowprune)/[\w./]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("torch_flowprune/**/*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in modules)
    tables = re.findall(r"`([A-Z]{4,})`", text)
    assert [name for name in tables if not re.search(rf"^{name}\b.* = ", sources, re.MULTILINE)] == []
    assert len(paths) > 20
    assert len(tables) > 3


def test_contributing_is_where_readers_look():
    assert "(docs/CONTRIBUTING.md)" in read("README.md")
