"""The ways to build a smaller model, tried until one passes the proof."""

from torch_flowprune.channels.shrinking.attempts.bench import Bench
from torch_flowprune.channels.shrinking.attempts.in_turn import attempt, untried
from torch_flowprune.channels.shrinking.attempts.staying_groups import attempt_but_for

__all__ = ["Bench", "attempt", "attempt_but_for", "untried"]
