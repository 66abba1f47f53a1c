"""One model, one tool: coupled, a share of each group's channels removed, and held against the masked model.

`equal`: the pruned model computes what the unpruned one does with the same slices of its parameters at zero, on inputs
other than the example, in float64. What was removed is read off each tool's own work, so both are held to the same
account.
"""

from __future__ import annotations

import copy
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models.coverage.models import built
from torch_flowprune.channels.coupling import coupling_of, reading_of
from torch_flowprune.channels.group_masks import channel_masks, rows
from torch_flowprune.channels.shrinking.graphs.exported_module import ExportedModule
from torch_flowprune.channels.shrinking.proof.equivalence import relative_error
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.masking import write_zeros

RATIOS = (0.5, 0.25)
LIMIT = 150  # seconds of processor time to build and prune; wall time says more of a shared machine than of the tool
EQUAL = {"float64": 1e-10, "float32": 1e-5}
TELLING = 100  # the masks have to move the outputs by so many times that, or equality says nothing
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class OverLimit(BaseException):
    """No `Exception`: the code that is measured must not catch it."""


def timed(call: Callable[[], Any], limit: float) -> tuple[Any, float]:
    """A call's value and its processor time; `OverLimit` where it takes longer than that."""

    def stop(*_: object) -> None:
        raise OverLimit

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, max(limit, 0.01))
    start = time.process_time()
    try:
        value = call()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return value, time.process_time() - start


# -- the tools ------------------------------------------


class Ours:
    """Couple once, then per ratio.

    The channels of each group with the lowest norm of their producers' rows, masks, `shrink`.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.parameters = dict(model.named_parameters())

    def prepare(self) -> None:
        pass

    def build(self, ratio: float) -> None:  # noqa: ARG002 - the same for every ratio
        if not hasattr(self, "coupling"):
            self.reading = reading_of(self.model, self.x)
            self.coupling = coupling_of(self.reading)

    def facts(self) -> dict[str, Any]:
        frozen: Counter[str] = Counter()
        for f in self.coupling.frozen:
            if f.role == "producer":
                frozen[f.reason.split(" (")[0]] += f.positions
        found = {
            "share": self.coupling.share(),
            "groups": len(self.coupling.groups),
            "unknown": dict(self.coupling.unknown),
        }
        return found | {"frozen": dict(frozen.most_common())}

    def prune(self, ratio: float) -> nn.Module:
        keep = {}
        for group in self.coupling.groups:
            order = rows(self.parameters, group).norm(dim=-1).argsort()
            keep[group.name] = torch.ones(group.size, dtype=torch.bool).index_fill_(
                0, order[: int(ratio * group.size)], False
            )
        self.given = channel_masks(self.coupling, keep, self.parameters)
        return shrink(self.model, self.x, masks=self.given, coupling=self.coupling, reading=self.reading)

    def kept(self, small: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002 - read off the pruned model by the peer
        return self.given


class Peer:
    """Torch-Pruning by the recipe of its README.

    Group magnitude, sizes rounded to eight, the classifier (of whatever kind) left alone, one step.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.dense, self.x = model, x
        self.classes = outputs(model, x)[0].shape[-1]

    def prepare(self) -> None:
        """Its pruner changes the model that it is given."""
        self.model = copy.deepcopy(self.dense)

    def build(self, ratio: float) -> None:
        import torch_pruning as tp

        ignored = [m for m in self.model.modules() if isinstance(m, LAYERS) and channels(m) == self.classes]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        self.pruner = tp.pruner.BasePruner(
            self.model, self.x, importance=importance, pruning_ratio=ratio, ignored_layers=ignored, round_to=8
        )

    def facts(self) -> dict[str, Any]:
        """The share of output channels in the groups that its pruner goes through."""
        graph, free = self.pruner.DG, {}
        for group in graph.get_all_groups(
            ignored_layers=self.pruner.ignored_layers, root_module_types=self.pruner.root_module_types
        ):
            for dependency, positions in group:
                module = dependency.target.module
                if isinstance(module, LAYERS) and graph.is_out_channel_pruning_fn(dependency.handler):
                    free[module] = len(set(positions))
        version = {"version": metadata.version("torch-pruning")}
        return version | {
            "share": sum(free.values()) / sum(channels(m) for m in self.model.modules() if isinstance(m, LAYERS))
        }

    def prune(self, ratio: float) -> nn.Module:  # noqa: ARG002 - given when the pruner was made
        for p in self.model.parameters():
            number(p)
        self.pruner.step()
        return self.model

    def kept(self, small: nn.Module) -> dict[str, Tensor] | None:
        """Masks of the dense model, from the numbers that the positions left carry.

        None where they were lost on the way.
        """
        dense, out = dict(self.dense.named_parameters()), {}
        for name, p in small.named_parameters():
            if p.grad is None or name not in dense:
                return None
            left = p.grad.view(torch.int32).long()
            if not torch.equal(dense[name].detach().flatten()[left], p.detach()):
                return None
            out[name] = grid(dense[name].shape, left)
        for p in small.parameters():
            p.grad = None
        return out


def number(p: nn.Parameter) -> None:
    """Every position its own number, as the bits of a gradient.

    What slices the parameter slices its gradient likewise.
    """
    p.grad = torch.arange(p.numel(), dtype=torch.int32).view(torch.float32).reshape(p.shape)


def grid(shape: Sequence[int], left: Tensor) -> Tensor:
    """(shape) bool: False where an axis has lost the position. left: the flat positions that remain."""
    mask = torch.ones(tuple(shape), dtype=torch.bool)
    for axis, positions in enumerate(torch.unravel_index(left.flatten(), tuple(shape))):
        gone = torch.ones(shape[axis], dtype=torch.bool)
        gone[positions] = False
        mask.index_fill_(axis, gone.nonzero().flatten(), False)
    return mask


TOOLS = {"ours": Ours, "peer": Peer}


# -- one model ------------------------------------------


def trial(which: str, name: str, ratios: Sequence[float], limit: float = LIMIT) -> Iterator[dict[str, Any]]:
    """What is known so far, stage by stage, so that a process which dies leaves what it had."""
    model, x = built(name)
    tool = TOOLS[which](model, x)
    oracle = Oracle(model, torch.randn_like(x))
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for ratio in ratios:
        for stage in at_ratio(tool, oracle, x, ratio, limit, result):
            result[str(ratio)] = stage
            yield result
        if result[str(ratio)]["status"].startswith("over"):
            return


def building(which: str, name: str, limit: float = LIMIT) -> Iterator[dict[str, Any]]:
    """The seconds to build alone."""
    tool = TOOLS[which](*built(name))
    tool.prepare()
    yield {"build_s": timed(lambda: tool.build(RATIOS[0]), limit)[1]}


def at_ratio(
    tool: Any, oracle: Oracle, x: Tensor, ratio: float, limit: float, shared: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"status": "stopped", "stage": "build"}
    yield found
    try:
        tool.prepare()
        _, seconds = timed(lambda: tool.build(ratio), limit)
        if "build_s" not in shared:
            shared |= {"build_s": round(seconds, 3), **tool.facts()}
        found["stage"] = "prune"
        yield found
        small, found["prune_s"] = timed(lambda: tool.prune(ratio), limit - seconds)
        found |= {"prune_s": round(found["prune_s"], 3), "stage": "forward"}
        yield found
        runs(small, x)
        found["stage"] = "backward"
        trains(small, x)
        found["stage"] = "compare"
        yield found
        found |= compared(oracle, tool.kept(small), small)
        found["stage"] = "done"
    except OverLimit:
        found["status"] = f"over {limit:g} s"
    except Exception as e:
        found |= {"status": "raises", "error": f"{type(e).__name__}: {e}"[:300]}
    yield found


def runs(small: nn.Module, x: Tensor) -> None:
    outputs(small.eval(), x)


def trains(small: nn.Module, x: Tensor) -> None:
    """Forward and backward in train mode."""
    small = copy.deepcopy(small).train()
    found = [t for t in tree_leaves(small(x)) if isinstance(t, Tensor) and t.requires_grad]
    torch.stack([t.float().square().mean() for t in found]).sum().backward()


def compared(oracle: Oracle, kept: Mapping[str, Tensor] | None, small: nn.Module) -> dict[str, Any]:
    model = oracle.model
    facts = {
        "parameters": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
        "graphs": sum(isinstance(m, ExportedModule) for m in small.modules()),
    }
    if kept is None:
        return {**facts, "status": "runs", "error": "which positions are left cannot be told"}
    gone = channels_gone(model, kept)
    if not gone:
        return {**facts, "status": "nothing prunable", "channels": 0.0}
    error, moved, precision = oracle.difference(kept, small)
    return {
        **facts,
        "status": verdict(error, moved, EQUAL[precision]),
        "channels": gone,
        "difference": error,
        "moved": moved,
        "precision": precision,
    }


def verdict(error: float, moved: float, tolerance: float) -> str:
    if not error < tolerance:
        return "differs"
    return "equal" if moved > TELLING * tolerance else "runs"


def channels_gone(model: nn.Module, kept: Mapping[str, Tensor]) -> float:
    """The share of output channels of linear layers and convolutions of which nothing is left."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    gone = 0
    for name, m in layers.items():
        mask = kept.get(f"{name}.weight" if name else "weight")
        if mask is not None:
            gone += int((~mask.movedim(1 if getattr(m, "transposed", False) else 0, 0).flatten(1).any(1)).sum())
    return gone / sum(channels(m) for m in layers.values())


def channels(m: nn.Module) -> int:
    return m.out_features if isinstance(m, nn.Linear) else m.out_channels


class Oracle:
    """The dense model on inputs that are not the example, in float64.

    Or in float32, where its code, or the pruned model's, insists on that.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    @cache  # noqa: B019 - there is one for a process
    def dense(self, dtype: torch.dtype) -> tuple[list[Tensor], str]:
        """Outputs, and the precision of the least precise step."""
        with Casts() as casts:
            found = outputs(copy.deepcopy(self.model).to(dtype), self.x.to(dtype))
        return found, "float32" if casts.found else str(dtype).removeprefix("torch.")

    def difference(self, kept: Mapping[str, Tensor], small: nn.Module) -> tuple[float, float, str]:
        """Between the outputs of masked and pruned model, and of masked and dense; and their precision."""
        for dtype in (torch.float64, torch.float32):
            try:
                found = outputs(copy.deepcopy(small).to(dtype), self.x.to(dtype))
                dense, precision = self.dense(dtype)
            except RuntimeError as e:
                error = e
                continue
            masked = copy.deepcopy(self.model).to(dtype)
            write_zeros(masked, dict(kept))
            expected = outputs(masked, self.x.to(dtype))
            return largest(expected, found), largest(expected, dense), precision
        raise error


def largest(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    return max(difference_of(a, b) for a, b in zip(expected, found, strict=True))


def difference_of(a: Tensor, b: Tensor) -> float:
    return relative_error(a, b) if a.shape == b.shape else float("inf")


class Casts(TorchDispatchMode):
    """Notes whether the model's own code goes below float64."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        low = (torch.float32, torch.float16, torch.bfloat16)
        self.found |= (
            func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in low and args[0].is_floating_point()
        )
        return func(*args, **kwargs)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [t for t in tree_leaves(model(x)) if isinstance(t, Tensor)]
