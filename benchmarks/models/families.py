"""Which models the package carries: one of every family, pruned, trained, copied, averaged, saved, loaded, made dense.

    python -m benchmarks.models.families [--only REGEX] [--jobs 1] [--timeout 240] [--again REGEX]
        [--out FILE.json] [--docs docs/results/families.md]

Every model runs in a process of its own. What is done is kept (``--work``), so that a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.measure import commit, environment
from benchmarks.common.page import shown, wrapped
from benchmarks.common.record import RESULTS
from benchmarks.models import lifecycle, zoo

_PROCESSES = multiprocessing.get_context("forkserver")
COMMAND = "python -m benchmarks.models.families"
NO_SECOND_DERIVATIVE = "H·g needs second derivatives, and an operator of this model has none"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    keys = _keys(options.work)
    chosen = [key for key in keys if re.search(options.only, key)]
    pending = [
        key for key in chosen if not _file(options.work, key).exists() or _repeat(options.work, key, options.again)
    ]
    _PROCESSES.set_forkserver_preload(["benchmarks.models.lifecycle"])
    with ThreadPoolExecutor(options.jobs) as pool:
        list(
            tqdm(
                pool.map(lambda key: _record(options.work, key, options.timeout), pending),
                total=len(pending),
                desc="models",
                unit="model",
            )
        )
    results = [
        json.loads(_file(options.work, key).read_text()) for key in sorted(keys) if _file(options.work, key).exists()
    ]
    machine = environment()
    _write(options.out, json.dumps({"environment": machine, "results": results}, indent=1) + "\n")
    if options.docs:
        _write(options.docs, page(machine, results, keys))
    print(summary(results, keys))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Prune one model of every family and check what it must survive."
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only the models whose source/family/name matches")
    parser.add_argument(
        "--again",
        default="",
        metavar="REGEX",
        help="repeat those whose 'source/family/name status' matches, e.g. 'failed$'",
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one model")
    parser.add_argument("--work", type=Path, default=Path("build/families"), help="where each model's result is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "models" / "families.json", help="all results as JSON")
    parser.add_argument("--docs", type=Path, default=None, help="write the page with the table there")
    return parser


# ------------------------------------------------------------------------------------------------- one model


def examine(key: str) -> dict[str, Any]:
    """The row of one model: how it was built, and the outcome of every check for every measure and granularity."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        subject = zoo.build(key)
    except zoo.CannotRun as error:
        return {"status": "cannot run", "reason": str(error)[:400]}
    count = sum(parameter.numel() for parameter in subject.model.parameters())
    runs = {
        f"{granularity} {measure}": lifecycle.Lifecycle(subject, measure, granularity).run()
        for granularity in lifecycle.GRANULARITIES
        for measure in lifecycle.MEASURES
    }
    return {"status": _verdict(runs), "how": subject.how, "parameters": count, "runs": runs}


def _verdict(runs: dict[str, Any]) -> str:
    outcomes = [outcome for run in runs.values() for outcome in run["checks"].values() if outcome]
    if not outcomes:
        return "ok"
    return "ok without H·g" if all(NO_SECOND_DERIVATIVE in outcome for outcome in outcomes) else "failed"


def _record(work: Path, key: str, timeout: float) -> None:
    """In a process of its own, forked from one that has the libraries loaded."""
    start = time.perf_counter()
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_send, args=(sender, key))
    process.start()
    sender.close()
    result = {"status": "timeout", "reason": f"over {timeout:g} s"}
    if receiver.poll(timeout):
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            result = {"status": "crashed", "reason": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    _write(
        _file(work, key),
        json.dumps(
            {"key": key, "commit": commit(), **result, "seconds": round(time.perf_counter() - start, 1)}, indent=1
        ),
    )


def _send(sender: Connection, key: str) -> None:
    warnings.simplefilter("ignore")
    sender.send(examine(key))


def _file(work: Path, key: str) -> Path:
    return work / f"{key.replace('/', '__')}.json"


def _repeat(work: Path, key: str, pattern: str) -> bool:
    return (
        bool(pattern) and re.search(pattern, f"{key} {json.loads(_file(work, key).read_text())['status']}") is not None
    )


def _keys(work: Path) -> list[str]:
    """The models of the table, found once: counting the parameters of over 1,300 takes two minutes."""
    known = work / "keys.json"
    if not known.exists():
        _write(known, json.dumps(zoo.keys(), indent=1))
    return list(json.loads(known.read_text()))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the table


_COLUMNS = {
    f"{granularity} {measure}": f"{granularity}: {short}"
    for granularity in ("weight", "filter")
    for measure, short in (
        ("magnitude", "magnitude"),
        ("loss_preservation", "loss"),
        ("gradient_norm_preservation", "gradient norm"),
    )
}


def summary(results: list[dict[str, Any]], keys: Sequence[str]) -> str:
    """How many ended how, and which were not run."""
    counts: dict[str, int] = {}
    for result in results:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    ends = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    missing = sorted(set(keys) - {result["key"] for result in results})
    return f"{len(results)} of {len(keys)} models run: {ends}" + (f"; not run: {', '.join(missing)}" if missing else "")


def page(machine: dict[str, Any], results: list[dict[str, Any]], keys: Sequence[str]) -> str:
    """The documentation page: what was done, the table, and every failure with its reason."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    header = ["model", "built with", "parameters", *_COLUMNS.values()]
    rows = [header, ["---"] * len(header), *(_row(result) for result in results)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = _PAGE.format(
        summary=summary(results, keys),
        versions=versions,
        processor=machine["processor"],
        command=shown(f"{COMMAND} --docs docs/results/families.md"),
        table=table,
        notes=_notes(results),
    )
    return wrapped(text)


_PAGE = """# Model families

One model of every family: the smallest of each module in `timm.list_modules()`, of each torchvision module
(classification, detection, segmentation, video), and small BERT, GPT-2 and Llama models built from a config. Each model
is trained for three steps. Then it passes eight checks, for single weights and for filters, by magnitude, loss
preservation and gradient norm:

1. It is pruned to 50 %: exactly half of the units are pruned. Every layer keeps a tenth.
2. Its output equals that of a *dense twin*, an unpruned model with the zeros written into its weights (into the kernel,
   if a convolution standardises its weight first).
3. It is trained for two steps of Adam with weight decay. In each step, the loss and the gradient of every parameter are
   those of the twin, masked.
4. It equals the twin again: the masks hold in the weights that the forward pass uses.
5. It is copied (`copy.deepcopy`), and the copy is trained.
6. It is averaged (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEmaV3`).
7. Its `state_dict` is saved, and loaded into a new pruned model.
8. It is made dense (`fp.remove`). Names, order and output are as before, and the state loads into an unpruned model.

Outputs, losses and gradients may differ by 1e-4 of their largest value. A cell says whether all eight checks pass, and
the seconds they took on one thread of a shared machine.

**{summary}.**

{command}

{versions}; {processor}, one thread.

{table}

{notes}"""


def _row(result: dict[str, Any]) -> list[str]:
    how = ", ".join(f"{key} {value}" for key, value in result.get("how", {}).items() if key != "img_size")
    count = f"{result['parameters'] / 1e6:.1f} M" if "parameters" in result else ""
    name = result["key"].removeprefix("timm/").replace("_", "\\_")
    return [name, how, count, *(_cell(result, column) for column in _COLUMNS)]


def _cell(result: dict[str, Any], column: str) -> str:
    run = result.get("runs", {}).get(column)
    if run is None:
        return str(result["status"])
    if NO_SECOND_DERIVATIVE in (run["checks"]["prune"] or ""):
        return "no H·g"
    failed = [check.replace("_", " ") for check, outcome in run["checks"].items() if outcome]
    return f"{'**' + ', '.join(failed) + '**' if failed else 'ok'} {run['seconds']:.1f}"


def _notes(results: list[dict[str, Any]]) -> str:
    reasons = [(result["key"], reason) for result in results for reason in _reasons(result)]
    failures = "\n".join(f"- `{key}`: {reason}" for key, reason in reasons) or "None."
    parts = [
        ("What failed, and why", "", failures),
        ("Where `fp.remove` is refused", _REFUSED, _remarks(results, "remove is refused")),
        ("Averages of infinite buffers", _INFINITE, _remarks(results, "an average makes nan")),
        ("Other", _UNSEEN, _remarks(results, "zeros not seen")),
    ]
    return "\n\n".join("\n\n".join(filter(None, (f"## {title}", text, rows))) for title, text, rows in parts) + "\n"


def _remarks(results: list[dict[str, Any]], kind: str) -> str:
    found = {
        result["key"]: note
        for result in results
        for run in result.get("runs", {}).values()
        for note in run["notes"]
        if note.startswith(kind)
    }
    return "\n".join(f"- `{key}`: {note}" for key, note in found.items()) or "None."


_REFUSED = """Convolutions that standardise their weight before they use it: the mask acts on the kernel, where it holds
through training, copies and loading like any other; a dense model has no place for such zeros. Whole filters can be
removed."""
_INFINITE = """A clamp that starts without limits keeps ±inf in buffers, of which timm's EMA makes nan (inf - inf), of
the dense model too."""
_UNSEEN = """A masked tensor was not seen, zeros in place, among the operands of a convolution or matrix product in eval
mode (weights that are rearranged first, heads that only training uses). The twin shows that the result is that of
zeros in the parameter."""


def _reasons(result: dict[str, Any]) -> list[str]:
    if "reason" in result:
        return [f"{result['status']}: {_line(result['reason'])}"]
    found: dict[str, list[str]] = {}
    for column, run in result["runs"].items():
        for check, outcome in run["checks"].items():
            if outcome:
                found.setdefault(_line(outcome), []).append(f"{column} ({check})")
    return [f"{', '.join(where)}: {outcome}" for outcome, where in found.items()]


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
