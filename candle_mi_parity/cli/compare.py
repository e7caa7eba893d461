"""``diff`` and ``history``: two candidates, and all stored releases, set side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from candle_mi_parity.cli.options import OUT, CasesOption, DeviceOption, OnlyOption, OutOption, globs


def diff_command(
    a: Annotated[str, typer.Argument(help="The candidate before, spelt as for `run`.")],
    b: Annotated[str, typer.Argument(help="The candidate after.")],
    patterns: Annotated[list[str] | None, typer.Argument(help="Globs over case ids.")] = None,
    cases: CasesOption = None,
    only: OnlyOption = None,
    out: OutOption = OUT,
    device: DeviceOption = "cpu",
    device_b: Annotated[str | None, typer.Option(help="Of B, where it is not A's: a GPU against the CPU.")] = None,
) -> None:
    """Compare two candidates with each other and with PyTorch. Exit code 0, or 1 when B is worse anywhere."""
    from candle_mi_parity.files.json_out import write_text
    from candle_mi_parity.report import diff_views, tables
    from candle_mi_parity.report.terminal import Terminal, one_line_errors, progress_bar
    from candle_mi_parity.report.views import remove
    from candle_mi_parity.run.diff import diff
    from candle_mi_parity.run.options import RunOptions
    from candle_mi_parity.spec.cases import load_cases, select
    from candle_mi_parity.spec.explanations import load_explanations
    from candle_mi_parity.spec.paths import cache_root

    with one_line_errors():
        wanted = globs(patterns, cases)
        parts = RunOptions(b, wanted, only=tuple(only or ())).parts
        chosen = select(load_cases(), list(wanted)) if "traces" in parts else []
        remove(out, "diff.html")
        remove(out, "diff.md")
        with progress_bar() as bar:
            found = diff(
                *((a, b), chosen, cache_root(), out / "diff", load_explanations(), Terminal(bar, len(chosen))),
                devices=(device, device_b or device),
                parts=parts,
            )
        write_text(diff_views.page(found), out / "diff.html")
        write_text(diff_views.markdown(found), out / "diff.md")
        diff_views.terminal(found, tables.stdout())
        print(f"wrote {out / 'diff.html'}")
    raise typer.Exit(found.verdict.exit_code)


def history_command(out: OutOption = OUT) -> None:
    """When each divergence came and went, over every stored release; writes history.html."""
    from candle_mi_parity.cli.run import run_with_progress
    from candle_mi_parity.files.json_out import write_text
    from candle_mi_parity.report import history, tables
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.report.views import remove
    from candle_mi_parity.run.options import RunOptions
    from candle_mi_parity.spec.explanations import load_explanations

    with one_line_errors():
        remove(out, "history.html")
        releases = load_explanations().releases
        found = history.make_history(
            {release: run_with_progress(RunOptions(f"stored:{release}", out=out / release)) for release in releases}
        )
        write_text(history.page(found), out / "history.html")
        history.terminal(found, tables.stdout())
        print(f"wrote {out / 'history.html'}")
