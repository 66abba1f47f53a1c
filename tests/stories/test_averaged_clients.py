"""Clients that train one pruned model on data of their own; a server averages, prunes further and shrinks."""

import copy

import pytest
import torch
from stripes import CLASSES, accuracy, images, loader_of, network, train

import torch_flowprune as fp

pytestmark = pytest.mark.slow

CLIENTS, ROUNDS = 4, 8


def shards(inputs, labels):
    """Each client sees two classes the most, and few of the others."""
    source = torch.Generator().manual_seed(2)
    odds = torch.stack([torch.tensor([4.0 if label in (c, (c + 1) % CLASSES) else 1.0 for c in range(CLIENTS)])
                        for label in labels.tolist()])  # fmt: skip
    owner = torch.multinomial(odds, 1, generator=source)[:, 0]
    return [(inputs[owner == c], labels[owner == c]) for c in range(CLIENTS)]


def one_client(server, data, seed):
    client = copy.deepcopy(server)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    fp.keep_zeros(client, optimizer)
    for _ in range(2):
        train(client, optimizer, loader_of(*data, seed=seed))
    return client


def averaged(server, clients, weights):
    # guide: several_models
    states = [fp.state_dict(client, dense=True) for client in clients]
    mean = {
        name: sum(w * state[name] for w, state in zip(weights, states)).to(value.dtype)
        for name, value in states[0].items()
    }
    fp.load_state_dict(server, mean)  # dense values: the masks stay
    # end


def zeros_in(model):
    return {name: (value == 0) for name, value in fp.state_dict(model, dense=True).items() if name in fp.masks(model)}


def communicate(server, parts, numbers):
    weights = [len(labels) / sum(len(one) for _, one in parts) for _, labels in parts]
    for number in numbers:
        before = zeros_in(server)
        clients = [one_client(server, data, 10 * number + i) for i, data in enumerate(parts)]
        for client in clients:  # nothing came back at a client
            assert all(torch.equal(zeros_in(client)[name] & gone, gone) for name, gone in before.items())
        averaged(server, clients, weights)
        assert all(torch.equal(zeros_in(server)[name] & gone, gone) for name, gone in before.items())


def test_clients_train_what_the_server_prunes(tmp_path):
    torch.manual_seed(0)
    data, held_out = images(1600, 0), images(512, 1)
    parts, server = shards(*data), network()
    beginning, example = copy.deepcopy(server), data[0][:2]
    assert min(len(labels) for _, labels in parts) > 200
    communicate(server, parts, range(4))
    dense = accuracy(server, *held_out)
    assert dense > 0.85

    pruner = fp.Pruner(server, "taylor", 0.4, rounds=2, schedule="linear", granularity="channel", cost="flops",
                       example_inputs=example)  # fmt: skip
    pruner.step([batch for part in parts for batch in loader_of(*part)])
    communicate(server, parts, range(4, 6))

    # the server stops and comes back; what is sent to the clients is a file
    torch.save({"server": fp.state_dict(server), "pruner": pruner.state_dict()}, tmp_path / "server.pt")
    state = torch.load(tmp_path / "server.pt", weights_only=True)
    resumed = copy.deepcopy(beginning)
    fp.load_state_dict(resumed, state["server"])
    its = fp.Pruner(resumed, "taylor", 0.4, rounds=2, schedule="linear", granularity="channel", cost="flops",
                    example_inputs=example)  # fmt: skip
    its.load_state_dict(state["pruner"])
    batches = [batch for part in parts for batch in loader_of(*part)]
    assert str(its.step(batches)) == str(pruner.step(batches))
    small = fp.shrink(resumed, example)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in beginning.parameters())
    fp.save_pruned(small, tmp_path / "round.safetensors")
    received = fp.load_pruned(copy.deepcopy(beginning), tmp_path / "round.safetensors")
    assert torch.equal(received.eval()(held_out[0]), small.eval()(held_out[0]))

    # single weights on top of what is small, on the server: the clients hold its zeros
    fp.global_prune(small, "magnitude", 0.5, allocation="erk")
    communicate(small, parts, range(6, 9))
    assert fp.report(small).sparsity == pytest.approx(0.5, abs=1e-3)
    assert accuracy(small, *held_out) > dense - 0.05
    fp.save_pruned(small, tmp_path / "end.safetensors", kept_only=True)
    end = fp.load_pruned(copy.deepcopy(beginning), tmp_path / "end.safetensors").eval()
    assert torch.equal(end(held_out[0]), small.eval()(held_out[0]))
    assert fp.export(end, example, tmp_path / "end.onnx").difference < 1e-3
