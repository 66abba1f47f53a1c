"""Scores as a value: printed, saved, loaded, pruned with again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs import (
    HeldUnits,
    Ranks,
    is_sharded,
    local,
    own_names,
    read_tensors,
    real_tensor,
    same_values,
    whole,
    write_tensors,
)
from torch_flowprune.scoring.candidates import Candidate, Candidates, label
from torch_flowprune.scoring.granularity import Granularity
from torch_flowprune.scoring.stacked import Computed, LayerScores
from torch_flowprune.tables import InNotebooks, Table

_GRANULARITY = "_flowprune_granularity"


def granularity_of(scores: Tensor) -> str | None:
    """The granularity of scores that were read off :class:`Scores`; None of others, whose order nothing tells."""
    return getattr(scores, _GRANULARITY, None)


class Scores(Mapping[str, Tensor], InNotebooks):
    """One score per unit, by parameter name: what :func:`scores` returns and ``global_prune(scores=...)`` accepts.

    It is a mapping from parameter names to 1-d tensors (units,), in model order. For a sharded parameter, scores of
    single weights are a ``DTensor`` in its shape and placements.

    Attributes:
        method: the name of the measure.
        granularity: what the units are.

    >>> import torch, torch_flowprune as fp
    >>> found = fp.scores(torch.nn.Linear(3, 2), "magnitude", granularity="filter")
    >>> {name: tuple(values.shape) for name, values in found.items()}
    {'weight': (2,)}
    """

    def __init__(self, values: Mapping[str, LayerScores], method: str, granularity: str) -> None:
        self._values, self.method, self.granularity = values, method, granularity

    def stored(self, name: str) -> LayerScores:
        """One parameter's scores as they are kept: a tensor, or what computes it where it is read."""
        return self._values[name]

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        scores = value.all() if isinstance(value, Computed) else value
        vars(scores)[_GRANULARITY] = self.granularity
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scores):
            return False
        alike = (self.method, self.granularity) == (other.method, other.granularity)
        return alike and same_values(dict(self), dict(other))

    def __str__(self) -> str:
        return f"{self._summary()}\n{self._cells()}"

    def _summary(self) -> str:
        here = ", of which a table of those on this rank" if any(map(is_sharded, self.values())) else ""
        return f"{self.method} scores of {sum(map(torch.numel, self.values())):,} units ({self.granularity}){here}"

    def _cells(self) -> Table:
        """Of shards the part that is here: one rank alone may print."""
        header = ("parameter", "units", "lowest", "median", "highest", "zero")
        parts = {name: local(value) for name, value in self.items()}
        return Table(header, [_row(name, value) for name, value in parts.items() if value.numel()])

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, with the measure and the granularity in its metadata.

        Scores that are shards are put together on the first rank, which writes the file: every rank makes this call.
        Where they do not fit in its memory, ``torch.distributed.checkpoint`` saves ``dict(scores)``.
        """
        about = {"method": self.method, "granularity": self.granularity, "names": list(self)}
        ranks, values = Ranks.holding(self.values()), dict[str, Tensor]()
        for name, value in self.items():
            every = self._in_one_piece(value)
            if ranks.are_first:
                values[name] = every if ranks.alone else every.cpu()
        with ranks.together():
            if ranks.are_first:
                write_tensors(path, values, about)

    def _in_one_piece(self, value: Tensor) -> Tensor:
        """Scores of single weights as one process has them; those of n:m blocks, in another order, as the parameter."""
        return whole(value).flatten() if self.granularity == "weight" else whole(value)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a file of another kind or a damaged file.
        """
        tensors, about = read_tensors(path, "scores", "Scores.save")
        words, names = [about.get("method"), about.get("granularity")], about.get("names")
        known = isinstance(names, list) and all(isinstance(name, str) and name in tensors for name in names)
        if not known or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path} holds no scores: expected a file written by Scores.save")
        return cls({name: tensors[name] for name in about["names"]}, about["method"], about["granularity"])


def given(scores: Mapping[Any, Tensor], found: Candidates, granularity: Granularity) -> Scores:
    """Scores from outside, by name or ``(module, name)``, checked: one for every unit of every candidate, no nan."""
    if isinstance(scores, Scores) and scores.granularity != label(granularity):
        raise ValueError(
            f"these scores are of units {scores.granularity!r}, and granularity={label(granularity)!r} was asked for: "
            "compute scores of those, or leave granularity= out"
        )
    values = {}
    known = {target.name: target for candidate in found.values() for target in candidate.targets}
    names = {own: key for key, own in own_names(known, [key for key in scores if isinstance(key, str)]).items()}
    for name, candidate in found.items():
        keys = (name, names.get(name), *(owner for target in candidate.targets for owner in target.owners))
        value = next((scores[key] for key in keys if key in scores), None)
        if value is None:
            raise ValueError(
                f"scores= has no entry for {name!r}: compute scores for it too, or leave it out with exclude="
            )
        values[name] = _as_units(value, candidate)
    return Scores(values, getattr(scores, "method", "given scores"), label(granularity))


def _as_units(value: Tensor, candidate: Candidate) -> Tensor:
    name, held = candidate.name, candidate.shard
    value = real_tensor(value, f"the scores of {name!r}")
    value = whole(value) if held is None else _of_this_rank(value, candidate, held)
    shaped = value.shape == candidate.shape and value.numel() == len(candidate)
    laid = candidate.all_rows({name: value}).squeeze(-1) if shaped and value.dim() != 1 else value
    if laid.shape != (len(candidate) if held is None else len(held),):
        raise ValueError(
            f"the scores of {name!r} have shape {tuple(value.shape)}: expected one per unit, ({len(candidate)},)"
        )
    if (
        laid.sum().isnan() and laid.isnan().any()
    ):  # the sum is nan where a score is (or where both infinities are), and quick
        raise ValueError(f"the scores of {name!r} hold nan: they cannot be ranked")
    return laid.detach().to(candidate.targets[0].parameter.device)


def _of_this_rank(value: Tensor, candidate: Candidate, held: HeldUnits) -> Tensor:
    """The units' own, of scores that are shards, of whole ones, and of those that this rank has computed."""
    if is_sharded(value) and value.shape == candidate.shape:
        return candidate.rows({candidate.name: value}).squeeze(-1)
    if value.shape == candidate.shape and value.dim() != 1 and value.numel() == len(candidate):
        value = candidate.all_rows({candidate.name: value}).squeeze(-1)
    return held.part(value) if value.shape == (len(candidate),) else value


def _row(name: str, value: Tensor) -> tuple[str, ...]:
    extremes = (value.min().item(), value.median().item(), value.max().item())
    zero = (value == 0).double().mean().item()
    return name, f"{value.numel():,}", *(f"{number:.3g}" for number in extremes), f"{zero:.1%}"
