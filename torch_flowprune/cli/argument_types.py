"""What a word on the command line is read as."""

from __future__ import annotations

import argparse
from pathlib import Path

_LARGEST_SEED = 2**63 - 1
_HUNDRED = 100


def as_model(text: str) -> str:
    """A model as timm names it: also ``owner/name`` on the Hugging Face hub, and a folder."""
    if ":" in text or not ("/" in text or Path(text).is_dir()):
        return text
    return f"local-dir:{text}" if Path(text).is_dir() else f"hf-hub:{text}"


def as_fraction(text: str) -> float:
    """A number from 0 to 1; percent are answered with what to write."""
    try:
        value = float(text.strip().rstrip("%").replace(",", "."))
    except ValueError:
        value = float("nan")
    if (text.strip() == text and text.endswith("%")) or "," in text or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{_hint(text, value)}expected a fraction from 0 to 1, such as 0.9, got {text!r}"
        )
    return value


def _hint(text: str, value: float) -> str:
    percent = text.endswith("%") or value > 1
    meant = value / _HUNDRED if percent else value
    return f"write {meant:g}: " if 0 <= meant <= 1 else ""


def as_count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def as_workers(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def as_seed(text: str) -> int:
    """What torch's generators take."""
    if not text.isdecimal() or int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {_LARGEST_SEED}, got {text!r}")
    return int(text)


def as_number(text: str) -> int | float:
    """A whole number, or a fraction."""
    return int(text) if text.isdecimal() else as_fraction(text)


def as_amount(text: str) -> tuple[str, float]:
    """A word and a positive number: ``latency=12.5``."""
    word, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not word or not value > 0:
        raise argparse.ArgumentTypeError(f"expected COST=AMOUNT, such as latency=12.5, got {text!r}")
    return word, value
