"""Records the operators that one forward of a model calls, as a graph.

With autograd out of the way nothing comes before a dispatch mode: it sees the operators that the model called
(``linear``, not the product it is made of), which are those of ``torch.export``, at the price of a forward. A graph is
handed out only where every
tensor is accounted for, and what the code goes on with is left as it was. Numbers read off tensors are noted, and can
be answered otherwise (``paths``).
"""

from __future__ import annotations

import operator
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_flowprune.channels.tracing.memory import layout_of, memory_of, without_content
from torch_flowprune.channels.tracing.module_runs import ModuleRuns
from torch_flowprune.channels.tracing.nodes import LITERAL, Traced, is_in_place, is_of_whole_constants, operator_name
from torch_flowprune.channels.tracing.paths import MOST_READ, Answers, Read, Recording, UnrecordableError
from torch_flowprune.channels.tracing.tellable import FOLDER_OF_OURS, FOLDER_OF_TORCH, SPANNING, is_tellable
from torch_flowprune.inputs import same_randomness, settle, tree_leaves, uncompiled
from torch_flowprune.torch_internals import BelowAutograd, MemoryWeakRef, OperatorMode, schema_of, tree_map_only

_READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
"""What hands out a tensor's content without an operator that a dispatch mode would see."""

_CONTAINERS = (dict, list, tuple)
_PACKING = tuple(f"{FOLDER_OF_TORCH}nn{os.sep}{folder}{os.sep}rnn.py" for folder in ("modules", "utils"))
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_OF_TYPES = "_has_compatible_shallow_copy_type"
"""Asked before ``data`` is set; no value decides what it answers."""
_LITERALS = ("lift_fresh", "lift_fresh_copy")
"""What ``torch.tensor`` passes the tensor to that it made of numbers."""


def recorded(
    twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, answers: Answers | None = None
) -> Recording:
    """The operators of one forward. twin: a copy of the model, thrown away afterwards, that shares the parameters.

    answers: what the code is told in place of the numbers that it reads off tensors, by their number in order.

    Raises:
        UnrecordableError: where the graph would not hold for other values; besides, what the forward raises.
    """
    recorder = _Recorder(answers or {})
    settle(twin, "train" if training else "eval")
    with (
        same_randomness(twin),
        uncompiled(),
        torch.no_grad(),
        BelowAutograd(),
    ):  # not inference mode, whose tensors a cache could keep
        args, kwargs = tree_map_only(
            Tensor, torch.clone, (args, dict(kwargs))
        )  # the code may write to what it is given
        recorder.know(twin, (args, kwargs))
        recorder.modules.follow(twin)
        with _Closed(recorder), recorder:
            outputs = twin(*args, **kwargs)
        recorder.end(outputs)
    return Traced(
        recorder.graph,
        recorder.sources,
        depends=", ".join({r.place for r in recorder.reads if not r.has_all_its_paths(len(recorder.reads))}),
        calls=recorder.modules.calls,
        runs=recorder.modules.runs,
    ), recorder.reads


class _Recorder(OperatorMode):
    """A graph that grows by a node an operator."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers, self.reads = answers, list[Read]()
        self.graph = Graph()
        self.sources: dict[Node, tuple[str, str]] = {}
        self.nodes: Any = WeakTensorKeyDictionary()
        self.kept: set[int] = set()  # memory that may be read, but not be written to: the model goes on with it
        self.held: dict[Node, Any] = {}  # whose memory, made by an operator, is still there
        self.laid_out: dict[Any, tuple[Node, Any]] = {}
        self.modules = ModuleRuns(self.nodes.get)
        self.refused = ""

    def refuse(self, why: str) -> UnrecordableError:
        """The error to raise; noted, as the model's code may catch it."""
        self.refused = self.refused or f"{why}, at {_place_in_code()}"
        return UnrecordableError(self.refused)

    # Where tensors come from.

    def know(self, model: nn.Module, inputs: Any) -> None:
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self.sources[self.placeholder(name, tensor)] = (kind, name)
        for name, tensor in _held_besides(model):
            if tensor not in self.nodes:
                self.placeholder(name, tensor)
                self.kept.add(memory_of(tensor))
        self.kept |= {memory_of(parameter) for parameter in model.parameters()}
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self.placeholder("input", tensor)

    def placeholder(self, name: str, tensor: Tensor) -> Node:
        node = self.nodes[tensor] = self.graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = without_content(tensor)
        return node

    def node_of(self, value: Any) -> Any:
        """An argument with nodes for its tensors."""
        if isinstance(value, Tensor):
            node = self.nodes.get(value)
            if node is None:
                raise self.refuse("a tensor came from outside the model and its operators")
            return node
        if isinstance(value, (list, tuple)):
            return [self.node_of(item) for item in value]
        return value

    # What becomes of them.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(one, torch.UntypedStorage) for one in args[1:]):
            return self.rebuilt(func(*args, **kwargs))
        if func.overloadpacket.__name__ == _OF_TYPES:
            return func(*args, **kwargs)
        if func.overloadpacket.__name__ in _LITERALS and args[0] not in self.nodes:
            self.placeholder(LITERAL, args[0])
        self.check(func, args, kwargs)
        freed = [held for held, memory in self.held.items() if memory.expired()]
        node = self.graph.create_node(
            "call_function",
            func,
            tuple(self.node_of(a) for a in args),
            {name: self.node_of(value) for name, value in kwargs.items()},
        )
        node.meta["nn_module_stack"] = {"": (self.modules.paths[-1], None)}
        if operator_name(node) in SPANNING:
            node.meta["tellable"] = is_tellable(self.modules.running[-1])
        for held in freed:
            del self.held[held]
            held.meta["freed_before"] = node
        read = {memory_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        return self.note(node, func(*args, **kwargs), read)

    def rebuilt(self, result: Tensor) -> Tensor:
        """A tensor laid over memory that is there, as ``copy.copy`` makes it: the one that it was made of."""
        node, memory = self.laid_out.get(layout_of(result), (None, None))
        if node is None or memory is None or memory.expired():
            said = self.refuse("a tensor was made of a copy of memory, whose content is unknown: use clone()")
            said.by_export = False
            raise said
        self.nodes[result] = node
        return result

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Before the operator runs: is what it does the same for all values, and the model left as it is?"""
        if schema_of(func).is_mutable and any(
            memory_of(tensor) in self.kept for tensor in _written(func, args, kwargs)
        ):
            raise self.refuse(f"{func} writes to a parameter or to a tensor that the model holds")

    def note(self, node: Node, result: Any, read: set[int]) -> Any:
        if isinstance(result, Tensor):
            if result in self.nodes and not is_in_place(node) and "dropout" not in operator_name(node):
                node.meta["handed_on"] = self.nodes[result]
            self.hold(node, result, read)
            self.laid_out[layout_of(result)] = node, MemoryWeakRef(result.untyped_storage())
            self.nodes[result], node.meta["val"] = node, without_content(result)
        elif isinstance(result, (list, tuple)):
            without = [without_content(item) if isinstance(item, Tensor) else None for item in result]
            node.meta |= {"val": without, "fresh": False}
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    picked = self.graph.call_function(operator.getitem, (node, i))
                    node.meta["fresh"] |= self.hold(picked, item, read)
                    self.nodes[item] = picked
                    picked.meta |= {"val": node.meta["val"][i], "nn_module_stack": node.meta["nn_module_stack"]}
        elif result is not None:
            return self.answer(node, result)
        return result

    def answer(self, node: Node, result: Any) -> Any:
        """The code reads a number: it is told what it is, or another answer that is to be tried."""
        constant = is_of_whole_constants(node, self.sources)
        if not constant and sum(not read.is_constant for read in self.reads) == MOST_READ:
            raise self.refuse(f"the code reads more than {MOST_READ} numbers off tensors")
        self.reads.append(Read(node, result, _place_in_code(), _is_read_for_packing(), constant))
        return self.answers.get(len(self.reads) - 1, result)

    def hold(self, node: Node, result: Tensor, read: set[int]) -> bool:
        """Note whether a result is in memory of its own, none that was read, and follow that until it is let go."""
        node.meta["fresh"] = fresh = memory_of(result) not in read
        if fresh:
            self.held[node] = MemoryWeakRef(result.untyped_storage())
        return fresh

    def end(self, outputs: Any) -> None:
        leaves = tree_leaves(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
                raise self.refuse(no_tensors_in(type(leaf).__name__))
        self.graph.output([self.node_of(leaf) for leaf in leaves if isinstance(leaf, (Tensor, bool, int, float))])
        if self.refused:
            raise UnrecordableError(self.refused)


class _Closed(TorchFunctionMode):
    """Refuses what reads a tensor's content past all operators."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0].numel() <= MOST_READ:
            return _as_list(args[0])
        if func == _SET_DATA and args[1] in self.recorder.nodes:
            self.recorder.nodes[args[0]] = self.recorder.nodes[args[1]]  # what is read of it from now on
        if func is Tensor.__deepcopy__ and args[0] in self.recorder.nodes:
            return args[0].clone()
        if func in _READERS:
            raise self.recorder.refuse(f"{func.__name__} hands out values")
        return func(*args, **(kwargs or {}))


def _as_list(tensor: Tensor) -> Any:
    """``tolist``, number by number."""
    return tensor.item() if tensor.ndim == 0 else [_as_list(part) for part in tensor.unbind(0)]


def no_tensors_in(kind: str) -> str:
    """What is wrong with a model that gives this kind of value."""
    return (
        f"the model gives a {kind}, in which no tensors are found: let it give tensors, in tuples, lists, dicts or "
        "dataclasses (a Transformers model that gives its cache: use_cache=False)"
    )


def _place_in_code() -> str:
    """The statement of the model's code that runs: the innermost that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((FOLDER_OF_TORCH, FOLDER_OF_OURS)):
            return f"line {frame.lineno} of {Path(frame.filename).name}" + (f": {frame.line}" if frame.line else "")
    return "a line of torch"


def _is_read_for_packing() -> bool:
    """Whether torch's recurrent layers read it, off the lengths of packed sequences."""
    frames = (
        frame for frame, _ in traceback.walk_stack(None) if not frame.f_code.co_filename.startswith(FOLDER_OF_OURS)
    )
    return next(frames).f_code.co_filename.startswith(_PACKING)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    by_name = dict(zip((argument.name for argument in schema_of(func).arguments), args, strict=False)) | kwargs
    for argument in schema_of(func).arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors_in(by_name.get(argument.name))


def _held_besides(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in plain attributes of the modules: constants, and caches of earlier calls."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, (Tensor, *_CONTAINERS)) and name not in ("_parameters", "_buffers", "_modules"):
                yield from ((name, tensor) for tensor in _tensors_in(value))


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _CONTAINERS):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)
