"""Results of ``benchmarks.paper.claims`` and ``benchmarks.paper.sweep`` as tables and figures.

    python -m benchmarks.paper.findings benchmarks/results/paper/*.json --docs docs/results

writes all tables into ``docs/results/paper_tables.md``, those that ``docs/results/paper.md`` has a mark for into that,
and the figures into ``docs/results/figures/``. ``PART ... --merge OUT`` makes one file of several seeds' files, or of
the ``result.json`` of several runs of ``benchmarks.paper``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.page import shown, table, wrapped
from benchmarks.paper.effects import lines
from benchmarks.paper.figures import FIGURES, figure, name_of
from benchmarks.paper.rows import Row
from benchmarks.paper.sweep import short
from benchmarks.paper.tables import TABLES
from benchmarks.paper.verdicts import verdicts

PAGE, ALL = "paper.md", "paper_tables.md"
COMMAND = "python -m benchmarks.paper.findings benchmarks/results/paper/*.json --docs docs/results"
_HEAD = f"""# The paper: all tables

What [The paper, reproduced and questioned](paper.md) rests on, made from `benchmarks/results/paper/*.json` by

{shown(COMMAND)}

Each cell is the mean ± standard deviation over seeds; *increase* and *preservation* are `gradient_norm_increase` and
`gradient_norm_preservation`, with the temperature of the loss they are taken of. ΔL and ‖g‖² are those of the plain
loss (T = 1) in eval mode, whatever temperature the scores had.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.findings", description="Tables and figures of the claims."
    )
    parser.add_argument("files", type=Path, nargs="+", help="what benchmarks.paper.claims or .sweep wrote")
    parser.add_argument("--docs", type=Path, help="the folder of the pages and figures")
    parser.add_argument("--merge", type=Path, metavar="OUT", help="write the parts of all files into one instead")
    options = parser.parse_args(arguments)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    if options.merge:
        options.merge.parent.mkdir(parents=True, exist_ok=True)
        options.merge.write_text(json.dumps(merged(found), separators=(",", ":")) + "\n", encoding="utf-8")
    elif not options.docs:
        print(tables_page(found))
    else:
        (options.docs / ALL).write_text(tables_page(found), encoding="utf-8")
        page = options.docs / PAGE
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        for one in found:
            figure(one, options.docs)


def tables_page(found: list[Row]) -> str:
    """The page of all tables, and of the figures."""
    effects = table(["claim", "effect", "on", "mean ± sd", "seeds that agree"], lines(_by_name(found)))
    parts = [_HEAD.rstrip(), "## Effects of the claims", "\n".join(effects), *map(_section, found)]
    return wrapped("\n\n".join(parts)) + "\n"


def _section(one: Row) -> str:
    heading = f"{one['experiment'].capitalize()}: {one['name']}"
    drawn = [f"![{heading}]({name_of(one)})"] if one["experiment"] in FIGURES else []
    return "\n\n".join([f"## {heading}", *drawn, *("\n".join(made) for made in TABLES[one["experiment"]](one))])


def _by_name(found: list[Row]) -> dict[str, Row]:
    return {f"{one['experiment']} {one['name']}": one for one in found}


def filled(page: str, found: list[Row]) -> str:
    """The page with its generated parts made anew: each stands between a mark with its name and the end mark."""
    results = _by_name(found)
    header = ["claim", "comparison", "networks with its sign", "chance", "mean difference [95 % interval]", "verdict"]
    made = {"verdicts": wrapped("\n".join(table(header, [one.line() for one in verdicts(results)])))}
    made |= {
        f"{name}, table {i}": wrapped("\n".join(text))
        for name, one in results.items()
        for i, text in enumerate(TABLES[one["experiment"]](one), 1)
    }
    for name, text in made.items():
        begin, end = f"<!-- made: {name} -->", "<!-- end -->"
        before, found_mark, rest = page.partition(begin)
        if found_mark:
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


def merged(found: list[Row]) -> Row:
    """One result of the same experiment with the parts of all and the commits they are of, numbers to six digits."""
    if all("config" in one for one in found):
        return _runs(found)
    if all(one["experiment"] == "protocol" for one in found) and len({one["name"] for one in found}) == len(found) > 1:
        return _networks(found)
    if len({(one["experiment"], json.dumps(one["setting"])) for one in found}) != 1:
        raise ValueError("these files are not of one experiment and setting")
    parts = {key: rows for one in found for key, rows in one["parts"].items() if not key.endswith("/done")}
    commits = ", ".join(dict.fromkeys(one["environment"]["commit"] for one in found))
    return dict(
        _rounded(
            {
                **found[0],
                "environment": {**found[0]["environment"], "commit": commits},
                "parts": dict(sorted(parts.items())),
            }
        )
    )


def _runs(found: list[Row]) -> Row:
    """Runs of the protocol on the same data, as a sweep has them."""
    config, data = found[0]["config"], found[0]["data"]
    setting = {key: value for key, value in config.items() if key not in ("method", "rounds", "seed", "sparsity")}
    setting |= {
        "data": data["name"],
        "size": data["shape"][1],
        "subset": None,
        "goal": config["sparsity"],
        "train": data["train"],
    }
    parts = {
        f"{run['config']['seed']}/{run['config']['method']}/{run['config']['rounds']}": [short(run)] for run in found
    }
    return dict(
        _rounded(
            {
                "experiment": "protocol",
                "name": data["name"],
                "setting": setting,
                "environment": found[0]["environment"],
                "parts": parts,
            }
        )
    )


def _networks(found: list[Row]) -> Row:
    """One run of several networks each, side by side."""
    parts = {
        f"{row['seed']}/{one['setting']['model']}": [{**row, "model": one["setting"]["model"]}]
        for one in found
        for row in _only(one)
    }
    shared = {
        key: value
        for key, value in found[0]["setting"].items()
        if all(one["setting"].get(key) == value for one in found)
    }
    return dict(
        _rounded(
            {
                **found[0],
                "experiment": "networks",
                "name": "full",
                "setting": {**shared, "model": "several"},
                "parts": parts,
            }
        )
    )


def _only(one: Row) -> list[Row]:
    return [row for rows in one["parts"].values() for row in rows]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no word for it
    return value


if __name__ == "__main__":
    sys.exit(main())
