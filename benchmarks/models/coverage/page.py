"""The page with the table: what each tool made of each model, and the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common.page import shown, wrapped
from benchmarks.models.coverage.trial import EQUAL, LIMIT, RATIOS

HEAD = f"""# Coverage

This page shows which architectures can be pruned by channels and shrunk, and whether the smaller model computes the
same: the smallest model of every timm module and every torchvision classification model, at their own input sizes.
Torch-Pruning was run on the same models in the same environment, by the recipe of its README (`BasePruner`, group
magnitude, `round_to=8`, without the classifier, in one step). Neither library was given any information about a single
architecture. (Torch-Pruning accepts `num_heads` for attention, and pruners written for a layer.)

- Affine parameters, layer scales and running statistics are random, because zeros and ones hide faults. In each group,
  the 50 %, and the 25 %, of the channels with the lowest norms are pruned.
- **equal**: the smaller model runs forward and, in train mode, backward. On inputs other than the example it computes
  what the unpruned model computes with the same slices of its parameters at zero, up to {EQUAL["float64"]:.0e} of the
  largest output in float64 ({EQUAL["float32"]:.0e} where the model's own code casts to float32). The slices are read
  from this package's masks. For Torch-Pruning, every position of every parameter holds a number that shows where it is
  after slicing.
- **differs**: runs, and computes something else. For this package that is a fault. Torch-Pruning does not promise
  equality: it removes channels over which a norm computes statistics, and training has to make up for it.
- **runs**: runs, but whether it is equal is unknown. **raises**: fails, in the step that is named.
- *prunable*: the fraction of output channels of linear layers and convolutions that belong to a removable group.
- *build*: seconds to read the model and find its groups. *prune*: seconds to score, and to remove half of each group
  (for this package including the check of `shrink`). Processor time on one thread of a shared machine. More than
  {LIMIT} s for both is *over {LIMIT} s*; runs that were given less time say so.
- *left*: the fraction of parameters left after 50 %.
"""
COMMAND = "python -m benchmarks.models.coverage --peer PATH --docs docs/results/coverage.md"
COLUMNS = ("prunable", "build s", "prune s", "25 %", "50 %", "left")


def page(data: Mapping[str, Any], known: int) -> str:
    results = data["results"]
    parts = [
        HEAD.strip(),
        summary(results),
        command(data, known),
        *data.get("notes", []),
        table(results, data.get("replaced", {})),
        *([replacements(results, data["replaced"])] if "replaced" in data else []),
        reasons(results),
    ]
    return wrapped("\n\n".join(parts)) + "\n"


def command(data: Mapping[str, Any], known: int) -> str:
    results, environment = data["results"], data["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    commits = Counter(both["ours"]["commit"] for both in results.values() if "ours" in both)
    rows = ", ".join(f"{c} ({n} rows)" for c, n in commits.most_common())
    anew = (
        f" Seconds to build: both tools in turns, the median of three rounds, at commit {data['built_at']}."
        if "built_at" in data
        else ""
    )
    return (
        f"{shown(COMMAND)}\n\n{versions}; "
        f"{environment['processor']}, one thread. "
        f"{len(results)} of {known} models. Commits: {rows}.{anew}"
    )


# -- the counts ------------------------------------------


def summary(results: Mapping[str, Any]) -> str:
    out = [
        "| | timm | timm, Torch-Pruning | torchvision | torchvision, Torch-Pruning |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    columns = [chosen(results, library, which) for library in ("timm", "torchvision") for which in ("ours", "peer")]
    for label, count in COUNTS.items():
        out.append(f"| {label} | {' | '.join(count(c) if c else '-' for c in columns)} |")
    return "\n".join([*out, "", faster(results)])


def chosen(results: Mapping[str, Any], library: str, which: str) -> list[Mapping[str, Any]]:
    return [both[which] for name, both in results.items() if name.startswith(library) and which in both]


def at_all(accepts: Callable[[Mapping[str, Any]], bool]) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """Models where that holds at every ratio that was measured."""
    return lambda found: str(
        sum(any(str(q) in f for q in RATIOS) and all(accepts(f[str(q)]) for q in RATIOS if str(q) in f) for f in found)
    )


def at_any(status: str) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    return lambda found: str(
        sum(any(f.get(str(q), {}).get("status", "").startswith(status) for q in RATIOS) for f in found)
    )


def middle(of: Callable[[Mapping[str, Any]], float | None]) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    def count(found: Sequence[Mapping[str, Any]]) -> str:
        values = [v for f in found if (v := of(f)) is not None]
        return f"{median(values):.2f}" if values else "-"

    return count


COUNTS: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "models": lambda found: str(len(found)),
    "groups built": lambda found: str(sum("build_s" in f for f in found)),
    "pruned, at every ratio measured": at_all(
        lambda r: "prune_s" in r and r["status"] != "nothing prunable" and r["stage"] != "prune"
    ),
    "forward runs": at_all(
        lambda r: r["stage"] in ("backward", "compare", "done") and r["status"] != "nothing prunable"
    ),
    "backward runs": at_all(lambda r: r["stage"] in ("compare", "done") and r["status"] != "nothing prunable"),
    "**equal**": at_all(lambda r: r["status"] == "equal"),
    "runs and differs": at_any("differs"),
    "raises": at_any("raises"),
    "over the limit": at_any("over"),
    "nothing prunable": at_any("nothing"),
    "prunable, median": middle(lambda f: f.get("share")),
    "seconds to build, median": middle(lambda f: f.get("build_s")),
    "seconds to prune 50 %, median": middle(lambda f: f.get("0.5", {}).get("prune_s")),
}


def faster(results: Mapping[str, Any]) -> str:
    """The two tools' times on the models that both build."""
    both = [
        (b["ours"]["build_s"], b["peer"]["build_s"])
        for b in results.values()
        if all("build_s" in b.get(w, {}) for w in ("ours", "peer"))
    ]
    if not both:
        return ""
    ratio = median(p / o for o, p in both)
    ours, peer = (median(v) for v in zip(*both, strict=True))
    return (
        f"On the {len(both)} models whose groups both find, this package takes {ours:.2f} s at the median to build "
        "them and Torch-Pruning "
        f"{peer:.2f} s; "
        f"the median of the ratios is {ratio:.2f}, and this package is the faster one on {sum(o < p for o, p in both)}."
    )


# -- the table ------------------------------------------


def table(results: Mapping[str, Any], replaced: Mapping[str, Any]) -> str:
    lines = [
        f"| model | M parameters | {' | '.join(COLUMNS)} | as graphs | {' | '.join(f'TP {c}' for c in COLUMNS)} |",
        (
            f"| --- | ---: |{' ---: | ---: | ---: | --- | --- | ---: |'} ---: "
            f"|{' ---: | ---: | ---: | --- | --- | ---: |'}"
        ),
    ]
    for name, both in results.items():
        ours, peer = both.get("ours", {}), both.get("peer", {})
        size = f"{ours.get('parameters', peer.get('parameters', 0)) / 1e6:.1f}"
        graphs = "0" if name in replaced else str(ours.get("0.5", {}).get("graphs", "-"))
        lines.append(f"| {' | '.join([name.replace('_', chr(92) + '_'), size, *cells(ours), graphs, *cells(peer)])} |")
    return "\n".join(lines)


def cells(found: Mapping[str, Any]) -> list[str]:
    half = found.get("0.5", {})
    return [
        f"{found['share']:.0%}" if "share" in found else "-",
        f"{found['build_s']:.2f}" if "build_s" in found else "-",
        f"{half['prune_s']:.2f}" if "prune_s" in half else "-",
        outcome(found, 0.25),
        outcome(found, 0.5),
        f"{half['parameters']:.0%}" if "parameters" in half else "-",
    ]


def outcome(found: Mapping[str, Any], ratio: float) -> str:
    at = found.get(str(ratio))
    if at is None:
        return "-"
    detail = {"differs": f" {at.get('difference', 0):.0e}", "raises": f": {at['stage']}", "stopped": f": {at['stage']}"}
    return at["status"] + detail.get(at["status"], "")


REPLACED = """## What became of modules that spell out a size

The models of the list in which `shrink` once put exported graphs (*before*: how many), run again at 50 %, with the
proof that `shrink` makes; *as graphs* above has what is there now. Counted are modules that are not of torch's own
classes. *attribute*: one was set; *written*: a module written for the size stands there; *number*: another number
stands in the class's code, in one line or several. A graph takes `graphs=True` now."""
KINDS = ("attribute", "written", "number in the code")


def replacements(results: Mapping[str, Any], replaced: Mapping[str, Any]) -> str:
    lines = ["| model | before | what became of them |", "| --- | ---: | --- |"]
    for name, row in replaced.items():
        of_kind = row.get("became", {})
        said = [
            f"{kind.split(' ')[0]}: {', '.join(f'{n} {cls}' for cls, n in of_kind[kind].items())}"
            for kind in KINDS
            if kind in of_kind
        ]
        shown_row = "; ".join(said) or ("refused" if "refused" in row else "nothing but torch's own layers")
        lines.append(f"| {name.replace('_', chr(92) + '_')} | {graphs_before(results, name)} | {shown_row} |")
    commits = Counter(row["commit"] for row in replaced.values())
    rows = ", ".join(f"{one} ({n} rows)" for one, n in commits.most_common())
    old = {name: graphs_before(results, name) for name in results if name not in replaced}
    left = ", ".join(f"{name} ({before})" for name, before in old.items() if before)
    last = f"Commits: {rows}." + f" Not run again, and with the old count in the table above: {left}." * bool(left)
    command = shown("python -m benchmarks.models.coverage.replaced --below 35")
    return "\n".join([REPLACED, "", command, "", *lines, "", last])


def graphs_before(results: Mapping[str, Any], name: str) -> int:
    """How many graphs a model held when it was measured, before they had to be asked for."""
    return int(results[name].get("ours", {}).get("0.5", {}).get("graphs", 0))


def reasons(results: Mapping[str, Any]) -> str:
    """What this package could not do, in its own words; and the operators that it has no rule for."""
    lines = [f"- {name}: {why}" for name, both in results.items() if "ours" in both and (why := failure(both["ours"]))]
    unknown = Counter(op for both in results.values() for op in both.get("ours", {}).get("unknown", {}))
    operators = ", ".join(f"`{op}` ({n} models)" for op, n in unknown.most_common()) or "none"
    return "\n".join(
        [
            "## What does not work here",
            "",
            *(lines or ["Nothing."]),
            "",
            f"Operators without a rule, which freeze what they touch: {operators}.",
        ]
    )


def failure(found: Mapping[str, Any]) -> str:
    said = [words(at, found) for q in RATIOS if (at := found.get(str(q))) and at["status"] != "equal"]
    return "; ".join(dict.fromkeys([*said, *([found["died"]] if "died" in found else [])]))


def words(at: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if at["status"] == "nothing prunable":
        return (
            f"nothing prunable. {'; '.join(f'{n} channels: {reason}' for reason, n in found.get('frozen', {}).items())}"
        )
    return f"{at['status']} ({at['stage']}){': ' + at['error'] if 'error' in at else ''}"
