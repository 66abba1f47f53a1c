"""The numbers that a model's class is built with, and which of them make tensors of given shapes."""

from torch_flowprune.channels.construction.alike import is_uniform, sites_of
from torch_flowprune.channels.construction.constructors import (
    Constructor,
    Numbers,
    Shapes,
    constructor_of,
    shapes_of,
)
from torch_flowprune.channels.construction.fitted_numbers import FittedNumbers, fitted_numbers_of

__all__ = [
    "Constructor",
    "FittedNumbers",
    "Numbers",
    "Shapes",
    "constructor_of",
    "fitted_numbers_of",
    "is_uniform",
    "shapes_of",
    "sites_of",
]
