"""transformers without its remarks, and with its exceptions as one line that says who refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.files.escape import one_line


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports loading on stderr; a wrong checkpoint is judged by what it computes, not read there."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


@contextmanager
def transformers_runs(directory: Path, what: str = "run this config") -> Iterator[None]:
    """Give transformers what a user wrote, and nothing of ours to fail beside it.

    :param what: which it is to do, for the error.
    :raises ModelError: whatever transformers raised; it has an exception of its own for each kind of wrong value.
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
            said = f"{type(error).__name__}: {said}"
        raise ModelError(f"transformers cannot {what}: {directory}: {said}") from error
