"""Versions of installed packages; reading one parses a file of some kilobytes, and a run asks hundreds of times."""

from functools import cache
from importlib import metadata

version = cache(metadata.version)


def is_at_least(name: str, *numbers: int) -> bool:
    """Whether an installed package has this version or a later one, by its first numbers."""
    found = version(name).split(".")[: len(numbers)]
    return tuple(int(number) for number in found) >= numbers
