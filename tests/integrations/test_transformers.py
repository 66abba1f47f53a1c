"""transformers itself: folders that it writes and reads, and its Trainer, killed and resumed."""

import copy
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from language_models import build, generated, inputs, logits
from safetensors.torch import load_file
from torch import nn

import torch_flowprune as fp

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
from torch_flowprune.integrations.transformers import (  # noqa: E402
    FlowPruningCallback,
    from_pretrained,
    save_pretrained,
)

MASKS = "flowprune_masks.safetensors"


def pruned(name="Llama", sparsity=0.5):
    model = build(name)
    fp.global_prune(model, "magnitude", sparsity)
    return model


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "T5"])
@pytest.mark.parametrize("way", ["as it is", "copied", "pickled", "loaded", "a dict given"])
def test_a_masked_model_saved_as_any_other_never_ends_in_random_weights(tmp_path, name, way):
    model, given = pruned(name), inputs(name)
    expected = logits(model, given)
    if way == "copied":
        model = copy.deepcopy(model)
    elif way == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif way == "loaded":
        model = fp.load_state_dict(build(name), fp.state_dict(model))
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if way == "a dict given" else {}))
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, given), expected)
    assert not any("_orig" in key for key in load_file(tmp_path / "model.safetensors"))
    assert any("weight_orig" in key for key in model.state_dict())  # and the model goes on as it was
    masked = from_pretrained(type(model), tmp_path)
    assert all(torch.equal(mask, fp.masks(model)[key]) for key, mask in fp.masks(masked).items())
    assert fp.masks(masked).keys() == fp.masks(model).keys()
    assert torch.equal(logits(masked, given), expected)


def test_without_masks_nothing_is_left():
    model = fp.remove(pruned())
    assert "save_pretrained" not in vars(model)


def test_a_model_inside_another_module(tmp_path):
    outer = nn.Sequential(build("Bert"))
    fp.global_prune(outer, "magnitude", 0.5)
    outer[0].save_pretrained(tmp_path)
    again = type(outer[0]).from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs("Bert")), logits(outer[0], inputs("Bert")))


class Hub(nn.Module):
    """A method of that name that stores the state dict, as hub mixins have it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def save_pretrained(self, save_directory):
        torch.save(self.state_dict(), save_directory / "weights.pt")


def test_another_librarys_method_of_that_name(tmp_path):
    model = Hub()
    fp.global_prune(model, "magnitude", 0.5)
    model.save_pretrained(tmp_path)
    other = Hub()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other.a.weight, model.a.weight)


def test_masks_of_other_weights_are_refused(tmp_path):
    pruned().save_pretrained(tmp_path)
    build("Llama").save_pretrained(tmp_path)  # over it, and dense
    with pytest.raises(ValueError, match="the masks in .* are of other weights than those beside them"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


def shrunk(name="Llama"):
    model, given = build(name), inputs(name)
    fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=given)
    return fp.shrink(model, given)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_shrunk_model_of_uneven_sizes(tmp_path, name):
    small, given = shrunk(name), inputs(name)
    save_pretrained(small, tmp_path)
    for kind in (transformers.AutoModelForCausalLM, type(small)):
        again = from_pretrained(kind, tmp_path)
        assert torch.equal(logits(again, given), logits(small, given))
        assert torch.equal(generated(again, given), generated(small, given))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is loaded as it is: dtype should be left out"):
        from_pretrained(kind, tmp_path, dtype=torch.float16)


def test_a_shrunk_and_masked_model(tmp_path):
    small, given = shrunk(), inputs("Llama")
    fp.global_prune(small, "magnitude", 0.5)
    save_pretrained(small, tmp_path)
    again = from_pretrained(type(small), tmp_path)
    assert torch.equal(logits(again, given), logits(small, given))
    assert fp.masks(again).keys() == fp.masks(small).keys()


def test_a_dense_model_goes_the_usual_way(tmp_path):
    model, given = build("Llama"), inputs("Llama")
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(type(model), tmp_path), given), logits(model, given))


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Texts(torch.utils.data.Dataset):
    """Forty texts of seven words."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        words = torch.randint(3, 64, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": words, "labels": words}


class Kill(transformers.TrainerCallback):
    """Stops the process's training in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **known):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(folder, callbacks, **words):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 1e-2}
    args = transformers.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **{**settings, **words}
    )
    return transformers.Trainer(
        build("Llama", attention_dropout=0.1),
        args,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=list(callbacks),
    )


CALLBACKS = {
    "magnitude": lambda: FlowPruningCallback("magnitude", 0.6, rounds=3, every_n_steps=5),
    "tracked": lambda: FlowPruningCallback("taylor", 0.6, rounds=3, every_n_steps=5, min_keep=0.2),
    "by epoch": lambda: FlowPruningCallback("loss_preservation", 0.6, rounds=2, min_keep=0.2),
    "swept": lambda: FlowPruningCallback(
        "gradient_norm_preservation",
        0.5,
        rounds=2,
        min_keep=0.2,
        every_n_steps=6,
        data=torch.utils.data.DataLoader(Texts(), 20),
        closure=lambda model, batch: model(**batch).loss,
    ),
    "channels": lambda: FlowPruningCallback(
        "taylor", 0.4, rounds=2, every_n_steps=6, granularity="channel", example_inputs=inputs("Llama")
    ),
}


@pytest.mark.parametrize(
    ("name", "killed_at"),
    [
        ("tracked", 7),
        *(pytest.param(name, step, marks=pytest.mark.slow) for name in CALLBACKS for step in (7, 17)),
    ],
)
def test_killed_and_resumed(tmp_path, name, killed_at):
    whole = trainer(tmp_path / "whole", [CALLBACKS[name]()])
    whole.train()
    first = trainer(tmp_path / "cut", [CALLBACKS[name](), Kill(killed_at)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    callback = CALLBACKS[name]()
    second = trainer(tmp_path / "cut", [callback])
    second.train(resume_from_checkpoint=True)
    assert callback.pruner.done
    one, other = fp.state_dict(whole.model, dense=True), fp.state_dict(second.model, dense=True)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert fp.masks(whole.model).keys() == fp.masks(second.model).keys()
    assert all(torch.equal(mask, fp.masks(second.model)[key]) for key, mask in fp.masks(whole.model).items())


def test_resumed_in_the_same_process_from_an_earlier_checkpoint(tmp_path):
    run = trainer(tmp_path, [CALLBACKS["tracked"]()])
    run.train()
    expected = fp.state_dict(run.model, dense=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(value, expected[key]) for key, value in fp.state_dict(run.model, dense=True).items())


def test_every_checkpoint_is_read_by_a_fresh_process_without_this_package(tmp_path):
    run = trainer(tmp_path, [CALLBACKS["magnitude"]()])
    run.train()
    given = inputs("Llama")
    torch.save(given, tmp_path / "given.pt")
    run.save_model(str(tmp_path / "last"))
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])\n"
        "assert 'torch_flowprune' not in sys.modules\n"
    )
    paths = [tmp_path / "last", tmp_path / "given.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, capture_output=True)
    assert torch.equal(torch.load(paths[-1]), logits(run.model.eval(), given))


def test_the_best_checkpoint_wears_its_own_masks(tmp_path):
    words = {"eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1.0, "load_best_model_at_end": True}
    run = trainer(tmp_path, [CALLBACKS["magnitude"]()], greater_is_better=True, **words)  # such steps ruin a model
    run.train()
    folder = run.state.best_model_checkpoint
    assert not folder.endswith(f"checkpoint-{run.state.max_steps}")
    best = from_pretrained(transformers.AutoModelForCausalLM, folder)
    assert torch.equal(logits(run.model.eval(), inputs("Llama")), logits(best, inputs("Llama")))
    assert fp.masks(run.model).keys() == fp.masks(best).keys()
    assert all(torch.equal(mask, fp.masks(best)[key]) for key, mask in fp.masks(run.model).items())
    assert fp.report(best).sparsity < 0.59  # an earlier round than the last, which is at 0.6


@pytest.mark.parametrize(("at_end", "granularity"), [("remove", "channel"), ("shrink", "channel"), ("shrink", "block")])
def test_what_becomes_of_the_masks(tmp_path, at_end, granularity):
    words = {"granularity": granularity, "example_inputs": inputs("Llama")}
    run = trainer(tmp_path, [FlowPruningCallback("magnitude", 0.4, every_n_steps=5, at_end=at_end, **words)])
    before = sum(one.numel() for one in run.model.parameters())
    run.train()
    assert not fp.masks(run.model)
    assert (sum(one.numel() for one in run.model.parameters()) < before) == (at_end == "shrink")


def test_a_moved_checkpoint(tmp_path):
    run = trainer(tmp_path / "a", [CALLBACKS["magnitude"]()])
    run.train()
    shutil.move(tmp_path / "a" / "checkpoint-16", tmp_path / "elsewhere")
    again = trainer(tmp_path / "b", [CALLBACKS["magnitude"]()])
    with pytest.raises(ValueError, match="has no state of a pruner: .* resume_from="):
        again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    words = {"rounds": 3, "every_n_steps": 5, "resume_from": tmp_path / "elsewhere"}
    again = trainer(tmp_path / "b", [FlowPruningCallback("magnitude", 0.6, **words)])
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    expected = fp.state_dict(run.model, dense=True)
    assert all(torch.equal(value, expected[key]) for key, value in fp.state_dict(again.model, dense=True).items())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"every_n_steps": 1, "every_n_epochs": 1}, "not both"),
        ({"every_n_steps": 0}, "a round should be more than no steps"),
        ({"at_end": "delete"}, "at_end should be one of keep, remove, shrink"),
        ({"at_end": "shrink"}, r"give granularity='channel' \(or 'block'\) and example_inputs="),
        ({"method": "grasp"}, "reads Hg, which training does not compute"),
        ({"every_n_step": 2}, "FlowPruningCallback does not take every_n_step=: did you mean every_n_steps="),
        ({"sparsity": 50}, "for 50 percent write 0.5"),
        ({"granularity": "chanel"}, "did you mean 'channel'"),
    ],
)
def test_words_that_do_not_go_together(words, text):
    with pytest.raises((ValueError, TypeError), match=text):
        FlowPruningCallback(**{"sparsity": 0.5, **words})


def test_more_rounds_than_training_holds(tmp_path):
    with pytest.raises(ValueError, match="9 rounds of 5 steps should fit into training, which has 20"):
        trainer(tmp_path, [FlowPruningCallback("magnitude", 0.5, rounds=9, every_n_steps=5)]).train()


def test_a_model_of_another_library_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match="model should be one of transformers, got Linear: fp.save_pruned writes any other"
    ):
        save_pretrained(nn.Linear(2, 2), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
