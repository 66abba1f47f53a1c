"""What gloo ranks do with flows of sharded models, held against one process with all the data in float64."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_nets import (
    Block,
    Convolutions,
    Heads,
    KeepsLosses,
    Language,
    ReadsContext,
    Recurrent,
    ScalesInput,
    UsesCache,
    images,
    tokens,
)
from torch import Tensor, distributed, nn
from torch.nn import functional

import torch_flowprune as fp

# -- what is compared ------------------------------------------


def ranks() -> int:
    return distributed.get_world_size()


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    return distributed.device_mesh.init_device_mesh("cpu", sizes or (ranks(),), mesh_dim_names=names)


def shard(model: nn.Module, over: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    over = over or mesh()
    for block in model.blocks:
        fully_shard(block, mesh=over, **options)
    return fully_shard(model, mesh=over, **options)


def build(kind: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """The same values on every rank."""
    torch.manual_seed(0)
    return kind(*args).double()


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def kept_tokens(batch: Any) -> float:
    return float((batch[1] != -100).sum())


TOKENS = {"loss": token_loss, "reduction": kept_tokens}


def of_all(data: Callable[[int], list[Any]], count: int = 0) -> list[Any]:
    return [batch for rank in range(count or ranks()) for batch in data(rank)]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def vector_like(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=draw) for name, p in model.named_parameters()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-12 of the size of the tensor, or of a thousandth of the largest, where it is rounding alone."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        error = float((whole(found[name]) - value).norm())
        assert error <= 1e-12 * max(float(value.norm()), 1e-3 * largest), (name, error)


def state_of(model: nn.Module) -> list[Any]:
    """All that a flow might leave behind."""
    tensors = [(value, whole(value.detach()).clone()) for value in (*model.parameters(), *model.buffers())]
    hooks = [
        [
            (dict(registry), "forward" in vars(module), module.training)
            for registry in (module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs)
        ]
        for module in model.modules()
    ]
    return [tensors, hooks, [(p.requires_grad, p.grad is None) for p in model.parameters()], torch.get_rng_state()]


def check_same_state(model: nn.Module, before: list[Any]) -> None:
    after = state_of(model)
    for (tensor, value), (kept, expected) in zip(after[0], before[0], strict=True):
        assert tensor is kept
        assert torch.equal(value, expected)
    assert after[1:3] == before[1:3]
    assert torch.equal(after[3], before[3])


def check_flow(
    sharded: nn.Module,
    alone: nn.Module,
    own: Any,
    every: Any,
    needs: tuple[str, ...] = ("g", "g2", "Hg"),
    held: int = 0,
    **words: Any,
) -> fp.Flow:
    """The flow is that of one process with all the data, and the model is as it was."""
    before = state_of(sharded)
    found, units = units_seen(lambda: fp.flow(sharded, own, needs=needs, **words))
    expected = fp.flow(alone, every, needs=needs, **words)
    assert sum(unit.is_held for unit in units) == held
    assert found.samples == expected.samples
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    for kind in ("theta", *needs):
        check_equal(getattr(found, kind), getattr(expected, kind))
    for name, parameter in sharded.named_parameters():
        if hasattr(parameter, "placements") and name in found.theta:
            values = [getattr(found, kind).get(name, parameter) for kind in ("theta", *needs)]
            assert all(value.placements == parameter.placements for value in values)
    check_same_state(sharded, before)
    return found


def units_seen(call: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The units of the models that the call sharded anew: what they hold tells which way they were run."""
    from torch_flowprune.gradients.sharding import sharded_model

    made: list[Any] = []

    class Noted(sharded_model.Unit):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    plain, sharded_model.Unit = sharded_model.Unit, Noted
    try:
        return call(), made
    finally:
        sharded_model.Unit = plain


# -- fully_shard ------------------------------------------


def ranks_with_more_batches_and_tokens(rank: int, path: str) -> None:
    """A rank with fewer batches takes part until all are through; what each counts for is by its tokens."""
    data = lambda rank: tokens(rank, batches=2 + rank)
    sharded, alone = shard(build(Language)), build(Language)
    check_flow(sharded, alone, data(rank), of_all(data), **TOKENS)
    v = vector_like(alone)
    expected = fp.hessian_vector(alone, of_all(data), v, **TOKENS)
    check_equal(fp.hessian_vector(sharded, data(rank), v, **TOKENS), expected)
    found = fp.flow(sharded, data(rank), needs=("g",), **TOKENS)
    distributed_v = fp.hessian_vector(sharded, data(rank), found.g, **TOKENS)
    check_equal(distributed_v, fp.flow(alone, of_all(data), **TOKENS).Hg)


def a_rank_whose_targets_are_all_ignored(rank: int, path: str) -> None:
    data = lambda rank: tokens(rank, ignored=rank == 0)[:1]
    check_flow(shard(build(Language)), build(Language), data(rank), of_all(data), loss=token_loss, reduction="token")


def losses_of_all_kinds(rank: int, path: str) -> None:
    """Means over samples, sums, squares."""
    data = lambda rank: images(rank)
    for loss in (None, nn.CrossEntropyLoss(reduction="sum"), lambda o, y: functional.mse_loss(o[:, 0], y.double())):
        check_flow(shard(build(Convolutions)), build(Convolutions), data(rank), of_all(data), loss=loss)


def statistics_of_batches(rank: int, path: str) -> None:
    """In train mode batch norm takes those of each rank's batch, and each run leaves its buffers alone."""
    sharded, alone = shard(build(Convolutions)), build(Convolutions)
    check_flow(sharded, alone, images(rank), of_all(images), needs=("g", "Hg"), mode="train")


def dropout_draws_the_same_again(rank: int, path: str) -> None:
    sharded, alone = shard(build(Language, 0.3)), build(Language, 0.3)
    torch.manual_seed(5)
    found = fp.flow(sharded, tokens(0), mode="train", **TOKENS)
    torch.manual_seed(5)
    expected = fp.flow(alone, tokens(0), mode="train", **TOKENS)
    check_equal(found.g, expected.g)
    check_equal(found.Hg, expected.Hg)


def units_of_all_shapes(rank: int, path: str) -> None:
    """One for the whole model, none for it, units in units, frozen parameters."""
    from torch.distributed.fsdp import fully_shard

    def nested(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block.attention, mesh=mesh())
            fully_shard(block, mesh=mesh())
        return fully_shard(model, mesh=mesh())

    def frozen(model: nn.Module) -> nn.Module:
        model.blocks[0].requires_grad_(False)
        model.blocks[1].up.weight.requires_grad_(False)
        return model

    alone = build(Language)
    for make in (lambda: fully_shard(build(Language), mesh=mesh()), lambda: nested(build(Language))):
        check_flow(make(), alone, tokens(rank), of_all(tokens), **TOKENS)
    inner = build(Language)
    for block in inner.blocks:
        fully_shard(block, mesh=mesh())
    check_flow(inner, alone, tokens(rank), of_all(tokens), **TOKENS)
    sharded = frozen(shard(build(Language)))
    check_flow(sharded, frozen(build(Language)), tokens(rank), of_all(tokens), needs=("g", "Hg"), **TOKENS)


def recurrent_layers(rank: int, path: str) -> None:
    check_flow(shard(build(Recurrent)), build(Recurrent), tokens(rank), of_all(tokens), **TOKENS)


def read_samples(rank: int, path: str) -> None:
    """As under data parallelism each rank reads so many of its own data."""
    cut = lambda rank: [(x[:2], y[:2]) for x, y in images(rank)[:1]]
    sharded = shard(build(Convolutions))
    check_flow_of_max = fp.flow(sharded, images(rank), max_samples=2)
    expected = fp.flow(build(Convolutions), of_all(cut))
    assert check_flow_of_max.samples == 2 * ranks()
    check_equal(check_flow_of_max.Hg, expected.Hg)


def modules_that_cannot_run_again(rank: int, path: str) -> None:
    """They are seen, and hold their parameters: kept losses, hooks, caches, writes to what is given, hidden inputs."""
    noted: list[Tensor] = []

    def plus_losses(model: nn.Module, batch: Any) -> Tensor:
        return token_loss(model(batch[0]), batch[1]) + sum(block.kept for block in model.blocks)

    def plus_noted(model: nn.Module, batch: Any) -> Tensor:
        noted.clear()
        loss = token_loss(model(batch[0]), batch[1])
        return loss + noted.pop().square().mean()

    def plus_context(model: nn.Module, batch: Any) -> Tensor:
        model.blocks[1].context = [model.embedded(batch[0]).mean(1, keepdim=True)]
        return token_loss(model(batch[0]), batch[1])

    def hooked(model: nn.Module) -> nn.Module:
        model.blocks[1].up.register_forward_hook(lambda module, inputs, output: noted.append(output))
        return model

    plain = lambda model, batch: token_loss(model(batch[0]), batch[1])
    for block, closure, held, prepare in (
        (KeepsLosses, plus_losses, 2, lambda model: model),
        (Block, plus_noted, 1, hooked),
        (ReadsContext, plus_context, 1, lambda model: model),
        (ScalesInput, plain, 2, lambda model: model),
        (UsesCache, plain, 2, lambda model: model),
    ):
        sharded, alone = (prepare(build(Language, 0.0, block)) for _ in range(2))
        words = {"closure": closure, "reduction": kept_tokens, "needs": ("g", "Hg")}
        check_flow(shard(sharded), alone, tokens(rank), of_all(tokens), held=held, **words)


def what_a_closure_reads(rank: int, path: str) -> None:
    """The root's parameters are whole for it; a shard of a unit has no derivative there, which is said."""
    decay = lambda model, batch: token_loss(model(batch[0]), batch[1]) + model.head.weight.square().sum()
    sharded, words = shard(build(Language)), {"reduction": kept_tokens}
    check_flow(sharded, build(Language), tokens(rank), of_all(tokens), closure=decay, **words)
    inner = lambda model, batch: decay(model, batch) + whole(model.blocks[0].up.bias).sum()
    with pytest.raises(ValueError, match=re.escape("reads 'blocks.0.up.bias' outside of the module")):
        fp.flow(sharded, tokens(rank), closure=inner, **words)


def losses_that_take_gradients(rank: int, path: str) -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = model.embedded(batch[0]).detach().requires_grad_()
        loss = token_loss(model.after(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    sharded, words = shard(build(Language)), {"closure": penalised, "reduction": kept_tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding has no gradient
        check_flow(sharded, build(Language), tokens(rank), of_all(tokens), needs=("g",), **words)
        before = state_of(sharded)
        with pytest.raises(RuntimeError, match="is a third derivative"):
            fp.flow(sharded, tokens(rank), **words)
    check_same_state(sharded, before)


def trains_on(rank: int, path: str) -> None:
    """After steps, forwards that leave the root gathered, a flow and a failed one, steps are those of one process."""
    sharded, alone = shard(build(Language)), build(Language)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (sharded, alone)]

    def step() -> None:
        for model, optimizer, batches in zip((sharded, alone), optimizers, (tokens(rank), of_all(tokens)), strict=True):
            optimizer.zero_grad()
            for x, y in batches:
                (functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")).backward()
            if model is alone:
                for parameter in model.parameters():
                    parameter.grad /= ranks()
            optimizer.step()

    def fails(model: nn.Module, batch: Any) -> Tensor:
        model(batch[0])
        raise ZeroDivisionError

    step()
    for mode in (sharded.eval, sharded.train):
        mode()
        with torch.set_grad_enabled(mode == sharded.train):
            sharded(tokens(rank)[0][0])
        check_flow(sharded, alone, tokens(rank), of_all(tokens), needs=("g", "Hg"), **TOKENS)
        before = state_of(sharded)
        with pytest.raises(ZeroDivisionError):
            fp.flow(sharded, tokens(rank), closure=fails)
        check_same_state(sharded, before)
    step()
    check_equal(*({name: p.detach() for name, p in model.named_parameters()} for model in (sharded, alone)))


def pruned_then_sharded(rank: int, path: str) -> None:
    def pruned() -> nn.Module:
        model = build(Language)
        fp.global_prune(model, sparsity=0.5)
        return model

    sharded, alone = shard(pruned()), pruned()
    found = check_flow(sharded, alone, tokens(rank), of_all(tokens), **TOKENS)
    assert all(whole(found.Hg[name])[~mask].eq(0).all() for name, mask in fp.masks(alone).items())


def masks_on_shards(rank: int, path: str) -> None:
    """Masks beside the shards, which no forward computes with: derivatives are 0 under them all the same."""
    sharded, alone = shard(build(Language)), build(Language)
    chosen = build(Language)
    fp.global_prune(chosen, sparsity=0.5)
    for model in (sharded, alone):
        fp.apply_masks(model, fp.masks(chosen))
    found = check_flow(sharded, alone, tokens(rank), of_all(tokens), **TOKENS)
    assert all(whole(found.Hg[name])[~mask].eq(0).all() for name, mask in fp.masks(alone).items())
    v = vector_like(build(Language))
    expected = fp.hessian_vector(alone, of_all(tokens), v, **TOKENS)
    check_equal(fp.hessian_vector(sharded, tokens(rank), v, **TOKENS), expected)


def half_precision(rank: int, path: str) -> None:
    """bfloat16 by autocast and of the parameters is what one process gives by it; policies are said not to count."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def build_float(dtype: torch.dtype) -> nn.Module:
        return build(Language).to(dtype)

    for dtype, autocast, options in (
        (torch.float32, torch.bfloat16, {}),
        (torch.bfloat16, None, {}),
        (torch.float32, None, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}),
    ):
        sharded, words = shard(build_float(dtype), **options), {**TOKENS, "autocast": autocast}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = fp.flow(sharded, tokens(rank), **words)
        assert any("mixed-precision policy" in str(one.message) for one in said) == bool(options)
        expected = fp.flow(build_float(dtype), of_all(tokens), **words)
        for kind in ("g", "Hg"):
            of_found, of_expected = getattr(found, kind), getattr(expected, kind)
            for name, value in of_expected.items():
                assert of_found[name].dtype is torch.float32
                assert (whole(of_found[name]) - value).norm() <= (1e-5 if options else 0.1) * value.norm() + 1e-6, name


def said_before_anything_is_touched(rank: int, path: str) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    sharded = shard(build(Language))
    before = state_of(sharded)
    for words, text in (
        ({"max_memory": "1GB"}, "max_memory= is for models that are not sharded"),
        ({"offload": True}, "offload= is for models"),
        ({"check": True}, "check= is for models"),
    ):
        with pytest.raises(ValueError, match=text):
            fp.flow(sharded, tokens(rank), **TOKENS, **words)
    with pytest.raises(ValueError, match="the data of a rank are empty"):
        fp.flow(sharded, tokens(rank) if rank else [], **TOKENS)
    with pytest.raises(ValueError, match="underflow: shard model.float"):
        fp.flow(shard(build(Language).half()), tokens(rank), **TOKENS)
    on_host = shard(build(Language), offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.raises(ValueError, match="CPUOffloadPolicy"):
        fp.flow(on_host, tokens(rank), **TOKENS)
    twice = nn.parallel.DistributedDataParallel(shard(build(Language)), init_sync=False)
    with pytest.raises(ValueError, match="leave it out, and give fully_shard a mesh of two axes"):
        fp.flow(twice, tokens(rank), **TOKENS)
    check_same_state(sharded, before)


# -- tensor parallelism ------------------------------------------


def parallel(model: nn.Module, over: Any) -> nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole_rows = {
        "table": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, over, whole_rows)
    for block in model.blocks:
        plan = {**dict.fromkeys(("query", "key", "value", "up"), "column"), "out": "row", "down": "row"}
        made = {name: ColwiseParallel() if kind == "column" else RowwiseParallel() for name, kind in plan.items()}
        parallelize_module(block, over, made)
    return model


def columns_and_rows(rank: int, path: str) -> None:
    """All ranks have the same data. H·g is right where torch's own sums leave the graph."""
    sharded, alone = parallel(build(Language, 0.0, Heads), mesh()), build(Language, 0.0, Heads)
    check_flow(sharded, alone, tokens(0), tokens(0), **TOKENS)
    v = vector_like(alone)
    check_equal(fp.hessian_vector(sharded, tokens(0), v, **TOKENS), fp.hessian_vector(alone, tokens(0), v, **TOKENS))


def sequences_in_parts(rank: int, path: str) -> None:
    """Norms whose gradient is a sum over ranks, of whole parameters on each; activations that are shards."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Linear(8, 4)
        ).double()

    draw = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 6, generator=draw).double(), torch.randint(4, (8,), generator=draw)) for _ in range(2)]
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "1": SequenceParallel(sequence_dim=0),
        "2": ColwiseParallel(input_layouts=Shard(0)),
        "4": RowwiseParallel(output_layouts=Shard(0)),
        "5": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    check_flow(parallelize_module(net(), mesh(), plan), net(), data, data)


# -- four ranks ------------------------------------------


def replicas_of_shards(rank: int, path: str) -> None:
    sharded = shard(build(Language), mesh(2, ranks() // 2, names=("replica", "shard")))
    check_flow(sharded, build(Language), tokens(rank), of_all(tokens), **TOKENS)


def both_kinds_of_parallelism(rank: int, path: str) -> None:
    """``fully_shard`` of what tensor parallelism has cut: data differ along the first axis of the mesh alone."""
    over, data_rank = mesh(2, ranks() // 2, names=("data", "tensor")), rank // (ranks() // 2)
    sharded = shard(parallel(build(Language, 0.0, Heads), over["tensor"]), over["data"])
    alone = build(Language, 0.0, Heads)
    check_flow(sharded, alone, tokens(data_rank), of_all(tokens, 2), **TOKENS)
    v = vector_like(alone)
    found = fp.hessian_vector(sharded, tokens(data_rank), v, **TOKENS)
    check_equal(found, fp.hessian_vector(alone, of_all(tokens, 2), v, **TOKENS))


ON_TWO = [
    ranks_with_more_batches_and_tokens,
    a_rank_whose_targets_are_all_ignored,
    statistics_of_batches,
    dropout_draws_the_same_again,
    modules_that_cannot_run_again,
    trains_on,
    pruned_then_sharded,
    masks_on_shards,
    said_before_anything_is_touched,
    columns_and_rows,
]
MORE_ON_TWO = [
    losses_of_all_kinds,
    units_of_all_shapes,
    recurrent_layers,
    read_samples,
    what_a_closure_reads,
    losses_that_take_gradients,
    half_precision,
    sequences_in_parts,
]
ON_FOUR = [
    ranks_with_more_batches_and_tokens,
    losses_of_all_kinds,
    trains_on,
    columns_and_rows,
    replicas_of_shards,
    both_kinds_of_parallelism,
]
