"""A GAN whose generator is made smaller while both train: an optimizer each, and an average of the generator."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_flowprune as fp

pytestmark = pytest.mark.slow

NOISE, SIZE = 8, 8


def blobs(count, source):
    """One bright spot a picture, somewhere inside."""
    centre = 2 + 3 * torch.rand(count, 2, 1, 1, generator=source)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.exp(-((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2) / 3)[:, None] * 2 - 1


def new_generator():
    return nn.Sequential(
        nn.Linear(NOISE, 32 * 4), nn.Unflatten(1, (32, 2, 2)), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def new_critic():
    def layer(inputs, outputs):
        return [spectral_norm(nn.Conv2d(inputs, outputs, 3, 2, 1)), nn.LeakyReLU(0.2)]

    return nn.Sequential(*layer(1, 16), *layer(16, 32), nn.Flatten(), spectral_norm(nn.Linear(128, 1)))


def adam(model, lr):
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.99))


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)


def train(made, judge, optimizers, average, steps, source):
    made.train(), judge.train()
    its, judges = optimizers
    for _ in range(steps):
        noise = torch.randn(64, NOISE, generator=source)
        judges.zero_grad()
        real, fake = judge(blobs(64, source)), judge(made(noise).detach())
        (softplus(-real) + softplus(fake)).mean().backward()
        judges.step()
        its.zero_grad()
        softplus(-judge(made(noise))).mean().backward()
        its.step()
        average.update_parameters(made)


@torch.no_grad()
def distance(made):
    """Between Gaussians of the pixels' moments, made and real (Fréchet)."""
    source = torch.Generator().manual_seed(9)
    fake, real = made.eval()(torch.randn(1000, NOISE, generator=source)).flatten(1), blobs(1000, source).flatten(1)
    one, other = fake.double().T.cov(), real.double().T.cov()
    roots = torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    return float((fake.mean(0) - real.mean(0)).square().sum() + one.trace() + other.trace() - 2 * roots)


def test_a_generator_shrinks_while_its_critic_goes_on(tmp_path):
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(0)
    generator, critic = new_generator(), new_critic()
    untrained = distance(generator)
    optimizers, average = [adam(generator, 2e-3), adam(critic, 2e-3)], averaged(generator)
    train(generator, critic, optimizers, average, 600, source)
    dense = distance(generator)
    assert dense < 0.25 * untrained

    size, untouched = sum(p.numel() for p in generator.parameters()), copy.deepcopy(critic.state_dict())
    optimizer = optimizers[0]
    # guide: several_models
    noise = [(torch.randn(64, NOISE),) for _ in range(8)]
    closure = lambda generator, batch: softplus(-critic(generator(*batch))).mean()
    scored = dict(data=noise, closure=closure)
    fp.global_prune(generator, "taylor", 0.5, granularity="channel", **scored)
    generator = fp.shrink(generator, noise[0], optimizer=optimizer, averages=[average])
    # end
    assert sum(p.numel() for p in generator.parameters()) < 0.5 * size
    assert all(torch.equal(value, untouched[name]) for name, value in critic.state_dict().items())  # scoring left it
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in critic.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, generator.parameters()))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in generator.parameters())
    assert float(average.n_averaged) == 600
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in generator.parameters()]

    # killed in mid-training, resumed from files
    train(generator, critic, optimizers, average, 100, source)
    fp.save_pruned(generator, tmp_path / "generator.safetensors")
    fp.save_pruned(average.module, tmp_path / "average.safetensors")
    torch.save({"critic": critic.state_dict(), "optimizers": [one.state_dict() for one in optimizers],
                "n": average.n_averaged, "source": source.get_state()}, tmp_path / "run.pt")  # fmt: skip
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    again, its_judge = fp.load_pruned(new_generator(), tmp_path / "generator.safetensors"), new_critic()
    its_average = averaged(again)
    its_average.module.load_state_dict(fp.load_pruned(new_generator(), tmp_path / "average.safetensors").state_dict())
    its_average.n_averaged.copy_(state["n"])
    its_judge.load_state_dict(state["critic"])
    its_optimizers, its_source = [adam(again, 2e-3), adam(its_judge, 2e-3)], torch.Generator()
    its_source.set_state(state["source"])
    for one, saved in zip(its_optimizers, state["optimizers"], strict=True):
        one.load_state_dict(saved)
    train(generator, critic, optimizers, average, 300, source)
    train(again, its_judge, its_optimizers, its_average, 300, its_source)
    for one, other in ((generator, again), (critic, its_judge), (average.module, its_average.module)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())

    assert distance(average.module) < 0.25 * untrained
    print(untrained, dense, distance(generator), distance(average.module))
    example = torch.randn(2, NOISE)
    assert fp.export(average.module, example, tmp_path / "generator.onnx").difference < 1e-3
