"""How many architectures couple, prune and shrink, and whether what is left computes the same.

    python -m benchmarks.coverage --out results/coverage            # all; resumes where it stopped
    python -m benchmarks.coverage --one timm/levit_128s             # one model, one line of JSON
    python -m benchmarks.coverage --out ... --peer PATH             # beside Torch-Pruning installed in PATH

The smallest model of every timm module and every torchvision classification model, with random weights, affine
parameters and running statistics. Of each group of channels 25 % and 50 % with the lowest L2 norm of their producers'
rows go. `equal`: masked and shrunk model agree on inputs other than the example, in float64 (float32 where the code
runs in nothing else). Every model runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_flowprune.coupling import Coupling, coupling_of, masks, reading_of, rows
from torch_flowprune.exported import ExportedModule
from torch_flowprune.graph import Reading
from torch_flowprune.proof import apply_masks, relative_error
from torch_flowprune.shrink import shrink

RATIOS = (0.25, 0.5)
LIMIT = 150  # seconds of processor time for one model and tool; wall time says more of a shared machine than of the tool
EQUAL = {"float64": 1e-10, "float32": 1e-4}


# -- the models ------------------------------------------


def smallest_of_each_module() -> Iterator[str]:
    import timm

    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
                except Exception as e:  # needs real tensors to be built: say so, take the next one
                    print(f"timm/{name} is not built on the meta device: {type(e).__name__}: {e}", file=sys.stderr)
        if sizes:
            yield f"timm/{min(sizes, key=sizes.__getitem__)}"


def torchvision_classifiers() -> Iterator[str]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield f"torchvision/{name}"


def listed(path: Path) -> list[str]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*smallest_of_each_module(), *torchvision_classifiers()], indent=1))
    return list(json.loads(path.read_text()))


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        net = timm.create_model(model)
        return net, tuple(net.default_cfg["input_size"])
    import torchvision

    side = 299 if "inception" in model else 224
    return torchvision.models.get_model(model), (3, side, side)


def randomised(model: nn.Module) -> nn.Module:
    """No default survives: zeros and ones hide faults."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim <= 1 or not p.any():
                p.mul_(torch.rand_like(p) + 0.5).add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.1 * torch.randn_like(b))
            elif name.endswith("running_var"):
                b.mul_(torch.rand_like(b) + 0.5)
    return model


# -- ours ------------------------------------------


def ours(name: str, ratios: Sequence[float]) -> dict[str, Any]:
    model, size = built(name)
    randomised(model).eval()
    x = torch.randn(2, *size)
    reading, seconds = timed(lambda: reading_of(model, x))
    coupling, more = timed(lambda: coupling_of(reading))
    result: dict[str, Any] = {
        "couple_s": seconds + more,
        "share": coupling.share(),
        "groups": len(coupling.groups),
        "unknown": dict(coupling.unknown),
    }
    for ratio in ratios:
        try:
            result[str(ratio)] = at_ratio(model, x, reading, coupling, ratio)
        except Exception as e:
            result[str(ratio)] = {"status": "refused", "error": f"{type(e).__name__}: {e}"[:300]}
    return result


def at_ratio(model: nn.Module, x: Tensor, reading: Reading, coupling: Coupling, ratio: float) -> dict[str, Any]:
    if not coupling.groups:
        return {"status": "nothing to prune"}
    parameters = dict(model.named_parameters())
    keep = {}
    for group in coupling.groups:
        order = rows(parameters, group).norm(dim=-1).argsort()
        keep[group.name] = torch.ones(group.size, dtype=torch.bool).index_fill_(0, order[: int(ratio * group.size)], False)
    given = masks(coupling, keep, parameters)
    small, seconds = timed(lambda: shrink(model, x, masks=given, coupling=coupling, reading=reading))
    error, precision = difference(model, given, small, torch.randn_like(x))
    trains(small, x)
    return {
        "status": "equal" if error < EQUAL[precision] else "WRONG",
        "precision": precision,
        "error": error,
        "shrink_s": seconds,
        "parameters": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in parameters.values()),
        "channels_removed": 1 - sum(int(k.sum()) for k in keep.values()) / sum(len(k) for k in keep.values()),
        "modules_as_graphs": sum(isinstance(m, ExportedModule) for m in small.modules()),
    }


def difference(model: nn.Module, given: dict[str, Tensor], small: nn.Module, x: Tensor) -> tuple[float, str]:
    """Largest relative difference of the outputs in float64; in float32 where the code insists on that."""
    for dtype in (torch.float64, torch.float32):
        masked = copy.deepcopy(model).to(dtype)
        apply_masks(masked, given)
        try:
            with torch.no_grad():
                pairs = zip(outputs(masked, x.to(dtype)), outputs(copy.deepcopy(small).to(dtype), x.to(dtype)), strict=True)
                return max(relative_error(a, b) for a, b in pairs), str(dtype).removeprefix("torch.")
        except RuntimeError as e:
            error = e
    raise error


def trains(small: nn.Module, x: Tensor) -> None:
    """Forward and backward in train mode."""
    small = copy.deepcopy(small).train()
    torch.stack([t.float().square().mean() for t in outputs(small, x) if t.requires_grad]).sum().backward()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [t for t in tree_leaves(model(x)) if isinstance(t, Tensor)]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Processor time: the machine is shared."""
    start = time.process_time()
    value = call()
    return value, round(time.process_time() - start, 3)


# -- the peer ------------------------------------------


def peer(name: str) -> dict[str, Any]:
    """Torch-Pruning by the recipe of its README: group magnitude, the classifier left alone, one step."""
    import torch_pruning as tp

    model, size = built(name)
    model.eval()
    x = torch.randn(2, *size)
    before = sum(p.numel() for p in model.parameters())
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    make = lambda: tp.pruner.BasePruner(  # noqa: E731
        model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=ignored
    )
    pruner, build = timed(make)
    _, step = timed(pruner.step)
    with torch.no_grad():
        model(x)
    trains(model, x)
    return {
        "status": "runs",
        "build_s": build,
        "prune_s": step,
        "parameters": sum(p.numel() for p in model.parameters()) / before,
    }


# -- all of them ------------------------------------------


def in_process(name: str, which: str, ratios: Sequence[float], path: str | None) -> dict[str, Any]:
    """One model in a process of its own."""
    env = {**os.environ, **({"PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])} if path else {})}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.coverage",
        "--one",
        name,
        "--which",
        which,
        "--ratios",
        *map(str, ratios),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * LIMIT, env=env, check=False, preexec_fn=limited)
    except subprocess.TimeoutExpired:
        return {"status": f"over {LIMIT} s"}
    if done.returncode == -signal.SIGXCPU:
        return {"status": f"over {LIMIT} s"}
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if done.returncode == 0 and lines else {"status": "raises", "error": done.stderr.strip()[-300:]}


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))


def one(name: str, which: str, ratios: Sequence[float]) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return ours(name, ratios) if which == "ours" else peer(name)


def status(result: dict[str, Any] | None, ratio: float) -> str:
    if result is None:
        return "-"
    if "status" in result:
        return str(result["status"])
    return str(result[str(ratio)]["status"]) if str(ratio) in result else "-"


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | channels prunable | couple s | 25 % | 50 % | parameters left | as graphs | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, both in results.items():
        r = both.get("ours", {})
        half = r.get("0.5", {})
        cells = [
            name,
            f"{r['share']:.0%}" if "share" in r else "-",
            f"{r['couple_s']:.1f}" if "couple_s" in r else "-",
            status(r, 0.25),
            status(r, 0.5),
            f"{half['parameters']:.0%}" if "parameters" in half else "-",
            str(half.get("modules_as_graphs", "-")),
            str(both.get("peer", {}).get("status", "-")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", summary(results)])


def summary(results: dict[str, dict[str, Any]]) -> str:
    out = []
    for library in ("timm", "torchvision"):
        chosen = {n: b for n, b in results.items() if n.startswith(library)}
        mine = [b["ours"] for b in chosen.values() if "ours" in b]
        equal = sum({status(r, q) for q in RATIOS} <= {"equal", "-"} and "share" in r for r in mine)
        wrong = sum("WRONG" in (status(r, 0.25), status(r, 0.5)) for r in mine)
        seconds = [r["couple_s"] for r in mine if "couple_s" in r]
        theirs = [b["peer"] for b in chosen.values() if "peer" in b]
        out.append(
            f"{library}: {equal} of {len(mine)} pruned, shrunk and equal at the ratios measured, {wrong} wrong"
            + (f"; coupling {median(seconds):.1f} s at the median" if seconds else "")
            + (f"; Torch-Pruning: {sum(t['status'] == 'runs' for t in theirs)} of {len(theirs)} run" if theirs else "")
            + "."
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("coverage"), help="written: OUT.json and OUT.md, and the list of models")
    parser.add_argument("--one", help="a single model, as library/name")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="shares of each group that go")
    parser.add_argument("--which", choices=("ours", "peer"), default="ours")
    parser.add_argument("--peer", help="where Torch-Pruning is installed; it is then measured too")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.which, args.ratios)))
        return
    data = args.out.with_suffix(".json")
    results: dict[str, dict[str, Any]] = json.loads(data.read_text()) if data.exists() else {}
    for name in listed(args.out.with_suffix(".models.json")):
        for which in ("ours", "peer") if args.peer else ("ours",):
            path = args.peer if which == "peer" else None
            if which not in results.get(name, {}):
                results.setdefault(name, {})[which] = in_process(name, which, args.ratios, path)
                data.write_text(json.dumps(results, indent=1))
                args.out.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
