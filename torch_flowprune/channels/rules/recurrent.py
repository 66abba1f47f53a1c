"""Rules for recurrent layers and their cells: a hidden unit is its rows of every gate, and what reads it.

A layer states one hidden size for all of its layers and directions, so unit i of each goes together. With no weights
left a unit keeps half of its state at each step, or nothing: it is zero where it starts from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.channels.rules.matrix import linear_layer
from torch_flowprune.channels.tracing import Value, Walk

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _step(g: Walk, x: Value, state: Value, weights: Sequence[Value | None], gates: int) -> Tensor:
    """The labels of the hidden units that an input and a state are turned into.

    weights: of the input, of the state, and a bias each.
    """
    units: list[Tensor] = []
    for value, weight, bias in ((x, weights[0], weights[2]), (state, weights[1], weights[3])):
        assert weight is not None
        out = linear_layer(g.at_shape((*value.shape[:-1], weight.shape[0])), value, weight, bias)
        units += list(out.dims[-1].view(gates, -1))
    for one in units[1:]:
        g.join(units[0], one)
    return units[0]


def cell(gates: int) -> Callable[..., Any]:
    """One step of one layer; an LSTM's state is a pair."""

    def rule(
        g: Walk, x: Value, hx: Any, w_ih: Value, w_hh: Value, b_ih: Value | None = None, b_hh: Value | None = None
    ) -> Any:
        states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        units = _step(g, x, states[0], (w_ih, w_hh, b_ih, b_hh), gates)
        for state in states:
            g.join(state.dims[-1], units)
        zero = (*[False] * (x.ndim - 1), states[-1].zero[-1])
        out = Value((*x.dims[:-1], units), zero)
        return [out, out] if len(states) == 2 else out

    return rule


def layers(gates: int) -> Callable[..., list[Value]]:
    """All steps of all layers, of one or of both directions, with a projection of the units or without."""

    def rule(
        g: Walk, x: Value, hx: Any, params: Sequence[Value], has_biases: bool, num_layers: int, bidirectional: bool
    ) -> list[Value]:
        states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        held = _Layers(g, gates, params, 2 if bidirectional else 1, has_biases, num_layers)
        for labels in x.dims[:-1]:
            g.freeze(labels, "is a sequence that is read in order")
        for layer in held.by_layer():
            x = held.run(x, states, layer)
        return [x, *(held.ends(state) for state in states)]

    return rule


class _Layers:
    """The weights of a recurrent layer, and how a sequence goes through them."""

    def __init__(self, g: Walk, gates: int, params: Sequence[Value], directions: int, biases: bool, count: int) -> None:
        self.g, self.gates, self.directions, self.biases = g, gates, directions, biases
        size = len(params) // (count * directions)
        self.parts = [params[i : i + size] for i in range(0, len(params), size)]

    def by_layer(self) -> Iterator[list[Sequence[Value]]]:
        """The weights of each layer's directions."""
        for i in range(0, len(self.parts), self.directions):
            yield self.parts[i : i + self.directions]

    def run(self, x: Value, states: Sequence[Value], layer: Sequence[Sequence[Value]]) -> Value:
        outs = [self._direction(x, states, weights) for weights in layer]
        dims = (*self.g.fixed(x.shape[:-1]).dims, torch.cat([out.dims[-1] for out in outs]))
        return Value(dims, (*[False] * (x.ndim - 1), all(out.zero[-1] for out in outs)))

    def _direction(self, x: Value, states: Sequence[Value], weights: Sequence[Value]) -> Value:
        g, (w_ih, w_hh) = self.g, weights[:2]
        b_ih, b_hh = weights[2:4] if self.biases else (None, None)
        projection = weights[-1] if len(weights) in (3, 5) else None
        state, held = states[0], states[-1]
        if projection is not None:  # the state is the projection; what is zero of it, its rows say
            state = Value(state.dims, (*state.zero[:-1], state.zero[-1] and projection.zero[0]))
        units = _step(g, x, state, (w_ih, w_hh, b_ih, b_hh), self.gates)
        g.join(held.dims[-1], units)
        out = Value((*x.dims[:-1], units), (*[False] * (x.ndim - 1), held.zero[-1]))
        if projection is not None:
            out = linear_layer(g.at_shape((*x.shape[:-1], projection.shape[0])), out, projection)
        g.join(states[0].dims[-1], out.dims[-1])
        return out

    def ends(self, state: Value) -> Value:
        """The last state of each layer and direction."""
        fixed = self.g.fixed(state.shape[:-1])
        return Value((*fixed.dims, state.dims[-1]), (*[False] * (state.ndim - 1), state.zero[-1]))


RECURRENT_RULES: dict[str, Callable[..., Any]] = {
    **{name: layers(gates) for name, gates in _GATES.items()},
    **{f"{name}_cell": cell(gates) for name, gates in _GATES.items()},
}
