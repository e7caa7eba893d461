"""The page's plots: plain SVG in the colours of the page's style sheet.

Every mark has a ``<title>``, which browsers show on hover, so that the page needs no script.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.verdict import CaseResult, Diagnosis, TensorResult
from candle_mi_parity.files.escape import one_line

LOWEST, HIGHEST = 1e-2, 1e9
"""Ratios are drawn within; an exact tensor lies at the bottom, a non-finite ratio at the top."""
LOWEST_HEAT = -2.0
"""log₁₀ of the ratio that is the darkest blue of a heatmap."""
BLUE, WHITE, RED = np.array([[33, 102, 172], [255, 255, 255], [178, 24, 43]], float)


@dataclass(frozen=True)
class Line:
    """One line of a ratio plot: tensors in execution order, in the colour of a status."""

    label: str
    status: str
    tensors: Sequence[TensorResult]
    dotted: bool = False


@dataclass(frozen=True)
class Axes:
    """Where the data lie in a drawing, in its own units: left, top, width and height, and the size of the whole."""

    left: float
    top: float
    width: float
    height: float
    size: tuple[float, float]

    def drawing(self, label: str, parts: Iterable[Markup]) -> Markup:
        """The SVG with its left and lower edge and what is drawn in it."""
        bottom = self.top + self.height
        edges = f"M{self.left} {self.top}V{bottom}H{self.left + self.width}"
        return Markup(
            '<svg role="img" aria-label="{}" viewBox="0 0 {} {}" style="fill:var(--ink);font-size:9.5px">'
            '<path d="{}" style="fill:none;stroke:var(--faint)"/>{}</svg>'
        ).format(label, *self.size, edges, Markup().join(parts))

    def across(self, x: float, label: str) -> Markup:
        """A tick of the lower edge."""
        bottom = self.top + self.height
        tick = Markup('<path d="M{} {}v4" style="stroke:var(--faint)"/>').format(x, bottom)
        return tick + text(x, bottom + 13, label, "middle")

    def up(self, y: float, label: str) -> Markup:
        """A tick of the left edge."""
        tick = Markup('<path d="M{} {}h-4" style="stroke:var(--faint)"/>').format(self.left, y)
        return tick + text(self.left - 6, y + 3, label, "end")

    def names(self, across: str, up: str) -> Markup:
        """What the two edges show."""
        x, y = self.left + self.width / 2, self.top + self.height / 2
        turned = Markup('<text transform="translate(9 {}) rotate(-90)" text-anchor="middle">{}</text>').format(y, up)
        return text(x, self.size[1] - 4, across, "middle") + turned


def text(x: float, y: float, words: str, anchor: str, colour: str = "ink") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" style="fill:var(--{})">{}</text>').format(
        round(x, 2), round(y, 2), anchor, colour, words
    )


RATIOS = Axes(49, 12, 464, 146, (518, 194))


def ratio_plot(lines: Sequence[Line]) -> Markup:
    """Ratio by execution order on a log scale, one line each, with the gate drawn; every point says its tensor."""
    order = _execution_order(lines)
    place = {name: x for x, name in enumerate(order)}
    heights = [_height(tensor.ratio) for line in lines for tensor in line.tensors if tensor.name in place]
    top = math.ceil(math.log10(max([10 * POSITION_GATE, *heights]))) + 0.5
    bottom = math.log10(LOWEST) - 0.3

    def at(x: float, ratio: float) -> tuple[float, float]:
        share = (math.log10(_height(ratio)) - bottom) / (top - bottom)
        across = RATIOS.left + RATIOS.width * (x + 1) / (max(len(order), 2) + 1)
        return round(across, 2), round(RATIOS.top + RATIOS.height * (1 - share), 2)

    gate = at(0, POSITION_GATE)[1]
    parts = [
        Markup('<path class="gate" d="M{} {}h{}" style="stroke:var(--gate);stroke-dasharray:4,2"/>').format(
            RATIOS.left, gate, RATIOS.width
        ),
        text(RATIOS.left + 5, gate - 4, f"gate {POSITION_GATE:g}", "start", "gate"),
        *_decades(int(top), lambda exponent: at(0, 10.0**exponent)[1]),
        *_blocks(order, lambda x: at(x, 1)[0]),
    ]
    for line in lines:
        shown = [(at(place[tensor.name], tensor.ratio), tensor) for tensor in line.tensors if tensor.name in place]
        points = " ".join(f"{x},{y}" for (x, y), _ in shown)
        parts.append(
            Markup('<polyline points="{}" style="fill:none;stroke:var(--{});stroke-opacity:0.7{}"/>').format(
                points, line.status.lower(), ";stroke-dasharray:1,1.65" if line.dotted else ""
            )
        )
        parts += [
            Markup('<circle cx="{}" cy="{}" r="1.5" style="fill:var(--{})"><title>{}</title></circle>').format(
                x, y, _status(line, tensor).lower(), _point_title(line, tensor)
            )
            for (x, y), tensor in shown
        ]
    return RATIOS.drawing("ratio of error to noise by execution order", parts)


def _decades(highest: int, at: Callable[[int], float]) -> Iterable[Markup]:
    """Ticks of powers of ten, at most seven."""
    lowest = round(math.log10(LOWEST))
    for exponent in range(lowest, highest + 1, math.ceil((highest - lowest) / 6)):
        yield RATIOS.up(at(exponent), f"{10.0**exponent:g}" if -3 < exponent < 3 else f"1e{exponent}")


def _blocks(order: list[str], at: Callable[[int], float]) -> Iterable[Markup]:
    """Ticks of the first tensor of each block of the model, at most twelve, and the names of the edges."""
    starts: dict[str, int] = {}
    for x, name in enumerate(order):
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        if block.isdecimal():
            starts.setdefault(block, x)
    shown = [*starts.items()][:: math.ceil(len(starts) / 12) or 1]
    few = len(shown) < 8
    yield from (RATIOS.across(at(x), f"block {block}" if few else block) for block, x in shown)
    yield RATIOS.names("tensors in execution order" + ("" if few else ", first of each block"), "error / noise")


def heatmap(diagnosis: Diagnosis) -> Markup:
    """The largest error over σ by position × head (or block of features): blue inside the gate, red past it."""
    rows, columns = len(diagnosis.picture), len(diagnosis.picture[0])
    gate = math.log10(ELEMENT_GATE)
    top = max(gate + 1, *(max(row) for row in diagnosis.picture))
    ramp = np.interp(diagnosis.picture, [LOWEST_HEAT, gate, top], [0, 1, 2])[..., None]
    pixels = np.where(ramp < 1, BLUE + (WHITE - BLUE) * ramp, WHITE + (RED - WHITE) * (ramp - 1))
    axes = Axes(34, 16, 226, min(max(52, 12 * rows), 252), (270, min(max(52, 12 * rows), 252) + 52))
    step, wide = axes.height / rows, axes.width / columns
    parts = [
        Markup(
            '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="data:image/png;base64,{}"/>'
        ).format(axes.left, axes.top, axes.width, axes.height, base64.b64encode(png(pixels)).decode()),
        text(axes.left + axes.width, 11, f"white {ELEMENT_GATE:g} σ (gate), darkest red {10**top:.1e} σ", "end"),
        *(
            axes.up(axes.top + (row + 0.5) * step, str(diagnosis.rows[row]))
            for row in range(0, rows, math.ceil(rows / 8))
        ),
        *(axes.across(axes.left + (c + 0.5) * wide, str(c)) for c in range(0, columns, math.ceil(columns / 8))),
        axes.names(diagnosis.column, "position"),
    ]
    return axes.drawing(one_line(f"error over noise of {diagnosis.tensor} by position"), parts)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of [rows, columns, 3] values from 0 to 255."""
    rows, columns, _ = pixels.shape
    # Each row begins with its filter, which is none.
    data = np.pad(pixels.round().astype(np.uint8).reshape(rows, -1), ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def case_plot(case: CaseResult) -> Markup:
    """A case's own line, and the teacher-forced one where there is one."""
    lines = [Line("free-running", case.status.value, case.tensors)]
    if case.forced:
        lines.append(Line("each half-layer fed the truth", case.status.value, case.forced, dotted=True))
    return ratio_plot(lines)


def _execution_order(lines: Iterable[Line]) -> list[str]:
    """Of the fullest line; names that only others have follow it."""
    order: dict[str, None] = {}
    for line in sorted(lines, key=lambda line: -len(line.tensors)):
        order |= dict.fromkeys(tensor.name for tensor in line.tensors if tensor.compared)
    return list(order)


def _status(line: Line, tensor: TensorResult) -> str:
    """Of a point; what diverges in a known case is as known as the case."""
    known = line.status == "KNOWN" and tensor.status.value == "FAIL"
    return "KNOWN" if known else tensor.status.value


def _height(ratio: float) -> float:
    return HIGHEST if not math.isfinite(ratio) else min(max(ratio, LOWEST), HIGHEST)


def _point_title(line: Line, tensor: TensorResult) -> str:
    inputs = {None: "", True: ", inputs agreed", False: ", inputs differ"}[tensor.inputs_agreed]
    return f"{line.label}: {one_line(tensor.name)}, ratio {tensor.ratio:.3g}, {tensor.status.value}{inputs}"
