"""Calling transformers without its progress output, and with its exceptions as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.models.checkpoint import read_config


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks on loading; a wrong checkpoint shows in what it computes."""
    import transformers

    level = transformers.logging.get_verbosity()
    if level != logging.ERROR:  # each setting clears the cache of every logger, which takes a millisecond
        transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if level != logging.ERROR:
            transformers.logging.set_verbosity(level)


@contextmanager
def transformers_runs(directory: Path, what: str = "run this config") -> Iterator[None]:
    """Turn any exception of transformers into one line.

    :param what: what transformers was asked to do, for the message.
    :raises ModelError: transformers raised an exception.
    """
    try:
        with quiet():
            yield
    except ParityError:
        raise
    except OSError as error:
        raise ModelError(f"transformers cannot read {directory}: {one_line(str(error))}") from error
    except Exception as error:
        said = one_line(str(error))
        if isinstance(error, LookupError | AttributeError) or not said:  # their text is the bare name of a key
            said = _unknown_value(directory, error) or f"{type(error).__name__}: {said}"
        raise ModelError(f"transformers cannot {what}: {directory}: {said}") from error


def _unknown_value(directory: Path, error: Exception) -> str:
    """The key of ``config.json`` whose value a lookup did not find; empty if there is none."""
    if not isinstance(error, KeyError) or not (directory / "config.json").is_file():
        return ""
    config = read_config(directory)
    blocks = {f"{name}.": block for name, block in config.items() if isinstance(block, dict)} | {"": config}
    held = [f"{start}{key}" for start, block in blocks.items() for key in block if [block[key]] == [*error.args]]
    return f"config.json: it does not know the {held[0]} {one_line(repr(error.args[0]))}" if held else ""
