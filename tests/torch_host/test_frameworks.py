"""Rows 7 of docs/explanation/host.md: data parallelism, compilers, exporters, functional transforms."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hosts import assert_in_force, mlp, pruned, snapshot, train
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "7.1": (
        "data parallelism, pruned before or after wrapping (no fault)",
        "handled",
        "two gloo ranks agree in every weight and mask",
    ),
    "7.2": (
        "random masks differ between ranks",
        "handled",
        (
            "given the wrapper, all ranks take the first rank's masks, and scores are over the data of all ranks. "
            "Given `.module`, each rank prunes for itself"
        ),
    ),
    "7.3": (
        "float masks are broadcast at each forward",
        "handled",
        "masks are bytes, a quarter of that",
    ),
    "7.4": (
        "FSDP2 after pruning: the weight stays unsharded between steps",
        "documented",
        "it trains like one process and keeps no unsharded weight. The masks (one byte per weight) are on every rank",
    ),
    "7.5": (
        "FSDP2 before pruning fails inside DTensor",
        "handled",
        "`global_prune` works over ranks. The zeros are in the shards, and the mask is a `DTensor` beside them",
    ),
    "7.6": (
        "a second round or `remove` after sharding fails inside DTensor",
        "refused",
        "shard first, and prune after. Or load the full state dict into a model that is not sharded",
    ),
    "7.7": (
        "`torch.compile` (no fault; eva02 fails)",
        "handled",
        "one graph with fullgraph, one more compilation when masks appear, none for further rounds",
    ),
    "7.8": (
        "`torch.export` warns; ONNX",
        "handled",
        (
            "the exported graph contains the mask. `fp.export_ready(model)` gives a graph, and ONNX, with plain "
            "weights: give exporters this copy"
        ),
    ),
    "7.9": (
        "`torch.jit.script` fails",
        "documented",
        "it still does: script `fp.export_ready(model)` (tracing works)",
    ),
    "7.10": (
        "`fx.symbolic_trace` (no fault)",
        "handled",
        "leaf modules keep their masks",
    ),
    "7.11": (
        "`functional_call` ignores dense keys; transforms leave dead tensors behind",
        "handled",
        "nothing is left behind. A dense key is a `TypeError` that names `weight_orig`, whatever its values",
    ),
    "7.12": (
        "autocast loses its cast cache",
        "documented",
        (
            "the values are right; a masked weight is cast at each access. Scores are computed without an "
            "autocast around the call (one inside the model or the loss applies)"
        ),
    ),
    "7.13": (
        "`DataParallel` replicas share the weight",
        "handled",
        "a replica computes its own weight (tested by hand on a CPU, not on several GPUs)",
    ),
    "7.14": (
        "the mask costs a product a forward",
        "documented",
        (
            "one selection per access, in eval mode too. For inference call `fp.remove`, or use the copy of "
            "`fp.export_ready(model)`"
        ),
    ),
    "7.16": (
        "`_orig_mod.` and `module.` in names: what was saved inside a wrapper does not fit outside",
        "handled",
        (
            "names are seen through `torch.compile` (also of single blocks, and in place by `model.compile()`) "
            "and through data parallelism. Scoring runs the code inside"
        ),
    ),
    "7.17": (
        "`torch.set_default_device`",
        "handled",
        "tensors that the package makes are on the model's device, or on the CPU",
    ),
    "7.18": (
        "`convert_sync_batchnorm` of a model with pruned norms stops half way",
        "documented",
        (
            "it still does, with torch's error: a new module takes parameters only. `state = "
            "fp.state_dict(model)`, convert `fp.remove(model)`, then `fp.load_state_dict(model, state)`: masks, "
            "values and the optimizer's parameters are as before"
        ),
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_row_7_1_to_7_3_two_gloo_ranks(tmp_path):
    import rank_group
    import two_ranks

    rank_group.on_ranks(2, tmp_path, two_ranks.SCENARIOS)


@pytest.fixture
def mesh():
    """One rank is enough for parameters to be sharded DTensors."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


needs_streams = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"),
    reason="fully_shard of this torch does not run on the CPU (seen with 2.6)",
)


@needs_streams
@pytest.mark.filterwarnings("ignore")
def test_row_7_4_prune_then_fully_shard(mesh):
    model = pruned()
    single = copy.deepcopy(model)
    sharded(model, mesh)
    for one in (model, single):
        train(one, X, torch.optim.SGD(one.parameters(), lr=0.1))
    torch.testing.assert_close(model(X), single(X))
    assert prune.is_pruned(model)
    assert model[0].weight_mask.nbytes == 64, "not sharded: one byte a weight on every rank"


@needs_streams
@pytest.mark.filterwarnings("ignore")
def test_row_7_4_zeros_are_kept_in_the_shards(mesh):
    model = sharded(pruned(), mesh)
    gone = ~model[0].weight_mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    fp.keep_zeros(model, optimizer)
    train(model, X, optimizer)
    moments = [optimizer.state[model[0].weight_orig][name] for name in ("exp_avg", "exp_avg_sq")]
    for value in (model[0].weight_orig, *moments):
        assert not value.full_tensor()[gone].any()
        assert value.full_tensor()[~gone].all()


@needs_streams
@pytest.mark.filterwarnings("ignore")
def test_row_7_5_fully_shard_then_masks(mesh):
    model = mlp()
    single = pruned(copy.deepcopy(model))
    sharded(model, mesh)
    with pytest.raises(ValueError, match="is a sharded DTensor, and this takes whole parameters"):
        fp.l1_unstructured(model[0], "weight", 0.5)
    assert not prune.is_pruned(model)
    fp.apply_masks(model, fp.masks(single))
    for one in (model, single):
        train(one, X, torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    torch.testing.assert_close(model(X), single(X))
    assert prune.is_pruned(model)
    assert not model[0].weight.full_tensor()[~single[0].weight_mask].any()
    assert pruned(model, sparsity=0.75) == model
    assert fp.report(model).sparsity == 0.75


@needs_streams
@pytest.mark.filterwarnings("ignore")
def test_row_7_5_a_convolution_that_standardises_its_shard_is_refused(mesh):
    layers = pytest.importorskip("timm.layers")
    model = sharded(nn.Sequential(layers.StdConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), mesh)
    with pytest.raises(ValueError, match=r"'0\.weight' is a shard, and its layer standardises it before use"):
        fp.global_prune(model, sparsity=0.5)
    fp.global_prune(model, sparsity=0.5, exclude="0")
    assert fp.report(model, exclude="0").sparsity == 0.5


@needs_streams
@pytest.mark.parametrize("needs", [("g2_sample",), ("gR",), ("x2",)])
def test_what_a_flow_of_shards_has_is_that_of_the_whole(mesh, needs):
    """It would be zeros, behind the warning that the loss does not reach them."""
    alone, data = mlp(), (X, torch.zeros(len(X), dtype=torch.long))
    model = sharded(copy.deepcopy(alone), mesh)
    (found,), (expected,) = (
        [getattr(fp.flow(one, data, needs=needs, example_inputs=X), kind) for kind in needs] for one in (model, alone)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), value)
    assert set(fp.flow(model, needs=()).theta) == {name for name, _ in model.named_parameters()}


@needs_streams
@pytest.mark.filterwarnings("ignore")
def test_row_7_6_a_second_round_and_remove_after_sharding_are_refused(mesh):
    model = sharded(pruned(), mesh)
    for attempt, text in (
        (lambda: fp.apply_masks(model, fp.masks(model)), "was pruned before it was sharded.*shard first"),
        (lambda: fp.remove(model), r"0 \(Linear\) was pruned before it was sharded: fp.load_state_dict its full"),
        (lambda: prune.remove(model[0], "weight"), "was pruned before it was sharded: fp.load_state_dict its full"),
    ):
        with pytest.raises(ValueError, match=text):
            attempt()
    train(model, X)
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    fp.remove(fp.load_state_dict(fresh := mlp(), full))
    torch.testing.assert_close(fresh(X), model(X))


class Counter:
    """A backend of ``torch.compile`` that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_row_7_7_compile_fullgraph_is_one_graph(counter):
    model = pruned()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(X).square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(X).square().sum().backward()
    for parameter, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert counter.graphs == 1
    train(compiled, X)
    assert counter.graphs == 1, "steps change values, not the graph"
    assert_in_force(model, lambda: compiled(X))


@pytest.mark.filterwarnings("ignore")
def test_row_7_7_prune_and_remove_after_compile(counter):
    model = mlp()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(X)
    for sparsity in (0.1, 0.2, 0.3, 0.4):
        fp.global_prune(compiled, sparsity=sparsity)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.graphs == 2, "one graph dense, one graph pruned, however many rounds"
    expected = model(X)
    fp.remove(model)
    torch.testing.assert_close(compiled(X), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "eva02_tiny_patch14_224"])
def test_row_7_7_compile_of_timm_models_is_one_graph(name, counter):
    timm = pytest.importorskip("timm")
    options = {"depth": 1, "img_size": 28 if "14" in name else 32} if "224" in name else {}
    model = pruned(timm.create_model(name, num_classes=3, **options), min_keep=1).eval()
    images = torch.randn(2, 3, *[options.get("img_size", 32)] * 2)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-4)
    compiled(images).square().sum().backward()
    assert counter.graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_row_7_7_inductor():
    torch._dynamo.reset()
    model = pruned()
    compiled = torch.compile(model, fullgraph=True)
    assert_in_force(model, lambda: compiled(X))
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_row_7_8_export(strict):
    model = pruned()
    program = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), model(X))
    folded = torch.export.export(fp.remove(model), (X,), strict=strict)
    targets = [str(node.target) for node in folded.graph.nodes]
    assert not any("where" in target for target in targets), "folded, the mask is gone from the graph"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_row_7_8_onnx_after_remove():
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = fp.remove(pruned()).eval()
    buffer = io.BytesIO()
    torch.onnx.export(model, (X,), dynamo=True, verbose=False).save(buffer)
    found = onnx.load_model_from_string(buffer.getvalue())
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    assert (weights["0.weight"] == model[0].weight.detach().numpy()).all()
    assert (weights["0.weight"] == 0).any()


@pytest.mark.filterwarnings("ignore")
def test_row_7_9_jit():
    model = pruned()
    assert torch.equal(torch.jit.trace(model, X)(X), model(X))
    with pytest.raises(
        Exception, match="JoinedStr|__name__"
    ):  # the compiler of torch.jit reads the property and the hook
        torch.jit.script(model)
    scripted = torch.jit.script(fp.remove(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(X), model(X))
    with pytest.raises(ValueError, match="prune the model before scripting it"):
        fp.global_prune(scripted, sparsity=0.5, include="0.weight")


def test_row_7_10_fx():
    model = pruned()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(X), model(X))
    assert prune.is_pruned(traced), "leaf modules are kept whole"
    with torch.no_grad():
        model[0].weight_orig.mul_(2)
    assert torch.equal(traced(X), model(X))


def test_row_7_11_functional_call():
    model = pruned()
    values = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    before = snapshot(model)
    assert not functional_call(model, values, X).any()
    with pytest.raises(TypeError, match="set weight_orig instead"):
        functional_call(model, {"0.weight": torch.zeros(8, 8)}, X)  # the dense key: torch would ignore it
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_row_7_11_functional_transforms_leave_nothing_behind(transform):
    model = pruned()
    parameters = dict(model.named_parameters())

    def loss(values, inputs=X):
        return functional_call(model, values, inputs).square().sum()

    before, expected = snapshot(model), model(X)
    if transform == "grad":
        grads = torch.func.grad(loss)(parameters)
        assert not grads["0.weight_orig"][~model[0].weight_mask].any()
        loss(parameters).backward()
        torch.testing.assert_close(grads["0.weight_orig"], model[0].weight_orig.grad)
    elif transform == "jvp":
        torch.func.jvp(loss, (parameters,), (parameters,))
    else:
        each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
        assert each["0.weight_orig"].shape == (3, 8, 8)
    assert snapshot(model) == before
    assert torch.equal(copy.deepcopy(model)(X), expected)


def test_row_7_11_ensembles():
    models = [pruned() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = torch.vmap(lambda parameters, buffers: functional_call(base, (parameters, buffers), (X,)))(
        parameters, buffers
    )
    torch.testing.assert_close(found, torch.stack([model(X) for model in models]))


def test_row_7_12_autocast():
    model = pruned()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
        assert_in_force(model, lambda: model(X).float())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), model(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["loss_preservation", "grasp", "magnitude"])
def test_row_7_12_an_autocast_around_the_call_does_not_count(method):
    data = (X, torch.tensor([0, 1, 2]))
    model = mlp()
    expected = fp.scores(model, method, data)
    with torch.autocast("cpu", torch.bfloat16):
        found = fp.scores(model, method, data)
    assert [score.tolist() for score in found.values()] == [score.tolist() for score in expected.values()]
    inside = fp.scores(model, "snip", data, closure=_rounded)
    assert inside["0.weight"].tolist() != fp.scores(model, "snip", data)["0.weight"].tolist(), "one inside does"


def _rounded(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_row_7_13_data_parallel_replicas():
    """No second GPU here: what DataParallel makes of a module on each device, by hand."""
    layer = pruned(nn.Linear(8, 8))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(
            replica, name, parameter.clone()
        )  # as torch.nn.parallel.replicate does: a tensor with a graph, no parameter
    replica(X).square().sum().backward()
    assert torch.equal(replica(X), layer(X))
    assert layer.weight_orig.grad[layer.weight_mask].all()
    assert torch.equal(nn.DataParallel(layer)(X), layer(X))


def test_row_7_14_the_product_is_computed_at_every_access_and_remove_folds_it():
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    model = pruned(nn.Linear(8, 8))
    for expected in (1, 0):
        calls.clear()
        with Count(), torch.no_grad():
            model(X)
        assert sum("where" in str(func) for func in calls) == expected
        fp.remove(model)


def block_compiled(model):
    """One block compiled, as users of large models do."""
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "one block compiled": block_compiled,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("source", [None, *WRAPPED])
@pytest.mark.parametrize("target", [None, *WRAPPED])
def test_row_7_16_names_are_seen_through_wrappers(source, target):
    """Whichever side is wrapped: states, masks, scores and patterns with the names of one are the other's."""
    one, other = (WRAPPED[kind](mlp()) if kind else mlp() for kind in (source, target))
    fp.global_prune(one, sparsity=0.5)
    for state in (one.state_dict(), fp.state_dict(one)):
        fp.load_state_dict(other, state)
        assert torch.equal(other(X), one(X))
    fp.load_state_dict(other, WRAPPED[source](mlp()).state_dict() if source else mlp().state_dict())
    fresh = WRAPPED[target](mlp()) if target else mlp()
    masks = {key.removesuffix("_mask"): mask for key, mask in one.state_dict().items() if key.endswith("_mask")}
    fp.apply_masks(fresh, masks)
    assert [mask.tolist() for mask in fp.masks(fresh).values()] == [mask.tolist() for mask in masks.values()]
    fresh = WRAPPED[target](mlp()) if target else mlp()
    scores = {name: torch.arange(mask.numel()).double().view(mask.shape) for name, mask in masks.items()}
    fp.global_prune(fresh, scores=scores, sparsity=0.5)
    assert all(not mask.flatten()[0] and mask.flatten()[-1] for mask in fp.masks(fresh).values())
    for name, without in zip(masks, reversed(masks), strict=True):
        fresh = WRAPPED[target](mlp()) if target else mlp()
        included = fp.global_prune(fresh, sparsity=0.1, include=name).layers
        excluded = fp.global_prune(fresh, sparsity=0.2, exclude=without).layers
        assert [layer.name for layer in included] == [layer.name for layer in excluded]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["in place", "a block in place", *WRAPPED])
def test_row_7_16_second_derivatives_of_compiled_models(kind, counter):
    """``aot_eager`` compiles the backward, which has no derivative then."""
    model = mlp()
    expected = fp.scores(model, "grasp", (X, torch.tensor([0, 1, 2])))
    if kind == "in place":
        model.compile(backend="aot_eager")
    elif kind == "a block in place":
        model[2].compile(backend="aot_eager")
    else:
        model = WRAPPED[kind](model)
    found = fp.scores(model, "grasp", (X, torch.tensor([0, 1, 2])))
    assert [score.tolist() for score in found.values()] == [score.tolist() for score in expected.values()]
    assert torch.equal(model(X), model(X)), "and it runs compiled as before"


class Looks(nn.Module):
    """Convolutions and a norm, for channels; large enough for a bracketed selection."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


IMAGES = (torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4)
PRUNES = {
    **{name: lambda model, name=name: fp.global_prune(model, name, 0.5, data=IMAGES)
       for name in fp.MEASURES if "distance" not in name and name != "random"},
    "random": lambda model: fp.global_prune(model, "random", 0.5, generator=torch.Generator("cpu").manual_seed(0)),
    "filter": lambda model: fp.global_prune(model, "l1", 0.5, granularity="filter"),
    "2:4": lambda model: fp.global_prune(model, granularity="2:4", include="fc"),
    "channel": lambda model: fp.global_prune(model, "snip", 0.5, granularity="channel", data=IMAGES),
    "rounds": lambda model: fp.global_prune(model, "snip", 0.5, rounds=3, data=IMAGES),
    "cost": lambda model: fp.global_prune(
        model, "l1", 0.3, granularity="channel", cost="flops", example_inputs=IMAGES[0]
    ),
    **{name: lambda model, name=name: fp.global_prune(model, sparsity=0.5, allocation=name)
       for name in ("layer", "erk", "lamp", "row")},
    "one tensor": lambda model: fp.l1_unstructured(model.fc, "weight", 0.5),
    "shrink": lambda model: (
        fp.global_prune(model, "l1", 0.5, granularity="channel", example_inputs=IMAGES[0]),
        fp.shrink(model, IMAGES[0], inplace=True),
    ),
    "loaded": lambda model: fp.load_state_dict(pruned(model), fp.state_dict(model)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning", "ignore::torch_flowprune.TiedScoresWarning")
@pytest.mark.filterwarnings("ignore:the diagonal of H from")
@pytest.mark.parametrize("how", PRUNES)
def test_row_7_17_a_default_device_other_than_the_models(how):
    """The meta device, which has no values, so that whatever lands on it by accident fails."""
    torch.manual_seed(0)
    model = Looks()
    expected = copy.deepcopy(model)
    PRUNES[how](expected)
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        PRUNES[how](model)
    finally:
        torch.set_default_device(before)
    found = model.state_dict()
    assert list(found) == list(expected.state_dict())
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_row_7_18_batch_norms_synchronised():
    """torch makes new modules and hands them the weights, which have to be parameters."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp.global_prune(model, "l1", 0.5, granularity="channel", example_inputs=IMAGES[0])
    expected, masks, parameters = model.eval()(IMAGES[0]).detach(), fp.masks(model), list(model.parameters())
    with pytest.raises(TypeError, match="cannot assign"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    state = fp.state_dict(model)
    model = fp.load_state_dict(nn.SyncBatchNorm.convert_sync_batchnorm(fp.remove(model)), state)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert torch.equal(model.eval()(IMAGES[0]), expected)
    assert {name: mask.tolist() for name, mask in fp.masks(model).items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    assert [id(value) for value in model.parameters()] == [id(value) for value in parameters]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight_orig
