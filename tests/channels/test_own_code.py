"""Shrunk models keep their own code: attributes are set, and where a size is no attribute, the number in the code."""

from __future__ import annotations

import copy
import functools
import json
import linecache
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from channel_cases import assert_equal_without
from torch import Tensor, nn

import torch_flowprune as fp
from torch_flowprune.channels import ShrinkError, couple
from torch_flowprune.channels.shrinking.own_code.edited_code import edits_of, own_class, with_edits
from torch_flowprune.channels.shrinking.own_code.said_numbers import Turns, in_turn, share, value_over

TOKENS = torch.randn(2, 5, 8, dtype=torch.float64)
IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64)


class Attends(nn.Module):
    """Attention whose code reads the width off its input: no attribute states it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.0)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: float = 0.5) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.mT * scale + (0 if bias is None else bias)).softmax(-1) @ v
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Attends(), Attends(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x), bias=x.mean()))


def windows(x: Tensor, size: int, heads: int) -> Tensor:
    """A function beside the class, as some libraries have them."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads) * size


def helped(x: Tensor, heads: int) -> Tensor:
    return windows(x, 2, heads)


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = helped(self.a(x), 4)
        return self.b((h * torch.arange(1, 1 + h.shape[-1])).flatten(2))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))

    def inner(self, h: Tensor) -> Tensor:
        return torch.relu(h)


class Literal(Base):
    def inner(self, h: Tensor) -> Tensor:
        return super().inner(h).reshape(-1, 8, 6 * 6).unflatten(-1, (6, 6))


class Splits(Base):
    def inner(self, h: Tensor) -> Tensor:
        one, other = torch.split(h, [3, 5], dim=1)
        return torch.cat([one, other.relu()], 1)


class Scales(Base):
    """A number read off the width: the dense model's holds."""

    def inner(self, h: Tensor) -> Tensor:
        return super().inner(h) * math.sqrt(h.shape[1]) + h / h.shape[1] + h.shape[1] ** -0.5 * h


class Shape(Base):
    """A size in a tuple beside the batch, and an attribute of the same value that means something else."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.unrelated = (8, 36), 8

    def inner(self, h: Tensor) -> Tensor:
        h = h.flatten(2).reshape((len(h), *self.sizes[:1], 36)) if self.unrelated != 8 else h.flatten(2)
        return h.reshape((len(h), 8, 6, 6))


class Held(Base):
    """A shape in a variable, with the batch's size in it, which is not the example's for ever."""

    def inner(self, h: Tensor) -> Tensor:
        shape = (*h.shape[:1], 8, 36)
        return super().inner(h).reshape(shape).unflatten(-1, (6, 6))


class Stored(Base):
    """A shape in an attribute, of which one number is a width, beside another that only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.steps = torch.Size((-1, 8, 36)), 8

    def inner(self, h: Tensor) -> Tensor:
        return super().inner(h).reshape(self.view).unflatten(-1, (6, 6)) * self.steps


class Fused(Base):
    """Slices, from the end too, of which one goes on to the end, and of a sequence that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3

    def inner(self, h: Tensor) -> Tensor:
        start = self.width
        one, other, rest = h[:, :start], h[:, start : 2 * self.width], h[:, -2:, ...]
        return torch.cat([one.relu(), other.tanh(), rest], 1).reshape(*h.shape[:1], -1, *h.shape[2:4])


class Mixed(Base):
    """A size of batch and channels at once, alone and in a shape that is held."""

    def inner(self, h: Tensor) -> Tensor:
        shape = (len(h) * 8, 36)
        return torch.relu(h).reshape(len(h) * 8, 36).reshape(shape).reshape(-1, 8, 6, 6)


class MakesValues(Base):
    """Numbers that are values of tensors, not sizes: the dense model's hold."""

    def inner(self, h: Tensor) -> Tensor:
        return super().inner(h) / torch.sqrt(torch.tensor(h.shape[1])) + torch.as_tensor([h.shape[1], 1.0]).sum()


class OneSize(Base):
    """Takes images of another size too, and mixes samples up: nothing that a user would do."""

    def inner(self, h: Tensor) -> Tensor:
        return torch.relu(h).reshape(-1, 8, 6, 6)


class EachTime(Base):
    """One helper for several tensors, whose sizes are others once they have shrunk; one of them stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), 4
        self.b = nn.Conv2d(24, 2, 1)

    def heads(self, h: Tensor) -> Tensor:
        return h.view(len(h), 2, self.width, *h.shape[2:])

    def heads_of_shape(self, h: Tensor) -> Tensor:
        shape = (len(h), 2, self.width, 6, 6)
        return h.view(shape).view(*shape)

    def forward(self, x: Tensor) -> Tensor:
        made = [layer(x) for layer in (self.a, self.c, self.d)]
        h = [self.heads(one).softmax(1) * self.heads_of_shape(one).tanh() for one in made]
        return self.b(torch.cat(h, 2).flatten(1, 2))


class InTurn(Base):
    """Lines in loops that need another number in each run: in a list, times the batch's size, in a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(3)), nn.Conv2d(24, 2, 1)
        self.width = 4
        self.dropped: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        heads = [self.head(x) for _ in range(2)]
        return sum(heads[1:], heads[0])

    def head(self, x: Tensor) -> Tensor:
        made = []
        for layer in self.a:
            if layer not in self.dropped:
                halves = layer(x).split([self.width, self.width], 1)
                rows = [half.flatten(0, 1).split([len(x) * self.width], 0)[0].tanh() for half in halves]
                shape = (len(x), self.width, 36)
                made += [row.reshape(shape).relu() for row in rows]
        return self.b(torch.cat(made, 1).unflatten(-1, (6, 6)))


def renaming(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As libraries wrap methods whose arguments have new names."""

    @functools.wraps(function)
    def wrapped(self: nn.Module, *args: Tensor, old: Tensor | None = None) -> Tensor:
        return function(self, *(args if old is None else (old,)))

    return wrapped


class Decorated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(old=self.a(x)))

    @renaming
    @renaming
    def inner(self, h: Tensor) -> Tensor:
        return super().inner(h).reshape(-1, 8, 6, 6)


def closed_over(width: int) -> type[Base]:
    class Closed(Base):
        def inner(self, h: Tensor) -> Tensor:
            return super().inner(h).reshape(-1, width, 6, 6)

    return Closed


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "widths of the input": (Twice, TOKENS),
    "functions beside the class": (Helped, TOKENS),
    "a literal, under super": (Literal, IMAGES),
    "a list": (Splits, IMAGES),
    "fractions and operations": (Scales, IMAGES),
    "a tuple": (Shape, IMAGES),
    "a closure": (closed_over(8), IMAGES),
    "a shape in a variable": (Held, IMAGES),
    "a decorated method": (Decorated, IMAGES),
    "a shape in an attribute": (Stored, IMAGES),
    "slices": (Fused, IMAGES),
    "a literal that takes another size": (OneSize, torch.cat([IMAGES, -IMAGES])),
    "values made of a size": (MakesValues, IMAGES),
    "a product with the batch": (Mixed, IMAGES),
    "another number each time": (EachTime, IMAGES),
    "another number in each run of a loop": (InTurn, IMAGES),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, x = CASES[name]
    torch.manual_seed(0)
    return make().double().eval(), x


def halved(name: str, **words: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = made(name)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    return model, fp.shrink(model, x, **words), x


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same_for_other_batches_too(name: str) -> None:
    model, x = made(name)
    coupling = couple(model, x)
    assert coupling.groups
    small = assert_equal_without(model, x, coupling, {g.name: list(range(g.size // 2)) for g in coupling.groups})
    assert type(small) is type(model) or own_class(type(small)) is type(model)
    _, small, x = halved(name)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for other in (x[:1], torch.cat([x, x, x])):
        masked, _ = halved(name)[:2]
        torch.testing.assert_close(small(other), masked(other))


@pytest.mark.parametrize("name", CASES)
def test_and_shrinks_again(name: str) -> None:
    _, small, x = halved(name)
    coupling = couple(small, x)
    assert_equal_without(small, x, coupling, {g.name: [0] for g in coupling.groups})


def test_what_was_handed_to_a_forward_is_handed_on() -> None:
    """Other lengths, biases given or not, numbers, in training and not: the code is the user's."""
    model, small, _ = halved("widths of the input")
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(small(x), model(x))
    short = torch.randn(3, 7, small.a.qkv.in_features, dtype=torch.float64)
    assert not torch.allclose(small.a(short, scale=3.0), small.a(short))
    assert not torch.allclose(small.a(short, torch.randn(7, 7, dtype=torch.float64)), small.a(short))
    small.train().a.drop.p = 0.5
    assert not torch.equal(small(x), small(x))


def test_the_lines_are_shown() -> None:
    _, small, _ = halved("widths of the input")
    assert list(fp.replaced_modules(small)) == ["a"]
    for said in fp.replaced_modules(small)["a"]:
        line, text = said.split(": ", 1)
        number, file = line.removeprefix("line ").split(" of ")
        assert file == "test_own_code.py"
        assert text.rsplit(": ", 1)[0] in linecache.getline(__file__, int(number))
    assert any(said.endswith("4 in place of c") for said in fp.replaced_modules(small)["a"])
    assert fp.replaced_modules(halved("functions beside the class")[1])[""][0].startswith("line ")


def test_attributes_are_set_where_the_code_reads_them() -> None:
    class Reads(Base):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = (2, 8, 36)

        def inner(self, h: Tensor) -> Tensor:
            return torch.relu(h).flatten(2).reshape(self.sizes).reshape(2, -1, 6, 6)

    torch.manual_seed(0)
    model = Reads().double().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=IMAGES)
    small = fp.shrink(model, IMAGES)
    assert small.sizes == (2, 4, 36)
    assert type(small) is Reads
    assert fp.replaced_modules(small) == {}


def test_an_attribute_that_is_a_factor_is_set() -> None:
    class Heads(Base):
        """A number of heads in a product with the batch, and no number of its own in the code."""

        def __init__(self) -> None:
            super().__init__()
            self.heads, self.width = 4, 2

        def inner(self, h: Tensor) -> Tensor:
            return torch.relu(h).reshape(len(h) * self.heads, self.width, 36).softmax(1).reshape(len(h), -1, 6, 6)

    torch.manual_seed(0)
    model = Heads().double().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=IMAGES)
    small = fp.shrink(model, IMAGES)
    assert (small.heads, small.width) == (2, 2)
    assert fp.replaced_modules(small) == {}
    torch.testing.assert_close(small(IMAGES[:1]), model(IMAGES[:1]))


def test_an_attribute_of_a_part_that_the_code_reads_is_set() -> None:
    """The part has no use for it; where it stays too large, the forward that reads it raises."""

    class Part(nn.Conv2d):
        def __init__(self, width: int) -> None:
            super().__init__(3, 8, 1)
            self.hidden_width = width

    class Whole(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.parts = nn.Conv2d(3, 8, 1), nn.ModuleDict({"one": Part(5)})
            self.b = nn.Conv2d(8, 2, 1)

        def inner(self, h: Tensor) -> Tensor:
            width = self.parts.one.hidden_width
            if h.shape[1] <= width:
                raise ValueError("nothing is left for the context")
            one, other = torch.split(h, [width, h.shape[1] - width], dim=1)
            return torch.cat([one.tanh(), other.relu()], 1)

    torch.manual_seed(0)
    model = Whole().double().eval()
    keep = torch.ones(8, dtype=torch.bool)
    keep[:4] = False
    fp.apply_masks(model, {"a.weight": keep.view(8, 1, 1, 1).expand(8, 3, 1, 1), "a.bias": keep})
    small = fp.shrink(model, IMAGES)
    assert small.parts.one.hidden_width == 1
    assert fp.replaced_modules(small) == {}
    torch.testing.assert_close(small(IMAGES), model(IMAGES))


def test_a_number_that_is_another_each_time_follows_from_the_others() -> None:
    """Two of three calls of one line shrink, by other amounts; the third stays as it is."""
    model, x = made("another number each time")
    width = torch.ones(8, dtype=torch.bool)
    two, one = width.clone(), width.clone()
    two[[0, 1, 4, 5]], one[[3, 7]] = False, False
    masks = {f"{name}.bias": keep for name, keep in (("a", two), ("c", one))}
    masks |= {name.replace("bias", "weight"): keep.view(-1, 1, 1, 1).expand(8, 3, 1, 1) for name, keep in masks.items()}
    fp.apply_masks(model, masks)
    small = fp.shrink(model, x)
    assert [small.a.out_channels, small.c.out_channels, small.d.out_channels] == [4, 6, 8]
    for other in (x, x[:1]):
        torch.testing.assert_close(small(other), model(other))
    said = [text.rpartition(": ")[2] for text in fp.replaced_modules(small)[""]]
    assert sorted(said) == ["(..., ..., -1, ..., ...) in place of shape"] * 2 + ["-1 in place of self.width"]


def looped() -> tuple[nn.Module, nn.Module, Tensor]:
    """Three layers that one loop runs, of which 0, 4 and 6 channels go."""
    model, x = made("another number in each run of a loop")
    masks = {}
    for at, gone in ((1, [0, 1, 4, 5]), (2, [0, 1, 2, 4, 5, 6])):
        keep = torch.ones(8, dtype=torch.bool).index_fill_(0, torch.tensor(gone), value=False)
        masks |= {f"a.{at}.bias": keep, f"a.{at}.weight": keep.view(8, 1, 1, 1).expand(8, 3, 1, 1)}
    fp.apply_masks(model, masks)
    return model, fp.shrink(model, x), x


def test_a_line_in_a_loop_says_other_numbers_in_turn() -> None:
    model, small, x = looped()
    assert [layer.out_channels for layer in small.a] == [8, 4, 2]
    for other in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(small(other), model(other))
    said = [text.rpartition(": ")[2] for text in fp.replaced_modules(small)[""]]
    assert said.count("4/1 of it, 2/1 of it, ... in turn in place of self.width") == 2
    assert "4/1 of it, 4/1 of it, 2/1 of it, 2/1 of it, ..., ... in turn in place of len(x) * self.width" in said


def test_numbers_in_turn_are_compiled_exported_and_of_each_call() -> None:
    _, small, x = looped()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    exported = torch.export.export(small, (x,)).module()
    for one in (compiled, exported):
        torch.testing.assert_close(one(x), small(x))


def test_a_loop_of_which_a_part_is_left_out_is_an_error() -> None:
    """By how often a line has run it is not known which run that is."""
    _, small, x = looped()
    expected = small(x)
    small.dropped = [small.a[0]]
    with pytest.raises(RuntimeError):
        small(x)
    small.dropped = []
    assert torch.equal(small(x), expected)
    turns = Turns((4, None, ("share", 1, 2)))
    with (
        pytest.raises(
            RuntimeError, match=r"\(4, ..., 1/2 of it in turn\) ran 2 times .* expected 3, .*no layers dropped"
        ),
        turns,
    ):
        assert [turns.next(0, 8), turns.next(0, 8)] == [4, 8]
    assert turns.next(0, 8) == 4
    with pytest.raises(RuntimeError, match="ran 4 times in one call of its function, expected 3"):
        turns.next(0, 8)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (in_turn([4, None, 2]), None, in_turn([4, None, 2])),
        (in_turn([4, None, 2]), in_turn([None, 3, 1]), in_turn([4, 3, 1])),
        (in_turn([4, None, share(2, 4)]), share(1, 2), in_turn([2, share(1, 2), share(1, 4)])),
        (4, in_turn([3, None, 2]), in_turn([3, 4, 2])),
        ((None, 8), (in_turn([3, 2]), None), (in_turn([3, 2]), 8)),
    ],
)
def test_numbers_in_turn_over_those_that_were_said_before(before: Any, now: Any, expected: Any) -> None:
    assert value_over(before, now) == expected


def test_shares_are_shown_and_are_whole_numbers_in_a_file() -> None:
    _, small, _ = halved("a product with the batch")
    said = [text.rpartition(": ")[2] for text in fp.replaced_modules(small)[""]]
    assert "1/2 of it in place of len(h) * 8" in said
    assert "4 in place of 8" in said
    assert "(1/2 of it, ...) in place of shape" in said
    description = fp.describe(Mixed(), small)
    for edit in description["code"][""]:
        edit[4] = ["share", "print(1)", 2]
    with pytest.raises(ValueError, match="the description gives '' code that does not fit its class"):
        fp.rebuild(Mixed(), description)


@pytest.mark.parametrize("name", [name for name in CASES if name != "a closure"])
def test_it_is_copied_pickled_described_and_saved(name: str, tmp_path: Any) -> None:
    model, small, x = halved(name)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(again(x), small(x))
        assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    assert isinstance(small, type(made(name)[0]))
    rebuilt = fp.rebuild(made(name)[0], json.loads(json.dumps(fp.describe(model, small))))
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt.eval()(x), small(x))
    pytest.importorskip("safetensors")
    fp.save_pruned(small, tmp_path / "small.safetensors")
    assert torch.equal(fp.load_pruned(made(name)[0], tmp_path / "small.safetensors")(x), small(x))


class Caches(nn.Module):
    """What eval mode keeps of a parameter, in a dict, until it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kept = 4, {}
        self.qkv, self.proj, self.bias = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.randn(4, 1, 1))

    def train(self, mode: bool = True) -> Caches:
        self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "bias" not in self.kept:
            self.kept["bias"] = self.bias.abs()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT + (self.bias.abs() if self.training else self.kept["bias"])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_eval_mode_keeps_of_weights_is_made_anew(inplace: bool) -> None:
    torch.manual_seed(0)
    model = Caches().double().eval()
    coupling = couple(model, TOKENS)
    (group,) = [group for group in coupling.groups if group.size == 4]
    fp.apply_masks(model, {s.parameter: cut(model.get_parameter(s.parameter), s) for s in group.slices})
    expected = model(TOKENS)
    small = fp.shrink(model, TOKENS, inplace=inplace)
    assert small.heads == 3
    torch.testing.assert_close(small(TOKENS), expected)


def cut(parameter: Tensor, part: Any) -> Tensor:
    """A mask without the first unit of a group."""
    keep = torch.ones_like(parameter, dtype=torch.bool)
    return keep.index_fill_(part.axis, part.index[0], False)


def test_in_place_too() -> None:
    model, x = made("widths of the input")
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    before = model(x)
    assert fp.shrink(model, x, inplace=True) is model
    torch.testing.assert_close(model(x), before)
    assert edits_of(type(model.a))


def test_code_that_is_another_now_is_refused() -> None:
    _, small, _ = halved("a literal, under super")
    (edit,) = edits_of(type(small))
    with pytest.raises(ValueError, match=r"the code of .*Literal\.inner has changed since Literal was shrunk"):
        with_edits(Literal, [edit._replace(digest="0")])
    description = fp.describe(Literal(), small)
    description["code"][""][0][1] = "0"
    dense = Literal()
    with pytest.raises(ValueError, match="has changed since Literal was shrunk"):
        fp.rebuild(dense, description)
    assert dense.a.out_channels == 8
    description["code"] = {"nowhere": []}
    with pytest.raises(ValueError, match="has code for 'nowhere', and the model has no module there"):
        fp.rebuild(dense, description)


# -- what cannot be said by one number ------------------------------------------


class AtLeast(Base):
    """A size of batch and channels at once, that is neither a number nor a share of one."""

    def inner(self, h: Tensor) -> Tensor:
        return torch.relu(h).reshape(max(16, len(h) * h.shape[1]), 36).reshape(-1, 8, 6, 6)


class ByArgument(Base):
    """Another width with an argument that the example does not give."""

    def forward(self, x: Tensor, wide: bool = False) -> Tensor:
        h = self.a(x).reshape(-1, 8, 6, 6)
        return self.b(h.mul(len(h[0])) if wide else h)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (AtLeast, r"invalid for input of size 288 \(line \d+ of test_own_code.py: .* gives no output for a batch of 3"),
        (ByArgument, r"output with wide=True differs .*read the size from an attribute or a tensor, "),
    ],
)
def test_what_the_example_alone_would_bear_is_refused(make: Callable[[], nn.Module], text: str) -> None:
    model = make().double().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=IMAGES)
    with pytest.raises(ShrinkError, match=text):
        fp.shrink(model, IMAGES)
