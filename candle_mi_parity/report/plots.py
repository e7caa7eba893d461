"""The page's plots: SVG that is as wide as its box, with colours from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.verdict import CaseResult, Diagnosis, TensorResult
from candle_mi_parity.files.escape import number, one_line, rendered

LOWEST, HIGHEST = 1e-2, 1e9
"""Range of the ratios drawn; exact tensors lie at the bottom, non-finite ratios at the top."""
HEIGHT = 150
"""Height of a ratio plot in CSS pixels; horizontal positions are in percent."""
LABELS = 8
"""Largest number of labels along an axis."""
HEAT = (-0.5, 0.5, math.log10(ELEMENT_GATE), 2.5, 4.0, 6.0)
"""Limits of the colours, log₁₀ of error over σ; from the gate on they are red."""


@dataclass(frozen=True)
class Point:
    """One tensor of a line; ``title`` is shown on hover."""

    name: str
    ratio: float
    status: str
    title: str


@dataclass(frozen=True)
class PlotLine:
    """One line of a ratio plot: tensors in execution order; ``status`` and ``style`` are its classes."""

    status: str
    points: Sequence[Point]
    style: str = ""


def case_plot(case: CaseResult) -> Markup:
    """Ratios of a case, and if present its ratios with teacher forcing and under its explanation."""
    lines = [line_of(case, case.tensors)]
    if case.teacher_forced:
        lines.append(line_of(case, case.teacher_forced, "forced", "fed the truth: "))
    if case.explained and case.explained.ratios:
        under = [
            Point(name, ratio, "PASS", f"explained: {one_line(name)} {number(ratio)}")
            for name, ratio in case.explained.ratios.items()
        ]
        lines.append(PlotLine("PASS", under, "explained"))
    return ratio_plot(lines)


def line_of(case: CaseResult, tensors: Sequence[TensorResult], style: str = "", before: str = "") -> PlotLine:
    """The line of a case; diverging tensors of a known case are KNOWN."""
    known = case.status.value == "KNOWN"
    points = []
    for tensor in tensors:
        status = "KNOWN" if known and tensor.status.value == "FAIL" else tensor.status.value
        inputs = {None: "", True: ", inputs agreed", False: ", inputs differ"}[tensor.inputs_agreed]
        title = f"{before}{one_line(tensor.name)} {number(tensor.ratio)}, {status}{inputs}"
        if tensor.compared:
            points.append(Point(tensor.name, tensor.ratio, status, title))
    return PlotLine(case.status.value, points, style)


def ratio_plot(lines: Sequence[PlotLine]) -> Markup:
    """Ratios in execution order on a log scale, with the gate; a tooltip on each point names its tensor."""
    order: dict[str, int] = {}
    for line in sorted(lines, key=lambda line: -len(line.points)):
        for point in line.points:
            order.setdefault(point.name, len(order))
    top = max([10 * POSITION_GATE, *(_shown(point.ratio) for line in lines for point in line.points)])
    decades = math.ceil(math.log10(top / LOWEST))

    def x(place: int) -> float:
        return round(100 * (place + 0.5) / len(order), 2)

    def y(ratio: float) -> float:
        return round(HEIGHT * (1 - math.log10(_shown(ratio) / LOWEST) / decades), 1)

    ticks = range(0, decades + 1, math.ceil(decades / 5))
    blocks = _blocks(list(order))
    stride = math.ceil(len(blocks) / LABELS)
    drawn = [
        (line, [(x(order[point.name]), y(point.ratio), point) for point in line.points])
        for line in lines
        if line.points
    ]
    return Markup(
        rendered(
            "ratios.svg.j2",
            height=HEIGHT,
            gate=y(POSITION_GATE),
            gate_text=f"gate {POSITION_GATE:g}",
            ticks=[(y(LOWEST * 10.0**tick), f"1e{tick - 2}") for tick in ticks],
            blocks=[(x(place), block) for block, place in blocks[:: stride or 1]],
            lines=drawn,
        )
    )


def _shown(ratio: float) -> float:
    return min(max(ratio, LOWEST), HIGHEST) if math.isfinite(ratio) else HIGHEST


def _blocks(order: list[str]) -> list[tuple[str, int]]:
    """Each block of the model, with the place of its first tensor."""
    starts: dict[str, int] = {}
    for place, name in enumerate(order):
        if name.startswith("blocks.") and (block := name.split(".")[1]).isdecimal():
            starts.setdefault(block, place)
    return list(starts.items())


def heatmap(diagnosis: Diagnosis) -> Markup:
    """The largest error over σ by position × head (or block of features): blue inside the gate, red past it."""
    rows, columns = len(diagnosis.picture), len(diagnosis.picture[0])
    steps: dict[int, str] = {}
    for y, row in enumerate(diagnosis.picture):
        for x, value in enumerate(row):
            step = sum(value >= edge for edge in HEAT)
            steps[step] = steps.get(step, "") + f"M{x} {y}h1v1h-1z"
    stride = math.ceil(rows / LABELS)
    return Markup(
        rendered(
            "heat.svg.j2",
            rows=rows,
            columns=columns,
            height=min(max(60, 14 * rows), 320),
            positions=[(100 * (row + 0.5) / rows, diagnosis.rows[row]) for row in range(0, rows, stride)],
            steps=sorted(steps.items()),
            diagnosis=diagnosis,
        )
    )


def histogram(counts: Mapping[int, int], gate: float, label: str) -> Markup:
    """Numbers of inputs by the tenths of a gate that their largest ratio reaches, on a log scale.

    :param counts: tenth of the gate, 0 to 9 → number of inputs.
    """
    decades = max(1, math.ceil(math.log10(max([1, *counts.values()]))))

    def y(count: int) -> float:
        # One input is a tenth of a decade high, so that it is seen.
        return round(HEIGHT * (1 - (math.log10(count) + 0.1) / (decades + 0.1)), 1)

    return Markup(
        rendered(
            "bars.svg.j2",
            height=HEIGHT,
            label=label,
            width=9,
            ticks=[(y(10**decade), f"1e{decade}") for decade in range(0, decades + 1, math.ceil(decades / 5))],
            bars=[
                (
                    10 * tenth + 0.5,
                    y(count),
                    f"{count} inputs from {tenth * gate / 10:g} to {(tenth + 1) * gate / 10:g}",
                )
                for tenth, count in sorted(counts.items())
                if count > 0
            ],
            edges=[(20 * edge, number(edge * gate / 5)) for edge in range(6)],
        )
    )
