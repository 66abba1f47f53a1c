"""A lottery ticket: rounds of training, pruning and rewinding, killed on the way; its ticket against a random one."""

import copy

import pytest
import torch
from stripes import accuracy, images, loader_of, network, train

import torch_flowprune as fp

pytestmark = pytest.mark.slow

ROUNDS, EPOCHS = 12, 2


def trained(model, data, epochs=EPOCHS):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = loader_of(*data)  # the same order in every round
    for _ in range(epochs):
        train(model, optimizer, loader)
    return model


def rounds_of(model, start, data, count):
    """The procedure, from wherever the model is."""
    for _ in range(count):
        trained(model, data)
        # guide: lottery_ticket
        report = fp.global_prune(model, "magnitude", amount=0.2)  # of what is left
        fp.load_state_dict(model, start)  # the weights go back, the masks stay
        # end
    return report


def dense_values(model):
    return {name: value for name, value in fp.state_dict(model, dense=True).items() if "num_batches" not in name}


def test_a_ticket_is_found_resumed_trained_and_exported(tmp_path):
    torch.manual_seed(0)
    data, held_out = images(1024, 0), images(512, 1)
    model = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    dense = trained(copy.deepcopy(model), data, 3)

    # half of the rounds, in a run that is killed, and all of them in one that is not
    whole = copy.deepcopy(model)
    last = rounds_of(whole, start, data, ROUNDS)
    before = rounds_of(model, start, data, ROUNDS // 2)
    torch.save(fp.state_dict(model), tmp_path / "run.pt")
    resumed = network()
    fp.load_state_dict(resumed, torch.load(tmp_path / "run.pt", weights_only=True))
    nested = fp.masks(resumed)
    report = rounds_of(resumed, start, data, ROUNDS - ROUNDS // 2)
    assert str(report) == str(last)
    assert before.sparsity == pytest.approx(1 - 0.8 ** (ROUNDS // 2), abs=1e-3)
    assert report.sparsity == pytest.approx(1 - 0.8**ROUNDS, abs=1e-3)
    masks = fp.masks(resumed)
    assert all(torch.equal(mask, fp.masks(whole)[name]) and not (mask & ~nested[name]).any()
               for name, mask in masks.items())  # fmt: skip
    for name, value in dense_values(resumed).items():  # what is kept is at its beginning, all else is 0
        kept = masks.get(name, torch.tensor(True)).expand_as(value)
        assert torch.equal(value[kept], start[name][kept]) and not value[~kept].any()

    ticket = trained(resumed, data, 3)
    assert accuracy(ticket, *held_out) > accuracy(dense, *held_out) - 0.03
    assert fp.report(ticket).sparsity == report.sparsity

    # a random ticket of the same layers' sparsities, from the same beginning
    random = network()
    random.load_state_dict(start)
    shares = {layer.name: layer.sparsity for layer in report.layers}
    drawn = fp.global_prune(random, "random", allocation=shares, generator=torch.Generator().manual_seed(0))
    assert [layer.pruned for layer in drawn.layers] == [layer.pruned for layer in report.layers]
    trained(random, data, 3)
    assert accuracy(ticket, *held_out) > accuracy(random, *held_out)

    # the ticket is given away: the file of what is kept, a graph, and dense weights
    fp.save_pruned(ticket, tmp_path / "ticket.safetensors", kept_only=True)
    again = fp.load_pruned(network(), tmp_path / "ticket.safetensors").eval()
    assert torch.equal(again(held_out[0]), ticket.eval()(held_out[0]))
    assert fp.export(again, held_out[0][:2], tmp_path / "ticket.onnx").difference < 1e-3
    plain = network()
    plain.load_state_dict(fp.state_dict(ticket, dense=True))
    assert torch.equal(plain.eval()(held_out[0]), ticket(held_out[0]))
