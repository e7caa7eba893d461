"""Versions of installed packages; reading one parses a file of some kilobytes, and a run asks hundreds of times."""

from functools import cache
from importlib import metadata

version = cache(metadata.version)
