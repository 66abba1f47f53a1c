"""Scores at initialisation in eval mode, where batch norms do nothing: said, and only there."""

import copy
import warnings

import pytest
import torch
from torch import nn

import torch_flowprune as fp

_X, _Y = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
_SAID = "the batch norms of this model have seen no batch yet"


def _net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


_CALLS = {
    "scores": lambda model, **options: fp.scores(model, "snip", data=(_X, _Y), **options),
    "global_prune": lambda model, **options: fp.global_prune(model, "grasp", 0.5, data=(_X, _Y), **options),
    "hessian_vector": lambda model, **options: fp.hessian_vector(
        model, (_X, _Y), {"0.weight": torch.ones_like(model[0].weight)}, **options
    ),
    "Pruner": lambda model, **options: fp.Pruner(model, "snip", 0.5, **options).step((_X, _Y)),
    "predict": lambda model, **options: fp.predict(
        model, {"0.weight": torch.rand(4, 3, 3, 3) > 0.5}, [(_X, _Y), (_X, _Y)], **options
    ),
}


@pytest.mark.parametrize("call", _CALLS)
def test_an_untrained_batch_norm_is_said(call):
    model = _net()
    with pytest.warns(UserWarning, match=rf"{_SAID} \(1\): .*mode='train'"):
        _CALLS[call](model)


def _silent(call, model, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_SAID)
        _CALLS[call](model, **options)


@pytest.mark.parametrize("call", ["scores", "global_prune", "hessian_vector", "Pruner"])
def test_nothing_is_said_in_train_mode_nor_of_a_model_that_has_seen_a_batch(call):
    _silent(call, _net(), mode="train")
    _silent(call, fp.recalibrate(_net(), _X))
    trained = _net()
    trained(_X)
    _silent(call, trained)


def test_a_state_written_without_counts_is_of_a_trained_model():
    model = _net()
    model(_X)
    model[1].num_batches_tracked.zero_()
    _silent("scores", model)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.Identity()])
def test_norms_without_statistics_are_not_meant(norm):
    model = _net()
    model[1] = norm
    _silent("scores", model)


def test_nothing_is_said_where_the_model_does_not_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.global_prune(_net(), "magnitude", 0.5)
        fp.global_prune(_net(), "synflow", 0.5, example_inputs=_X)


def test_what_is_advised_gives_the_scores_of_the_training_forward():
    model = _net()
    trained = fp.recalibrate(copy.deepcopy(model), (_X, _Y))
    advised = fp.scores(trained, "snip", data=(_X, _Y))
    training = fp.scores(model, "snip", data=(_X, _Y), mode="train")
    with pytest.warns(UserWarning, match=_SAID):
        eval_ = fp.scores(model, "snip", data=(_X, _Y))
    correlation = lambda scores: torch.corrcoef(
        torch.stack([torch.cat(list(scores.values())), torch.cat(list(training.values()))])
    )[0, 1]
    assert correlation(advised) > correlation(eval_)


def test_missing_data_are_said_before_anything_about_the_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="this needs data: pass data="):
            fp.flow(_net())
