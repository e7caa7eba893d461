"""False alarms: honest variants of the arithmetic, none of which may be past the gate.

``python -m proof.alarms`` runs ``variants.toml`` and writes a plot, a table and JSON; exit code 1 on any alarm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proof import OUT, alarm_views
from proof.alarm_dumps import Judged, NotRun, judge_all
from proof.variants import load_settings, variants_of


def main(out: Annotated[Path, typer.Option(help="Where plot, table and JSON go.")] = OUT) -> None:
    """Judge every variant; exit 1 on an alarm, or where too few dumps are distinct for a claim."""
    console = Console(stderr=True)
    settings = load_settings()
    found: list[Judged | NotRun] = []
    try:
        for setting in settings:
            of_setting = list(judge_all(variants_of(setting)))
            found += of_setting
            worst = max((dump.position for dump in of_setting if isinstance(dump, Judged)), default=0.0)
            console.print(f"{setting.id}: {len(of_setting)} dumps, position at most {worst:.2f}", highlight=False)
    finally:  # what is known so far, should the run break off
        alarms = alarm_views.collect(settings, found)
        alarm_views.write(alarms, out)
    print(alarms.verdict)
    raise typer.Exit(alarms.exit_code)


if __name__ == "__main__":  # processes with an environment of their own import this file again
    typer.run(main)
