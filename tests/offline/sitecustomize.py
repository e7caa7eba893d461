"""Imported by every Python that a test starts, since this directory is on its PYTHONPATH."""

from no_network import forbid  # type: ignore[import-not-found]

forbid()
