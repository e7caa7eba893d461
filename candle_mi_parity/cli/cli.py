"""The command ``candle-mi-parity``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from types import FrameType

import typer

from candle_mi_parity.cli.check import check_command
from candle_mi_parity.cli.compare import diff_command, history_command
from candle_mi_parity.cli.hunt import hunt_command
from candle_mi_parity.cli.maint import maint
from candle_mi_parity.cli.repro import repro_command
from candle_mi_parity.cli.run import list_command, run_command
from candle_mi_parity.errors import Stopped

HELP = """Does candle-mi compute what PyTorch computes? `run` judges its cases, `check` your own model."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
app.command("run")(run_command)
app.command("check")(check_command)
app.command("diff")(diff_command)
app.command("repro")(repro_command)
app.command("hunt")(hunt_command)
app.command("history")(history_command)
app.command("list")(list_command)
app.add_typer(maint, name="maint", help="Maintenance of the suite itself.")

ERROR = 2
"""The exit code of a crash and of a stop; 1, the default of Python and typer, means FAIL."""

_stopped = threading.Event()


def main() -> None:
    _stopped.clear()
    try:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) is not signal.SIG_IGN:  # as nohup and a shell's background jobs have it
                signal.signal(name, _stop)
        app()
    except Stopped as stopped:
        print(f"candle-mi-parity: stopped by {stopped}", file=sys.stderr)
        sys.exit(ERROR)
    except Exception:
        traceback.print_exc()
        sys.exit(ERROR)
    finally:
        # Python joins the threads of an executor at exit, and one may be computing a truth for minutes.
        others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
        if _stopped.is_set() and not all(thread.daemon for thread in others):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ERROR)


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped.set()
    raise Stopped(signal.Signals(number).name)
