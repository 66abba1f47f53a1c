"""Dead channels physically removed: the same classes, smaller tensors, and outputs that are proved equal.

``shrink`` slices parameters, buffers and optimizer state, and sets the attributes that state sizes (``out_channels``,
``num_heads``).
The result is run against the masked model before anything is handed out: in float64, in eval and in train mode, with
affine parameters and running statistics shaken, so that defaults of zero and one hide nothing. If the two differ, the
model is left as it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels.coupling import arguments_of, check_whole, coupling_of, reading_of
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.shrinking.attempts import Bench, attempt, attempt_but_for, untried
from torch_flowprune.channels.shrinking.best_reading import best_surgery, both_readings, passing_over, surgery_of_read
from torch_flowprune.channels.shrinking.handing_over import Follower, Handover, Optimizers, state_sizes
from torch_flowprune.channels.shrinking.removed_branches import TakenOut, taken_out
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, note_cut_buffers, operated
from torch_flowprune.channels.shrinking.written import written
from torch_flowprune.channels.tracing import Reading, canonical_names, without_onlookers
from torch_flowprune.inputs import (
    check_keywords,
    forget_caches,
    own_names,
    parameters_of,
    uncompiled,
    unwrapped,
    users_level,
)
from torch_flowprune.masking import apply_masks, averaged_model, dense_copy, remove, write_zeros


def shrink(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    coupling: Coupling | None = None,
    reading: Reading | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: Optimizers | None = None,
    pruner: Follower | None = None,
    averages: Iterable[Any] = (),
    inplace: bool = False,
    graphs: bool = False,
    verify: bool = True,
    **unknown: Never,
) -> nn.Module:
    """A smaller model without the dead channels of this one; its outputs are checked against the masked model's.

    A channel is dead if the masks remove all of its unit, or everything that reads it; a residual branch, if they
    remove what makes it add anything: its modules are then taken out, and the others keep their names. Masks of single
    weights and of filters are cut to size and carried over. So are gradients, attributes and hooks that you put on
    parameters, and the state of ``optimizer`` and ``pruner``.

    Args:
        model: the pruned model; left as it was unless ``inplace``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of them; a batch of two
            samples or more.
        masks: by parameter name, True = kept; if left out, the model's masks, or exact zeros if it has none.
        coupling, reading: those of the model without masks, if you have them or wrote them by hand; else they are read
            from the model.
        kwargs: further keyword arguments of the model's forward.
        optimizer: one or several, which continue with the smaller parameters: their state (momentum) is cut too,
            schedulers and scalers keep working, and :func:`~torch_flowprune.keep_zeros` stays in force.
        pruner: a :class:`~torch_flowprune.Pruner` of this model, which continues with the smaller one.
        averages: averages of the model (EMA, SWA), as :func:`~torch_flowprune.sync_masks` takes them, and those of
            ``pruner``: made smaller in place, so that they continue with the smaller model.
        inplace: change this model instead of a copy.
        graphs: if a module's code cannot be adapted to the new sizes, replace the module by its exported graph, which
            supports only calls like the example, and says so. Without ``graphs``, or with ``inplace``, this is an
            error.
        verify: whether the result is proved before it is returned. With False, sizes are set to their likeliest values
            and nothing is run: for a model that has already passed the proof.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        The smaller model.

    Raises:
        ShrinkError: if no smaller model computes what the masked one does, or if an optimizer's state cannot be cut.
            Nothing is changed.
        ValueError: if a coupling does not fit the model, or if an optimizer, a pruner or an average belongs to another
            model.

    Warns:
        UserWarning: if dead channels stay, masked, because a module's code does not take fewer; if trainable parameters
            are in none of the given optimizers; with ``inplace``, also if an optimizer with
            :func:`~torch_flowprune.keep_zeros` was not given.

    See Also:
        :func:`~torch_flowprune.save_pruned`: writes the smaller model to a file.
        :func:`~torch_flowprune.export`: writes ONNX or ``torch.export`` files.
        :func:`~torch_flowprune.replaced_modules`: which modules got different code.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=torch.ones(2, 3))
    >>> fp.shrink(model, torch.ones(2, 3))[0].out_features
    4
    """
    check_keywords(shrink, unknown)
    check_whole(model)
    if inplace:
        _check_exchanges_nothing(model)
    followers, inner = _averaged(model, averages, pruner), unwrapped(model)
    dense, own_masks = dense_copy(inner)
    given = _by_canonical_name(dense, {**own_masks, **(masks or {})})
    write_zeros(dense, given)
    args, keywords = arguments_of(dense, example_inputs, kwargs)
    with uncompiled():
        found = _found(dense, given, (args, keywords), reading, coupling, graphs and not (inplace or followers), verify)
    small, left = found.small, found.left()
    if inplace or followers:
        _check_can_be_in_place(found.dense, small)
    if left and not found.surgery.keep and not found.taken.standings:
        _warn_nothing_goes(left, found.unknown)
    apply_masks(small, {name: mask for name, mask in left.items() if name in dict(small.named_parameters())})
    handover = Handover.planned(model, found.taken.surgery(found.surgery), optimizer, pruner)
    for one in followers:
        state_sizes(found.operated_on(one), args, keywords, rescale=False)
    if inplace:
        handover.warn_left_behind()
        small = found.operated_on(inner)
    note_cut_buffers(found.dense, small)
    state_sizes(small, args, keywords, rescale=optimizer is None and pruner is None and not followers)
    whole = small if inner is model else model if inplace else copy.deepcopy(model, {id(inner): small})
    handover.to(whole)
    return whole


def _by_canonical_name(dense: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the first name of each parameter, whichever of its names, or of a wrapper's for it, they have."""
    names, known = canonical_names(dense), parameters_of(dense)
    for given, name in own_names(known, masks).items():
        if name not in known:
            raise ValueError(f"this model has no parameter {given!r}")
        if (shape := tuple(known[name].parameter.shape)) != tuple(masks[given].shape):
            raise ValueError(f"the mask of {name!r} should have shape {shape}, got {tuple(masks[given].shape)}")
    return {names[name]: masks[given].bool() for given, name in own_names(known, masks).items()}


def _averaged(model: nn.Module, averages: Iterable[Any], pruner: Follower | None) -> list[nn.Module]:
    """The copies of the model that averages hold, each once."""
    given = [*averages, *([] if pruner is None else pruner.averages)]
    return list(dict.fromkeys(averaged_model(model, one) for one in given))


@dataclass(frozen=True)
class _Found:
    """What there is to do, tried on a copy.

    Attributes:
        dense: the copy, without the branches that are taken out.
        small: what became of it.
        taken, surgery: what was done.
        masks: of the parameters that are still there, before they are cut.
        unknown: the operators without a rule, which keep the channels that they touch.
    """

    dense: nn.Module
    small: nn.Module
    taken: TakenOut
    surgery: Surgery
    masks: Mapping[str, Tensor]
    unknown: Collection[str]

    def left(self) -> dict[str, Tensor]:
        return self.surgery.left_of(self.masks)

    def operated_on(self, model: nn.Module) -> nn.Module:
        """A model like the copy, the user's own or an average of it, made smaller in place."""
        whole = self.taken.of(remove(model))
        write_zeros(whole, self.masks)
        small = written(operated(whole, self.surgery), self.surgery)
        forget_caches(small)
        apply_masks(small, self.left())
        note_cut_buffers(self.dense, small)
        return small


def _found(
    dense: nn.Module,
    given: Mapping[str, Tensor],
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    reading: Reading | None,
    coupling: Coupling | None,
    graphs: bool,
    verify: bool,
) -> _Found:
    """What masks leave of a model, whose zeros it has."""
    args, keywords = call
    quiet = without_onlookers(dense, args, keywords)
    read, masked = reading or reading_of(quiet, args, keywords), bool(given)
    taken = taken_out(quiet, read, given, args, keywords, verify)
    if taken.standings:
        dense = taken.of(dense)
        quiet, given = without_onlookers(dense, args, keywords), taken.left_of(given)
        coupling = coupling and taken.coupling(coupling)
        read = reading_of(quiet, args, keywords)
    readings = [read] if read is reading else both_readings(quiet, read)
    zeros = given if masked else {name: parameter != 0 for name, parameter in dense.named_parameters()}
    reading, surgery = best_surgery(dense, readings, coupling, zeros, taken.staying)
    surgeries = [surgery]
    if verify and surgery.left_of(given):
        more = surgery_of_read(dense, reading, coupling, given, taken.staying)
        surgeries = [surgery] if more is None else [more, surgery]
    benches = [Bench(dense, quiet, reading, one, args, keywords, given) for one in surgeries]
    small, surgery = _smaller(benches, graphs, verify, coupling, taken.staying)
    return _Found(dense, small, taken, surgery, given, tuple(reading.unknown))


def _smaller(
    benches: Sequence[Bench], graphs: bool, verify: bool, coupling: Coupling | None, staying: Collection[str]
) -> tuple[nn.Module, Surgery]:
    """The first of these that passes, the last without some groups if need be; the model itself where nothing goes."""
    for bench in benches[:-1]:
        with suppress(ShrinkError):
            return attempt(bench, graphs=False)
    last = benches[-1]
    if not last.surgery.keep:
        return last.whole, last.surgery
    if not verify:
        return untried(last)
    try:
        return attempt(last, graphs)
    except ShrinkError as error:
        groups = passing_over(coupling or coupling_of(last.reading), staying, last.masks)
        return attempt_but_for(last, groups, error)


def _check_exchanges_nothing(model: nn.Module) -> None:
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ShrinkError(
            "DistributedDataParallel exchanges the gradients of the parameters that it was made with, so a wrapped "
            "model cannot be shrunk in place: use the model that shrink returns without inplace=True, and wrap it again"
        )


def _check_can_be_in_place(dense: nn.Module, small: nn.Module) -> None:
    if type(small) is not type(dense):
        raise ShrinkError(
            f"a {type(dense).__name__} becomes a {type(small).__name__} when it is shrunk, which cannot be done in "
            "place: use the model that shrink returns without inplace=True, and shrink averages separately"
        )


def _warn_nothing_goes(left: Mapping[str, Tensor], unknown: Collection[str]) -> None:
    touching = f"; operators without a rule keep the channels that they touch: {', '.join(unknown)}" if unknown else ""
    warnings.warn(
        f"no channel is dead, so nothing is removed, and the masks stay ({', '.join(list(left)[:5])}): a "
        "channel is alive while its filter, its bias, its norm or a layer that reads it is; granularity='channel' "
        f"prunes these together{touching}",
        UserWarning,
        stacklevel=users_level(),
    )
