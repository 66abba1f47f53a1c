"""A teacher, and a student cut out of it by what the teacher says, shrunk twice while it learns from it."""

import copy

import pytest
import torch
from stripes import accuracy, images, loader_of, network, train
from torch import nn

import torch_flowprune as fp

pytestmark = pytest.mark.slow


def distil(student, teacher, optimizer, loader, temperature=2.0):
    student.train()
    for inputs, target in loader:
        # guide: distillation
        with torch.no_grad():
            soft = (teacher(inputs) / temperature).softmax(-1)
        outputs = student(inputs)
        log_soft = (outputs / temperature).log_softmax(-1)
        distance = nn.functional.kl_div(log_soft, soft, reduction="batchmean")
        hard = nn.functional.cross_entropy(outputs, target)
        optimizer.zero_grad()
        (0.5 * hard + 0.5 * temperature**2 * distance).backward()
        optimizer.step()
        # end


def shaken(student):
    # guide: distillation
    with torch.no_grad():  # where student and teacher are equal, this loss has no slope
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    # end
    return student


def test_a_student_is_cut_by_what_its_teacher_says(tmp_path):
    torch.manual_seed(0)
    data, held_out = images(1024, 0), images(512, 1)
    few = (data[0][:192], data[1][:192])  # few are labelled; the teacher knows more
    teacher = network(32)
    beginning = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        train(teacher, optimizer, loader_of(*data))
    taught = accuracy(teacher, *held_out)
    assert taught > 0.95

    def to_teacher(model, batch):
        inputs, _ = batch
        # guide: distillation
        with torch.no_grad():
            soft = teacher(inputs).softmax(-1)
        log_soft = model(inputs).log_softmax(-1)
        return nn.functional.kl_div(log_soft, soft, reduction="batchmean")
        # end

    options = dict(closure=to_teacher, cost="flops", granularity="channel", example_inputs=data[0][:2])
    teacher.train()  # as a loop leaves it: it says other things of half a batch, and its statistics are left alone
    was = copy.deepcopy(teacher.state_dict())
    student = shaken(copy.deepcopy(teacher))
    loader, example = loader_of(*few), data[0][:2]
    pruner = fp.Pruner(student, "taylor", 0.75, rounds=2, schedule="linear", **options)
    with pytest.warns(UserWarning, match="as if the loss were a mean over these"):
        pruner.step(loader)
    assert all(torch.equal(value, was[name]) for name, value in teacher.state_dict().items())
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    student = fp.shrink(student, example, optimizer=optimizer, pruner=pruner)
    for _ in range(4):
        distil(student, teacher, optimizer, loader)

    fp.save_pruned(student, tmp_path / "student.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    again = fp.load_pruned(copy.deepcopy(beginning), tmp_path / "student.safetensors")
    its_optimizer = torch.optim.AdamW(again.parameters(), lr=2e-3)
    its_optimizer.load_state_dict(state["optimizer"])
    its = fp.Pruner(again, "taylor", 0.75, rounds=2, schedule="linear", **options)
    its.load_state_dict(state["pruner"])
    batches = list(loader)
    report = its.step(batches)
    assert str(report) == str(pruner.step(batches))
    assert 0.2 < report.left.flops / report.dense.flops <= 0.25

    final = fp.shrink(again, example, optimizer=its_optimizer, pruner=its)
    labelled = copy.deepcopy(final)  # the same cut, without its teacher
    alone = torch.optim.AdamW(labelled.parameters(), lr=2e-3)
    for _ in range(12):
        distil(final, teacher, its_optimizer, loader)
        train(labelled, alone, loader)
    assert accuracy(final, *held_out) > taught - 0.08
    print(taught, accuracy(final, *held_out), accuracy(labelled, *held_out))
    assert all(torch.equal(value, was[name]) for name, value in teacher.state_dict().items())
    assert fp.export(final, example, tmp_path / "student.onnx").difference < 1e-3
