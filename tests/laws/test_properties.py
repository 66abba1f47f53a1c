"""Random small models, random sequences of operations, and what holds after each."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hosts import output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch_flowprune.LayerCollapseWarning",
    "ignore::torch_flowprune.TiedScoresWarning",
    "ignore:zeros do not survive",
)

WIDTH = 4
SOURCE = torch.Generator().manual_seed(0)
DATA = (torch.randn(6, WIDTH, 3, 3, generator=SOURCE), torch.randint(WIDTH, (6,), generator=SOURCE))


class Attention(nn.Module):
    """Self-attention over places; ``out_proj`` is read without being called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.unflatten(-1, (3, 3))


class Pointwise(nn.Linear):
    """A linear layer over channels."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Pointwise(), Pointwise()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class WithChild(nn.Conv2d):
    """A kernel of the same shape beside its own."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, 3, padding=1)
        self.extra = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return super().forward(x) + self.extra(x)


class Kernel(nn.Conv2d):
    """A convolution that computes with what it makes of its weight."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return nn.functional.conv2d(x, weight=self.kernel(), bias=self.bias, padding=1)


class Partial(Kernel):
    """A kernel of ones counts the holes."""

    def forward(self, x):
        seen = nn.functional.conv2d(torch.ones_like(x), torch.ones_like(self.weight), padding=1)
        return nn.functional.conv2d(x, self.weight, self.bias, padding=1) / seen


class Flipped(Kernel):
    def kernel(self):
        return self.weight.flip(-1).transpose(-2, -1)


class Rescaled(Kernel):
    def kernel(self):
        return self.weight / (1 + self.weight.square().sum((1, 2, 3), keepdim=True)).sqrt()


class Standardised(Kernel):
    """Zeros do not survive it, of which a prune warns."""

    def kernel(self):
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)


class Adapted(nn.Module):
    """A layer and an adapter of low rank."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = Pointwise(), nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x.movedim(1, -1))).movedim(-1, 1)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    """By torch's parametrization of what is beside the weight."""
    return parametrize.register_parametrization(Pointwise(), "bias", Doubled())


BLOCKS = {
    "linear": Pointwise,
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=False),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "relu": nn.ReLU,
    "attention": Attention,
    "residual": lambda: Residual(Pointwise(), nn.GELU(), Pointwise()),
    "tied": Tied,
    "with a child": WithChild,
    "partial": Partial,
    "flipped": Flipped,
    "rescaled": Rescaled,
    "standardised": Standardised,
    "adapted": Adapted,
    "parametrized": parametrized,
}
models = st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=4)


def build(blocks, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, WIDTH))
        return nn.Sequential(*(BLOCKS[block]() for block in blocks), head)


class Life:
    """A model and what we know of it: the names of its parameters in order, and how many weights are gone."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.model = build(blocks)
        self.names = list(parameters_of(self.model))
        self.masks = {}

    def prunable(self):
        return [target for target in parameters_of(self.model).values() if target.is_default]

    # The operations. Each takes a number from 0 to 1 and may read it as it likes.

    def prune(self, share, method="magnitude", granularity="weight", **options):
        targets = self.prunable()
        units = sum(target.parameter.numel() for target in targets)
        gone = sum(int((mask == 0).sum()) for mask in (target.mask for target in targets) if mask is not None)
        if granularity == "weight":
            sparsity = gone / units + share * (1 - gone / units)
            report = fp.global_prune(self.model, method, min(sparsity, 1.0), data=self.data())
            assert report.pruned == max(round(min(sparsity, 1.0) * units), gone)
            assert sum(int((~mask).sum()) for name, mask in fp.masks(self.model).items()) == report.pruned
        else:
            fp.global_prune(self.model, method, amount=share, granularity=granularity, data=self.data(), **options)

    def magnitude(self, share):
        self.prune(share)

    def loss_preservation(self, share):
        self.prune(share, "loss_preservation")

    def gradient_norm(self, share):
        self.prune(share, "gradient_norm_preservation")

    def random(self, share):
        self.prune(share, "random")

    def filters(self, share):
        self.prune(share, "l1", "filter", min_keep=0)

    def one_layer(self, share):
        targets = self.prunable()
        module, name = targets[int(share * (len(targets) - 1))].owners[0]
        fp.l1_unstructured(module, name, share)
        fp.apply_masks(self.model, fp.masks(self.model))  # every owner, where the function knew one module

    def torch_method(self, share):
        single = [target for target in self.prunable() if len(target.owners) == 1]
        if single:
            module, name = single[int(share * (len(single) - 1))].owners[0]
            fp.apply_masks(
                self.model, {target.name: torch.ones_like(target.parameter, dtype=torch.bool) for target in single}
            )
            prune.l1_unstructured(module, name, share)
            prune.random_structured(module, name, share, dim=0)

    def step(self, share):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            nn.functional.cross_entropy(self.model(self.data()[0]), self.data()[1]).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def save_and_load(self, share):
        torch.save(fp.state_dict(self.model), buffer := io.BytesIO())
        buffer.seek(0)
        dtype = next(self.model.parameters()).dtype
        self.model = fp.load_state_dict(build(self.blocks, seed=1).to(dtype), torch.load(buffer))

    def torch_save_and_load(self, share):
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        twin.load_state_dict(self.model.state_dict())
        self.model = twin

    def average(self, share):
        """Made before a prune, in step after it; life goes on with the average."""
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        average.update_parameters(self.model)
        self.random(share)
        fp.sync_masks(self.model, average)
        average.update_parameters(self.model)
        masks, found = fp.masks(self.model), fp.masks(average.module)
        assert list(masks) == list(found) and all(torch.equal(found[name], mask) for name, mask in masks.items())
        self.model = average.module

    def merge(self, share):
        """As libraries of adapters do: the product of both into the layer's weight, in place."""
        for block in self.model.modules():
            if isinstance(block, Adapted):
                with torch.no_grad():
                    before, added = block.base.weight.detach().clone(), block.up.weight @ block.down.weight
                    block.base.weight.data += added
                    block.up.weight.data.zero_()
                    mask = getattr(block.base, "weight_mask", torch.ones_like(added, dtype=torch.bool))
                assert torch.equal(block.base.weight, torch.where(mask, before + added, 0))
                assert not block.up.weight.any()

    def under_another_default_device(self, share):
        with torch.device("meta"):
            self.prune(share)

    def function_writes(self, share):
        module, name = self.prunable()[0].owners[0]
        before = getattr(module, name).detach().clone()
        torch.neg(getattr(module, name).detach(), out=getattr(module, name).data)
        assert torch.equal(getattr(module, name), -before)

    def assign(self, share):
        single = [target for target in self.prunable() if len(target.owners) == 1]
        for target in single[: 1 + int(2 * share)]:
            module, name = target.owners[0]
            values = torch.rand_like(target.parameter)
            setattr(module, name, nn.Parameter(values))
            assert torch.equal(getattr(module, name), values * getattr(module, f"{name}_mask", 1))

    def mask_by_another_name(self, share):
        for target in self.prunable():
            for alias in target.aliases:
                fp.apply_masks(self.model, {alias: torch.rand(target.parameter.shape) < 0.9})

    def whole_pickle(self, share):
        if any(parametrize.is_parametrized(module) for module in self.model.modules()):
            return  # torch refuses
        torch.save(self.model, buffer := io.BytesIO())
        buffer.seek(0)
        self.model = torch.load(buffer, weights_only=False)

    def deepcopy(self, share):
        self.model = copy.deepcopy(self.model)

    def cast(self, share):
        self.model.to(torch.float64 if share < 0.5 else torch.float32)

    def poison(self, share):
        with torch.no_grad():
            for target in parameters_of(self.model).values():
                if target.mask is not None:
                    target.parameter[target.mask == 0] = torch.inf if share < 0.5 else torch.nan

    def remove(self, share):
        values = {name: target.theta for name, target in parameters_of(self.model).items()}
        fp.remove(self.model)
        for name, target in parameters_of(self.model).items():
            assert torch.equal(target.parameter, values[name])
        self.masks = {}

    def torch_remove(self, share):
        for module in list(self.model.modules()):
            for name in ("weight", "in_proj_weight"):
                if any(
                    hook._tensor_name == name
                    for hook in module._forward_pre_hooks.values()
                    if isinstance(hook, prune.BasePruningMethod)
                ):
                    prune.remove(module, name)
        self.masks = {}

    def data(self):
        inputs, target = DATA
        return inputs.to(next(self.model.parameters()).dtype), target

    # The invariants.

    def check(self):
        known, masks = parameters_of(self.model), fp.masks(self.model)
        assert list(known) == self.names, "the order of the parameters"
        for name, before in self.masks.items():
            assert not (masks[name] & ~before).any(), f"{name}: what is pruned stays pruned"
        self.masks = masks
        for name, target in known.items():
            for module, attribute in target.owners:
                weight = getattr(module, attribute)
                if name in masks:
                    assert torch.equal(weight, target.parameter.masked_fill(~masks[name], 0)), name
                    assert getattr(module, f"{attribute}_mask").dtype is torch.bool
                    assert prune.is_pruned(module)
                else:
                    assert weight is target.parameter
        assert prune.is_pruned(self.model) == bool(masks)
        assert output(self.model.eval(), self.data()[0]).isfinite().all()


OPERATIONS = [
    name for name in vars(Life) if not name.startswith("_") and name not in ("prunable", "prune", "data", "check")
]
sequences = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.floats(0, 1)), min_size=1, max_size=8)


def live(blocks, sequence):
    torch.manual_seed(0)
    life = Life(blocks)
    life.check()
    for operation, share in sequence:
        getattr(life, operation)(share)
        life.check()


@given(blocks=models, sequence=sequences)
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_lives(blocks, sequence):
    live(blocks, sequence)


@pytest.mark.slow
@given(blocks=models, sequence=sequences)
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_lives(blocks, sequence):
    live(blocks, sequence)
