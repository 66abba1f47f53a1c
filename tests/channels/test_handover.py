"""What knew the model before it was shrunk knows the smaller one: masks, optimizers, held zeros, gradients, marks."""

import copy
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_flowprune as fp
from torch_flowprune.channels.shrinking.saving.architecture import describe, rebuild
from torch_flowprune.inputs import unwrapped

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(32) % 3
NAMES = [name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name, None), type)]
TORCHS = [name for name in NAMES if name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")]
BY_ELEMENT = [name for name in TORCHS if name != "Adafactor"]


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10, bias), nn.Tanh(), nn.Linear(10, 12, bias), nn.Tanh(), nn.Linear(12, 3, bias)
    ).double()


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def half(model):
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", allocation="layer", example_inputs=X)
    return model


def step(model, *optimizers):
    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    if len(optimizers) == 1:
        optimizers[0].step(closure)
    else:
        closure()
        for optimizer in optimizers:
            optimizer.step()


def parameters_in(*optimizers):
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def assert_trains(small, *optimizers):
    held = parameters_in(*optimizers)
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    before = [p.detach().clone() for p in small.parameters()]
    for _ in range(2):
        step(small, *optimizers)
    for p, old in zip(small.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BY_ELEMENT)
def test_an_optimizer_goes_on_as_it_would_have_with_the_masked_model(name, inplace):
    """Those that look at each element by itself: training on after shrinking is training on before it."""
    model = half(net())
    make = getattr(torch.optim, name)
    optimizer = make(model.parameters(), lr=0.01)
    step(model, optimizer)
    masked = copy.deepcopy(model)
    other = make(masked.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = fp.shrink(model, X, optimizer=optimizer, inplace=inplace)
    assert (small is model) is inplace
    for _ in range(3):
        step(small, optimizer)
        step(masked, other)
    torch.testing.assert_close(small(X), masked(X), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [*TORCHS, "LBFGS"])
def test_every_optimizer_of_torch_trains_the_smaller_model(name):
    model = half(net())
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05)
    step(model, optimizer)
    assert_trains(fp.shrink(model, X, optimizer=optimizer), optimizer)


def test_the_history_of_lbfgs_is_cut_like_the_parameters():
    """Steps and changes of the gradient as vectors over all parameters: laid out by hand."""
    model = half(net())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    step(model, optimizer)
    (state,) = optimizer.state.values()
    old, sizes = state["old_dirs"][0], [p.numel() for p in model.parameters()]
    kept = [m.any(1) for m in (fp.masks(model)["0.weight"], fp.masks(model)["2.weight"])]
    parts = [part.view_as(p) for part, p in zip(old.split(sizes), model.parameters(), strict=True)]
    by_hand = [
        parts[0][kept[0]],
        parts[1][kept[0]],
        parts[2][kept[1]][:, kept[0]],
        parts[3][kept[1]],
        parts[4][:, kept[1]],
        parts[5],
    ]
    fp.shrink(model, X, optimizer=optimizer)
    (state,) = optimizer.state.values()
    assert torch.equal(state["old_dirs"][0], torch.cat([part.flatten() for part in by_hand]))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
def test_of_two_optimizers_none_is_forgotten():
    model = half(net())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1]),
    ]
    step(model, *optimizers)
    assert_trains(fp.shrink(model, X, optimizer=optimizers), *optimizers)


def test_sparse_gradients_of_an_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.words(x))

    torch.manual_seed(0)
    model, x = Words(), torch.arange(8).view(4, 2)
    optimizers = [torch.optim.SparseAdam(model.words.parameters()), torch.optim.Adam(model.head.parameters())]
    fp.global_prune(
        model, "magnitude", 0.5, granularity="channel", parameters=[(model.words, "weight")], example_inputs=x
    )
    model(x).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    small = fp.shrink(model, x, optimizer=optimizers)
    assert {id(p) for p in parameters_in(*optimizers)} == {id(p) for p in small.parameters()}


def timms():
    optim = pytest.importorskip("timm.optim")
    return [name for name in optim.list_optimizers() if not name.startswith(("bnb", "fused"))]


try:
    TIMMS = timms()
except pytest.skip.Exception:
    TIMMS = []


@pytest.mark.parametrize("name", TIMMS)
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_of_timm_goes_on_or_refuses_before_anything_is_changed(name):
    """Adafactor's factors of square matrices, and preconditioners, do not tell what goes."""
    optim = pytest.importorskip("timm.optim")
    model = half(net()).float()
    optimizer = optim.create_optimizer_v2(model, opt=name, lr=1e-3)
    x = X.float()

    def run(model):
        optimizer.zero_grad()
        F.cross_entropy(model(x), Y).backward(create_graph=getattr(optimizer, "is_second_order", False))
        optimizer.step()

    run(model)
    before, held = {k: v.clone() for k, v in model.state_dict().items()}, parameters_in(optimizer)
    try:
        small = fp.shrink(model, x, optimizer=optimizer)
    except fp.ShrinkError as error:
        assert "it is unknown which part belongs to its channels" in str(error)
        assert name.startswith("kron")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(one is other for one, other in zip(parameters_in(optimizer), held, strict=True))
        run(model)
        return
    assert {id(p) for p in parameters_in(optimizer)} == {id(p) for p in small.parameters()}
    was = [p.detach().clone() for p in small.parameters()]
    for _ in range(2):
        run(small)
    assert all(p.isfinite().all() for p in small.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(small.parameters(), was, strict=True))


def test_factors_that_fit_two_axes_are_refused():
    class Rows(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["rows"] = p.detach().norm(dim=-1)
            return super().step(closure)

    torch.manual_seed(0)
    model = half(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double())
    optimizer = Rows(model.parameters(), lr=0.1)
    step(model, optimizer)
    with pytest.raises(fp.ShrinkError, match=r"Rows keeps 'rows' of '1.weight', and it is unknown which part"):
        fp.shrink(model, X, optimizer=optimizer, inplace=True)
    assert model[1].weight.shape == (8, 8) and set(map(id, parameters_in(optimizer))) == set(
        map(id, model.parameters())
    )


def test_an_optimizer_inside_another_goes_on_too():
    lookahead = pytest.importorskip("timm.optim.lookahead").Lookahead
    model = half(net())
    optimizer = lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=1)
    step(model, optimizer)
    small = fp.shrink(model, X, optimizer=optimizer)
    assert_trains(small, optimizer)
    assert all(
        value.shape == p.shape for p in small.parameters() for value in optimizer._base_optimizer.state[p].values()
    )


def test_what_no_optimizer_trains_is_named():
    model = half(net())
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=r"no optimizer given to shrink trains 0.weight, 0.bias, 2.weight, 2.bias: pass all"
    ):
        fp.shrink(model, X, optimizer=optimizer)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model = half(net())
    for p in [*model[0].parameters(), *model[2].parameters()]:
        p.requires_grad_(False)
    fp.shrink(model, X, optimizer=torch.optim.SGD(model[4].parameters(), lr=0.1))  # frozen: nothing is left out


def test_an_optimizer_of_another_model_is_refused():
    model = half(net())
    with pytest.raises(ValueError, match="optimizer= has a SGD without any parameter of this model"):
        fp.shrink(model, X, optimizer=torch.optim.SGD(net().parameters(), lr=0.1), inplace=True)
    assert model[0].out_features == 10
    with pytest.raises(TypeError, match=r"optimizer should be a torch.optim.Optimizer or several of them"):
        fp.shrink(model, X, optimizer=[3])


def test_the_names_that_an_optimizer_has_for_parameters_go_with_them():
    """One name a parameter, also where a branch, and its parameters, are taken out."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up, self.down, self.last = (nn.Linear(6, n) for n in (6, 6, 6, 3))

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.down(self.up(x).relu()))

    model = Branch().double()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    step(model, optimizer)
    fp.apply_masks(model, {f"down.{name}": torch.zeros_like(p) > 0 for name, p in model.down.named_parameters()})
    small = fp.shrink(model, X, optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in small.named_parameters()]
    assert_trains(small, optimizer)


def keeping(kind):
    class Keeping(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            held = self.param_groups[0]["params"]
            if kind == "attribute":
                self.slow = {p: p.detach().clone() for p in held}
            elif kind == "parameters":
                self.slow = list(held)
            elif kind == "option":
                self.param_groups[0]["slow"] = [p.detach().clone() for p in held]

        def step(self, closure=None):
            for p in self.param_groups[0]["params"] if kind == "state" else ():
                self.state[p]["slow"] = SimpleNamespace(value=p.detach().clone())
            return super().step(closure)

    return Keeping


@pytest.mark.parametrize("kind", ["attribute", "parameters", "option", "state"])
def test_what_an_optimizer_keeps_where_no_one_looks_is_refused(kind):
    """It would go on with the old parameters, or with tensors of their size."""
    model = half(net())
    optimizer = keeping(kind)(model.parameters(), lr=0.1)
    step(model, optimizer)
    words = "'slow' of '0.weight', and it is unknown" if kind == "state" else "or tensors like them, in 'slow' beside"
    with pytest.raises(fp.ShrinkError, match=f"Keeping keeps .*{words}"):
        fp.shrink(model, X, optimizer=optimizer, inplace=True)
    assert model[0].out_features == 10
    step(model, optimizer)


@pytest.mark.parametrize("way", ["module", "in place", "block", "forward"])
def test_compiled_models_are_read_as_their_code(way):
    """A compiler would read what reads the model, for seconds and with warnings."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if way == "module":
        model = torch.compile(model, backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    elif way == "block":
        model[2] = torch.compile(model[2], backend=backend)
    else:
        model.forward = torch.compile(model.forward, backend=backend)
    half(model)
    small = fp.shrink(model, X, optimizer=optimizer)
    assert compiled == []
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net().parameters())


def test_schedulers_go_on():
    model = half(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(model, optimizer)
    small = fp.shrink(model, X, optimizer=optimizer)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_trains(small, optimizer)


# -- masks and the zeros that are held ------------------------------------------


def zeros(model):
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights)


@pytest.mark.parametrize("inplace", [False, True])
def test_masks_of_single_weights_go_along_and_zeros_stay_held(inplace):
    model = half(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    fp.global_prune(model, "magnitude", 0.8)
    handle = fp.keep_zeros(model, optimizer)
    step(model, optimizer)
    expected = model(X).detach()
    masks = fp.masks(model)
    rows = masks["2.weight"].any(1) & masks["4.weight"].any(0)
    columns = masks["0.weight"].any(1) & masks["2.weight"][rows].any(0)
    small = fp.shrink(model, X, optimizer=optimizer, inplace=inplace)
    torch.testing.assert_close(small(X), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(fp.masks(small)["2.weight"], masks["2.weight"][rows][:, columns])
    before = zeros(small)
    small[2].weight_orig.data[~fp.masks(small)["2.weight"]] = 1  # as an optimizer with noise would
    for _ in range(3):
        step(small, optimizer)
    assert zeros(small) == before > 0
    assert int((small[2].weight_orig == 0).sum()) == int((~fp.masks(small)["2.weight"]).sum()), (
        "held under the mask too"
    )
    handle.remove()
    small[2].weight_orig.data.fill_(1)
    step(small, optimizer)
    assert (small[2].weight_orig != 0).all(), "the handle still ends it"


def test_zeros_held_by_masks_of_the_users_are_held_on():
    model = half(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fp.global_prune(model, "magnitude", 0.8)
    handle = fp.keep_zeros(model, optimizer)
    fp.remove(model)
    small = fp.shrink(model, X, optimizer=optimizer)
    before = zeros(small)
    for _ in range(3):
        step(small, optimizer)
    assert zeros(small) == before > 0
    handle.remove()


def test_the_model_left_behind_is_freed():
    model = half(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = fp.keep_zeros(model, optimizer)
    step(model, optimizer)
    small, gone = fp.shrink(model, X, optimizer=optimizer), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    step(small, optimizer)
    handle.remove()


def test_zeros_held_on_a_model_cut_without_its_optimizer():
    model = half(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp.keep_zeros(model, optimizer)
    fp.shrink(model, X)  # a copy: the model goes on as it was
    with pytest.warns(UserWarning, match=r"keep_zeros holds zeros of this model for 1 optimizer\(s\) that"):
        fp.shrink(model, X, inplace=True)
    optimizer.step()


def test_filters_are_no_channels_and_their_masks_go_along():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.randn(2, 3, 8, 8),
    )
    fp.global_prune(model, "magnitude", 0.5, granularity="filter", include="0")
    with pytest.warns(UserWarning, match=r"no channel is dead, so nothing is removed, and the masks stay \(0.weight\)"):
        small = fp.shrink(model, x)
    assert torch.equal(fp.masks(small)["0.weight"], fp.masks(model)["0.weight"])


def test_masks_on_modules_that_become_graphs():
    class Width(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    torch.manual_seed(0)
    model, x = nn.Sequential(Width(), nn.Linear(8, 3)).double(), torch.randn(2, 5, 8).double()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    fp.global_prune(model, "magnitude", 0.7)
    small = fp.shrink(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-12)
    assert fp.masks(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    kept = {name: int((small.get_parameter(f"{name}_orig") != 0).sum()) for name in fp.masks(small)}
    with fp.keep_zeros(small, optimizer):
        small(x).square().sum().backward()
        optimizer.step()
    assert kept == {name: int((small.get_parameter(f"{name}_orig") != 0).sum()) for name in fp.masks(small)}


# -- what stands on parameters ------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_and_attributes_of_parameters_go_along(inplace):
    model = half(net())
    F.cross_entropy(model(X), Y).backward()
    weight = model[2].weight_orig
    weight.group, weight.start = "slow", weight.detach().clone()
    model[4].bias.group = "fast"
    masks = fp.masks(model)
    rows, columns = masks["2.weight"].any(1), masks["0.weight"].any(1)
    gradient, start = (value[rows][:, columns].clone() for value in (weight.grad, weight.start))
    small = fp.shrink(model, X, inplace=inplace)
    assert torch.equal(small[2].weight.grad, gradient)
    assert torch.equal(small[2].weight.start, start)
    assert (small[2].weight.group, small[4].bias.group) == ("slow", "fast")
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("handed", ["in place", "with its optimizer", "a copy"])
def test_hooks_on_parameters_go_along(handed):
    model = half(net())
    optimizer, weight, seen = torch.optim.SGD(model.parameters(), lr=0.1), model[2].weight_orig, []
    before = weight.register_hook(lambda gradient: seen.append(gradient.shape))
    after = weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.shape))
    words = {"in place": {"inplace": True}, "with its optimizer": {"optimizer": optimizer}, "a copy": {}}
    small = fp.shrink(model, X, **words[handed])
    F.cross_entropy(small(X), Y).backward()
    assert seen == [small[2].weight.shape] * 2
    before.remove()
    after.remove()
    F.cross_entropy(small(X), Y).backward()
    assert len(seen) == (4 if handed == "a copy" else 2), "a handle takes off what it put on, wherever the hook went"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("by", ["averages", "pruner"])
def test_averages_go_on_with_the_smaller_model(by, inplace):
    """As an average of the masked model would have."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    pruner = fp.Pruner(model, "magnitude", 0.5, rounds=2, granularity="channel", example_inputs=X, averages=[average])
    for _ in range(3):
        step(model, optimizer)
        average.update_parameters(model)
    pruner.step()
    masked, its_average, its_optimizer = copy.deepcopy((model, average, optimizer))
    words = {"pruner": {"pruner": pruner}, "averages": {"averages": [average]}}[by]
    small = fp.shrink(model, X, optimizer=optimizer, inplace=inplace, **words)
    torch.testing.assert_close(average(X), its_average(X), rtol=1e-9, atol=1e-12)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in small.parameters()]
    for one, its, own in ((small, optimizer, average), (masked, its_optimizer, its_average)):
        for _ in range(3):
            step(one, its)
            own.update_parameters(one)
    torch.testing.assert_close(average(X), its_average(X), rtol=1e-9, atol=1e-12)
    if by == "pruner":
        pruner.step()
        assert fp.masks(average.module).keys() == fp.masks(small).keys() != set()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, compiled, lambda m: compiled(nn.DataParallel(m)), lambda m: nn.DataParallel(compiled(m))],
    ids=["DataParallel", "compiled", "compiled DataParallel", "DataParallel compiled"],
)
def test_all_of_it_goes_on_inside_of_wrappers(wrap, inplace):
    """As it does without: optimizers, pruners, averages and held zeros know the parameters inside."""
    ends = []
    for outside in (lambda model: model, wrap):
        inside = net()
        model, average = outside(inside), copy.deepcopy(inside)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        words = {"granularity": "channel", "allocation": "layer", "example_inputs": X, "averages": [average]}
        pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, **words)
        step(inside, optimizer)
        pruner.track()
        pruner.step()
        fp.global_prune(model, "magnitude", 0.6)
        fp.sync_masks(model, average)
        fp.keep_zeros(model, optimizer)
        small = fp.shrink(model, X, optimizer=optimizer, pruner=pruner, inplace=inplace)
        assert (small is model) is inplace
        assert type(small) is type(model) and pruner.model is small
        inside = unwrapped(small)
        step(inside, optimizer)
        pruner.track()
        report = pruner.step()
        ends.append((inside(X), average(X), str(report), fp.masks(small)))
    (output, averaged, told, masks), (its_output, its_averaged, its_told, its_masks) = ends
    assert torch.equal(output, its_output) and torch.equal(averaged, its_averaged) and told == its_told
    assert masks.keys() == its_masks.keys() and all(torch.equal(m, its_masks[name]) for name, m in masks.items())


def test_a_model_under_ddp_is_shrunk_but_not_in_place(one_rank):
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    half(model)
    with pytest.raises(fp.ShrinkError, match="DistributedDataParallel exchanges the gradients of the parameters that"):
        fp.shrink(model, X, optimizer=optimizer, inplace=True)
    small = fp.shrink(model, X, optimizer=optimizer)
    assert type(small) is type(model)
    for _ in range(2):  # the second forward waits for the gradients of all parameters of the first
        step(small, optimizer)
    assert small.module[0].out_features == 5


def test_masks_given_by_a_wrappers_names_and_masks_that_do_not_fit():
    model = half(net())
    masks = {f"module.{name}": mask for name, mask in fp.masks(model).items()}
    assert fp.shrink(fp.remove(model), X, masks=masks)[0].out_features == 5
    with pytest.raises(ValueError, match="this model has no parameter '7.weight'"):
        fp.shrink(model, X, masks={"7.weight": torch.ones(3) > 0})
    with pytest.raises(ValueError, match=r"the mask of '0.weight' should have shape \(10, 6\), got \(6,\)"):
        fp.shrink(model, X, masks={"0.weight": torch.ones(6) > 0})


def test_averages_keep_masks_of_single_weights_and_copies_are_averages_too():
    model = half(net())
    average = copy.deepcopy(model)
    fp.global_prune(model, "magnitude", 0.8)
    fp.sync_masks(model, average)
    small = fp.shrink(model, X, averages=[average, average])
    assert torch.equal(average(X), small(X))
    assert all(torch.equal(mask, fp.masks(average)[name]) for name, mask in fp.masks(small).items())


def test_an_average_of_another_model_is_refused_before_anything_is_changed():
    model, other = half(net()), nn.Linear(6, 3)
    with pytest.raises(ValueError, match="expected averages of this model, and found none in Linear"):
        fp.shrink(model, X, averages=[other], inplace=True)
    assert model[0].out_features == 10


def test_shrinking_without_anything_to_hand_on_says_nothing():
    model = half(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = fp.shrink(model, X)
    assert fp.masks(small) == {}
    assert fp.masks(model), "the model is as it was"


def test_a_smaller_model_with_masks_is_described_and_rebuilt():
    model = half(net())
    fp.global_prune(model, "magnitude", 0.9)
    small = fp.shrink(model, X)
    assert fp.masks(small)
    again = rebuild(net(), describe(model, small))
    fp.load_state_dict(again, fp.state_dict(small))
    assert torch.equal(again(X), small(X))
    assert fp.masks(again).keys() == fp.masks(small).keys()
