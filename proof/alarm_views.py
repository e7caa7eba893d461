"""The false alarms as a plot, a table and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.report.proof_record import rules_digest
from proof.alarm_dumps import Judged, NotRun
from proof.variants import Setting

WANTED = 60
"""Distinct dumps below which nothing is claimed."""


@dataclass(frozen=True)
class Alarms:
    """All dumps of a run.

    :ivar settings: ids in the order of the table.
    """

    settings: list[str]
    judged: list[Judged]
    not_run: list[NotRun]
    samples: int

    @property
    def distinct(self) -> int:
        """Dumps with numbers of their own."""
        return len({dump.digest for dump in self.judged})

    @property
    def alarmed(self) -> list[Judged]:
        return [dump for dump in self.judged if dump.alarms]

    @property
    def verdict(self) -> str:
        """One line: what is claimed, or why nothing is."""
        if self.alarmed:
            first = self.alarmed[0]
            return (
                f"FALSE ALARM: {len(self.alarmed)} of {len(self.judged)} dumps, first {first.setting}: {first.case}"
            )
        if self.distinct < WANTED:
            return f"TOO FEW: {self.distinct} distinct dumps, at least {WANTED} are wanted"
        line = f"0 alarms in {len(self.judged)} dumps of {len(self.settings)} settings, {self.distinct} distinct"
        return line + (f"; {self.bound}" if self.samples else "")

    @property
    def bound(self) -> str:
        """What 0 alarms in n samples of a case say: were p of all past the gate, all n pass with (1 − p)ⁿ."""
        confidence, total = 1 - 0.95**self.samples, sum(dump.sample for dump in self.judged)
        return (
            f"0 of {self.samples} samples of the noise model in each case: fewer than 5 % are past the gate with "
            f"confidence 1 − 0.95^{self.samples} = {confidence:.1%}; 0 of {total} over all cases: fewer than "
            f"{1 - 0.05 ** (1 / total):.2%} with 95 %"
        )

    @property
    def exit_code(self) -> int:
        return 0 if not self.alarmed and self.distinct >= WANTED else 1


def collect(settings: Sequence[Setting], found: Sequence[Judged | NotRun]) -> Alarms:
    """The run's result; ``samples`` is the least that any case has, and 0 where none was sampled, or not yet."""
    judged = [dump for dump in found if isinstance(dump, Judged)]
    sampled = [setting.samples for setting in settings if setting.samples and any(dump.sample for dump in judged)]
    return Alarms(
        [setting.id for setting in settings],
        judged,
        [missing for missing in found if isinstance(missing, NotRun)],
        min(sampled, default=0),
    )


def write(alarms: Alarms, out: Path) -> None:
    """``alarms.svg``, ``alarms.md`` and ``alarms.json``."""
    out.mkdir(parents=True, exist_ok=True)
    _plot(alarms, out / "alarms.svg")
    (out / "alarms.md").write_text(markdown(alarms), encoding="utf-8")
    (out / "alarms.json").write_text(json.dumps(_document(alarms), indent=1, allow_nan=False), encoding="utf-8")


def _document(alarms: Alarms) -> dict[str, object]:
    return {
        "measured_by": rules_digest(),
        "verdict": alarms.verdict,
        "distinct": alarms.distinct,
        "gate": {"position": POSITION_GATE, "element": ELEMENT_GATE},
        "dumps": [
            # JSON has no infinity; the alarm says what it was.
            {key: value if value != math.inf and value == value else None for key, value in asdict(dump).items()}
            for dump in alarms.judged
        ],
        "not_run": [asdict(missing) for missing in alarms.not_run],
    }


def markdown(alarms: Alarms) -> str:
    """One row a setting, its worst dump named."""
    lines = [
        "# False alarms",
        "",
        alarms.verdict,
        "",
        "*moved*: dumps that differ from plain torch float32 of the same case by at least a bit. The ratios are the "
        "largest over all tensors of all dumps of the setting.",
        "",
        f"| setting | dumps | moved | tensors | position (gate {POSITION_GATE:g}) | element (gate {ELEMENT_GATE:g}) "
        "| alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in alarms.settings:
        dumps = [dump for dump in alarms.judged if dump.setting == setting]
        if not dumps:
            reasons = {missing.reason for missing in alarms.not_run if missing.setting == setting}
            lines.append(f"| {setting} | not run: {'; '.join(sorted(reasons))} | | | | | |")
            continue
        position = max(dumps, key=lambda dump: dump.position)
        element = max(dumps, key=lambda dump: dump.element)
        lines.append(
            f"| {setting} | {len(dumps)} | {sum(dump.moved > 0 for dump in dumps)} "
            f"| {sum(dump.tensors for dump in dumps)} "
            f"| {position.position:.2f} {position.case} `{position.position_at}` "
            f"| {element.element:.2f} {element.case} `{element.element_at}` "
            f"| {sum(bool(dump.alarms) for dump in dumps)} |"
        )
    unmeasured = sum(dump.unmeasured for dump in alarms.judged)
    lines += ["", f"{unmeasured} tensors were too noisy to judge and count for nothing here."]
    lines += ["", *(f"- {dump.setting}: {dump.case}: {alarm}" for dump in alarms.alarmed for alarm in dump.alarms)]
    return "\n".join(lines).rstrip() + "\n"


def _plot(alarms: Alarms, path: Path) -> None:
    """A row a setting, a dot a dump, a panel for each part of the gate; log axes."""
    rows = {setting: y for y, setting in enumerate(reversed(alarms.settings))}
    with matplotlib.rc_context({"svg.hashsalt": "alarms", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9, max(4.5, 1.6 + 0.19 * len(rows))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, rows, alarms, [dump.position for dump in alarms.judged], POSITION_GATE, "position")
        _panel(right, rows, alarms, [dump.element for dump in alarms.judged], ELEMENT_GATE, "element")
        left.set_yticks(list(rows.values()), list(rows))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Axes, rows: dict[str, int], alarms: Alarms, ratios: list[float], gate: float, part: str) -> None:
    inks = ["tab:red" if dump.alarms else "tab:blue" for dump in alarms.judged]
    axes.scatter(ratios, [rows[dump.setting] for dump in alarms.judged], s=7, c=inks, alpha=0.5, linewidths=0)
    axes.axvline(gate, color="black", linestyle="--", linewidth=1, gid=f"gate-{part}")
    axes.text(gate, len(rows) - 0.2, f" gate {gate:g}", va="bottom", ha="center")
    axes.set_xscale("log")
    axes.set_xlim(0.4, max(4 * gate, *(2 * ratio for ratio in ratios if ratio < 1e9), 1))
    axes.set_xlabel(f"largest {part} ratio of a dump (error / noise)")
    axes.grid(axis="y", alpha=0.2)
