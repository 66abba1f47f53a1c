"""Code that is run with every place watched at which it tells numbers to operators."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.shrinking.own_code.code_read import names_reached
from torch_flowprune.channels.shrinking.own_code.code_source import (
    BOUNDS,
    Slot,
    SourceFunction,
    code_of_class,
    index_parts,
    rebuilt_functions,
    slots_told,
)
from torch_flowprune.channels.shrinking.own_code.edited_code import NAMES, edits_of, own_class, tree_with
from torch_flowprune.channels.shrinking.own_code.running_modules import RunningModules
from torch_flowprune.masking import quiet_subclass

Place = tuple[str, str, int]
"""A module's path, a function, and the number of a place in it."""

_OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}  # fmt: skip


class _Watched(ast.NodeTransformer):
    """Calls and operations of interest go by way of a watcher."""

    def __init__(self, function: SourceFunction, tree: ast.FunctionDef) -> None:
        self.name, arguments = function.name, tree.args.posonlyargs + tree.args.args
        self.owner = arguments[0].arg if function.owner is not None and arguments else None
        self.places = function.places

    def whole(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(tree)
        entered = ast.Call(ast.Name("entered__", ast.Load()), self._about(), [])
        tree.body.insert(0, ast.copy_location(ast.Expr(entered), tree.body[0]))
        return tree

    def _about(self) -> list[ast.expr]:
        """The owner and the name of the function, as a watcher takes them."""
        owner = ast.Name(self.owner, ast.Load()) if self.owner else ast.Constant(None)
        return [owner, ast.Constant(self.name)]

    def _number(self, node: Any) -> int | None:
        number: int | None = getattr(node, "place", None)
        return number if number in self.places else None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        number = self._number(node)
        self.generic_visit(node)
        if number is None or getattr(node.func, "id", "") in NAMES:  # whose arguments are others
            return node
        groups = ast.Tuple([ast.Tuple([argument], ast.Load()) for argument in node.args], ast.Load())
        keywords = ast.Dict([ast.Constant(k.arg) for k in node.keywords], [k.value for k in node.keywords])
        return self._by_way_of("called__", node, number, [node.func, groups, keywords])

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        number = self._number(node)
        self.generic_visit(node)
        if number is None:
            return node
        return self._by_way_of(
            "computed__", node, number, [ast.Constant(type(node.op).__name__), node.left, node.right]
        )

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        number = self._number(node)
        self.generic_visit(node)
        if number is None:
            return node
        parts = [
            [getattr(part, bound) or ast.Constant(None) for bound in BOUNDS] if isinstance(part, ast.Slice) else [part]
            for part in index_parts(node)
        ]
        groups = ast.Tuple([ast.Tuple(part, ast.Load()) for part in parts], ast.Load())
        several = ast.Constant(isinstance(node.slice, ast.Tuple))
        return self._by_way_of("cut__", node, number, [node.value, groups, several])

    def _by_way_of(self, watcher: str, node: ast.AST, number: int, arguments: list[ast.expr]) -> ast.AST:
        about = [*self._about(), ast.Constant(number)]
        return ast.copy_location(ast.Call(ast.Name(watcher, ast.Load()), [*about, *arguments], []), node)


class CodeWatcher:
    """What watched code goes by way of: by module and place, in order.

    only: the modules whose classes are watched, if not all.
    """

    def __init__(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        self.running, self.paths = RunningModules(), {path for path, _ in model.named_modules()}
        self.classes = {path: own_class(type(module)) for path, module in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.own_paths = {id(module): path for path, module in model.named_modules()}
        names = {"called__": self.called, "computed__": self.worked_out, "cut__": self.cut, "entered__": self.entered}
        picked = self.modules.values() if only is None else [self.modules[path] for path in only]
        reached = names_reached(dict.fromkeys(self.classes.values()))
        classes = {cls: _watched_class(cls, names, reached) for cls in dict.fromkeys(map(type, picked))}
        for module in model.modules():
            module.__class__ = classes.get(type(module), type(module))
        self.running.watch(model, self.paths)

    def place(self, owner: Any, function: str, number: int) -> Place | None:
        """None where the code is not of the module that runs it."""
        running = self.running.paths[-1] if self.running.paths else ""
        path = running if owner is None else self.own_paths.get(id(owner), "\0")
        known = path in self.classes and function in code_of_class(self.classes[path])
        return (path, function, number) if known else None

    def function(self, place: Place) -> SourceFunction:
        return code_of_class(self.classes[place[0]])[place[1]]

    def parts(self, place: Place, groups: Any, keywords: Any) -> list[tuple[Slot, Any]]:
        node = self.function(place).places[place[2]]
        assert isinstance(node, (ast.Call, ast.Subscript))
        return slots_told(node, groups, keywords)

    def entered(self, owner: Any, function: str) -> None:
        """A function begins to run."""

    def called(
        self, owner: Any, function: str, number: int, what: Callable[..., Any], groups: Any, keywords: Any
    ) -> Any:
        raise NotImplementedError

    def worked_out(self, owner: Any, function: str, number: int, name: str, left: Any, right: Any) -> Any:
        raise NotImplementedError

    def cut(self, owner: Any, function: str, number: int, value: Any, groups: Any, several: bool) -> Any:
        """An index with slices: of tensors it tells their operators where to cut."""
        what = partial(_cut_out, value, tuple(map(len, groups)), several)
        if not isinstance(value, Tensor):
            return what(*(part for group in groups for part in group))
        return self.called(owner, function, number, what, groups, {})


def _cut_out(value: Any, lengths: Sequence[int], several: bool, *parts: Any) -> Any:
    """What was cut out, by an index that was taken apart."""
    left = iter(parts)
    index = [next(left) if length == 1 else slice(*(next(left) for _ in range(length))) for length in lengths]
    return value[tuple(index) if several else index[0]]


def _watched_class(cls: type[nn.Module], names: Mapping[str, Any], reached: Collection[str]) -> type[nn.Module]:
    code = code_of_class(own_class(cls))
    functions = {name: function for name, function in code.items() if function.function.__name__ in reached}
    changed = [name for name, function in functions.items() if function.places]
    if not changed:
        return cls

    def watched(function: SourceFunction) -> ast.FunctionDef:
        tree = tree_with(function, edits_of(cls))
        return _Watched(function, tree).whole(tree)

    anew = rebuilt_functions(functions, changed, watched, {**NAMES, **names})
    space = {one.function.__name__: new for one, new in anew}
    return quiet_subclass(cls, cls.__name__, {**space, "__module__": cls.__module__})


def operation_named(name: str) -> Callable[[Any, Any], Any]:
    """What a kind of operation does, by its name in trees."""
    return next(function for kind, function in _OPERATIONS.items() if kind.__name__ == name)
