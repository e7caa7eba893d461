"""The command line in this process: what a shell would see, without a second import of torch."""

import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from typer.testing import CliRunner

from candle_mi_parity.cli.cli import app
from candle_mi_parity.spec.paths import ROOT, cache_root


@dataclass(frozen=True)
class Done:
    """What a command left: named as of :class:`subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str, environment: Mapping[str, str] | None = None) -> Done:
    """Run ``candle-mi-parity`` with these arguments.

    :param environment: is set while it runs; what a library reads when it is imported comes too late.
    """
    defaults = {"COLUMNS": "160", "PARITY_CACHE": str(cache_root())}
    done = CliRunner().invoke(app, list(arguments), env={**defaults, **(environment or {})})
    error = done.exception
    crash = "" if error is None or isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    return Done(done.exit_code, done.stdout, done.stderr + crash)


def process(*arguments: str, environment: Mapping[str, str]) -> Done:
    """Run it in a process of its own, whose libraries read this environment when they are imported."""
    code = "from candle_mi_parity.cli.cli import main; main()"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160", "PARITY_CACHE": str(cache_root()), **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def one_line(done: Done) -> str:
    """The one line that a bad input gets."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]
