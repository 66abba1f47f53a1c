"""The code of a model, read and run with other numbers in a few places."""

from torch_flowprune.channels.shrinking.own_code.code_read import attributes_compared, attributes_of_parts_read
from torch_flowprune.channels.shrinking.own_code.dense_spans import forward_over
from torch_flowprune.channels.shrinking.own_code.edited_code import (
    Edits,
    edits_from,
    edits_of,
    lines_of,
    own_class,
    with_edits,
)
from torch_flowprune.channels.shrinking.own_code.plain_forms import PlainForm, plain_forms
from torch_flowprune.channels.shrinking.own_code.running_modules import RunningModules
from torch_flowprune.channels.shrinking.own_code.set_right import SetRight
from torch_flowprune.channels.shrinking.own_code.told_numbers import ToldNumbers, told_numbers

__all__ = [
    "Edits",
    "PlainForm",
    "RunningModules",
    "SetRight",
    "ToldNumbers",
    "attributes_compared",
    "attributes_of_parts_read",
    "edits_from",
    "edits_of",
    "forward_over",
    "lines_of",
    "own_class",
    "plain_forms",
    "told_numbers",
    "with_edits",
]
