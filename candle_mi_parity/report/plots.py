"""The page's plots, drawn by matplotlib as SVG that takes its colours from the page's style sheet.

Every mark has a ``<title>``, which browsers show on hover, so that the page needs no script.
"""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import matplotlib
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Transform

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.verdict import CaseResult, Diagnosis, TensorResult
from candle_mi_parity.files.escape import one_line

LOWEST, HIGHEST = 1e-2, 1e9
"""Ratios are drawn within; an exact tensor lies at the bottom, a non-finite ratio at the top."""
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_INKS = {"ink": "#010101", "faint": "#020202", "gate": "#030303"}
"""Stand-ins that become the page's CSS variables."""
_KEY, _LABEL, _TOP = "key-of-the-plot-", "label of the plot", "top of the plot"
"""Stand-ins in a frame."""
_REFERRING = ("href", "clip-path")
_GATE, _LOWEST_HEAT = math.log10(ELEMENT_GATE), -2.0
POINTS = 72
"""Per inch, as SVG counts."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INKS["ink"],
    "axes.edgecolor": _INKS["faint"],
    "axes.labelcolor": _INKS["ink"],
    "xtick.color": _INKS["ink"],
    "ytick.color": _INKS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Line:
    """One line of a ratio plot: tensors in execution order, in the colour of a status."""

    label: str
    status: str
    tensors: Sequence[TensorResult]
    dotted: bool = False


@dataclass(frozen=True)
class Frame:
    """The axes of a plot without its data; plots of one shape share it, since drawing it takes most of the time.

    :ivar svg: with :data:`_KEY` in its ids, for :func:`_filled`.
    :ivar to_page: data coordinates → points from the left and from the bottom.
    :ivar box: of the axes, in points: left, top, width, height.
    """

    svg: str
    to_page: Transform
    box: tuple[float, float, float, float]
    height: float


def ratio_plot(lines: Sequence[Line], key: str) -> Markup:
    """Ratio by execution order on a log scale, one line each, with the gate drawn; every point says its tensor.

    :param key: unique on the page, for the ids inside the SVG.
    """
    order = _execution_order(lines)
    place = {name: x for x, name in enumerate(order)}
    heights = [_height(tensor.ratio) for line in lines for tensor in line.tensors if tensor.name in place]
    decade = math.ceil(math.log10(max([10 * POSITION_GATE, *heights])))
    frame = _ratio_frame(_blocks(order), len(order), decade)
    drawn = [_line(line, [t for t in line.tensors if t.name in place], place, frame) for line in lines]
    return _filled(frame, Markup().join(drawn), key)


_POLYLINE = Markup('<polyline points="{}" style="fill:none;stroke:var(--{});stroke-opacity:0.7{}"/>')
_POINT = Markup('<circle cx="{}" cy="{}" r="1.5" style="fill:var(--{})"><title>{}</title></circle>')


def _line(line: Line, tensors: list[TensorResult], place: dict[str, int], frame: Frame) -> Markup:
    if not tensors:
        return Markup()
    data = [(place[tensor.name], _height(tensor.ratio)) for tensor in tensors]
    points = [(round(x, 2), round(frame.height - y, 2)) for x, y in frame.to_page.transform(data).tolist()]
    dotted = ";stroke-dasharray:1,1.65" if line.dotted else ""
    polyline = _POLYLINE.format(" ".join(f"{x},{y}" for x, y in points), line.status.lower(), dotted)
    circles = [
        _POINT.format(x, y, _status(line, tensor).lower(), _point_title(line, tensor))
        for (x, y), tensor in zip(points, tensors, strict=True)
    ]
    return polyline + Markup().join(circles)


@cache
def _ratio_frame(starts: tuple[tuple[str, int], ...], count: int, decade: int) -> Frame:
    """:param starts: the blocks of the model, and where each begins.
    :param count: how many tensors.
    :param decade: the highest power of ten that is drawn.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.7), dpi=POINTS)
        axes = figure.add_axes((0.095, 0.19, 0.895, 0.75))
        axes.axhline(POSITION_GATE, color=_INKS["gate"], linewidth=1, linestyle="--", gid="gate", zorder=1)
        across = axes.get_yaxis_transform()
        axes.text(0.01, POSITION_GATE * 1.4, f"gate {POSITION_GATE:g}", transform=across,
                  color=_INKS["gate"])  # fmt: skip
        _scales(axes, decade, starts, count)
        return _frame(figure, axes, "ratio of error to noise by execution order")


def _scales(axes: Axes, decade: int, starts: tuple[tuple[str, int], ...], count: int) -> None:
    axes.set_yscale("log")
    axes.set_ylim(LOWEST / 2, 3 * 10.0**decade)
    axes.yaxis.set_major_locator(LogLocator(10, numticks=6))
    axes.yaxis.set_major_formatter(_power)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_ylabel("error / noise")
    stride = math.ceil(len(starts) / 12) or 1
    shown = starts[::stride]
    axes.set_xticks([x for _, x in shown], [f"block {block}" if len(shown) < 8 else block for block, _ in shown])
    axes.set_xlabel("tensors in execution order" + ("" if len(shown) < 8 else ", first of each block"))
    axes.set_xlim(-1, max(count, 2))


def _blocks(order: list[str]) -> tuple[tuple[str, int], ...]:
    """Each block and its first place."""
    starts: dict[str, int] = {}
    for x, name in enumerate(order):
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        if block.isdecimal():
            starts.setdefault(block, x)
    return tuple(starts.items())


def _power(value: float, _: float) -> str:
    """On one line: matplotlib's own exponent is too small for a phone."""
    return f"{value:g}" if 0.001 < value < 1000 else f"1e{math.log10(value):.0f}"


def heatmap(diagnosis: Diagnosis, key: str) -> Markup:
    """The largest error over σ by position × head (or block of features): blue inside the gate, red past it."""
    top = max(_GATE + 1, *(max(row) for row in diagnosis.picture))
    size = len(diagnosis.picture), len(diagnosis.picture[0])
    frame = _heat_frame(tuple(diagnosis.rows), diagnosis.column, size)
    norm = TwoSlopeNorm(_GATE, _LOWEST_HEAT, top)
    pixels = io.BytesIO()
    imsave(pixels, colormaps["RdBu_r"](norm(diagnosis.picture)), format="png")
    x, y, width, height = frame.box
    picture = Markup(
        '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="data:image/png;base64,{}"/>'
    ).format(x, y, width, height, base64.b64encode(pixels.getvalue()).decode())
    label = one_line(f"error over noise of {diagnosis.tensor} by position")
    drawn = _filled(frame, picture, key)
    # Last what comes from a trace: it is not searched for what is to be replaced.
    return drawn.replace(_TOP, f"{10**top:.1e} σ").replace(_LABEL, escape(label))


@cache
def _heat_frame(positions: tuple[int, ...], column: str, size: tuple[int, int]) -> Frame:
    """:param positions: of the rows.
    :param size: rows and columns of the picture.
    """
    rows, columns = size
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.75, min(max(1.35, 0.75 + 0.16 * rows), 4.2)), dpi=POINTS)
        axes = figure.add_subplot()
        axes.set_xlabel(column)
        axes.set_ylabel("position")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        shown = range(0, rows, math.ceil(rows / 8))
        axes.set_yticks(list(shown), [str(positions[row]) for row in shown])
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        colours = ScalarMappable(TwoSlopeNorm(_GATE, _LOWEST_HEAT, _GATE + 1), "RdBu_r")
        bar = figure.colorbar(colours, ax=axes, ticks=[_LOWEST_HEAT, _GATE, _GATE + 1], fraction=0.06, pad=0.03)
        bar.ax.set_yticklabels(["≤ 0.01 σ", f"{ELEMENT_GATE:g} σ (gate)", _TOP])
        figure.subplots_adjust(left=0.12, right=0.76, top=0.96, bottom=0.5 / figure.get_figheight())
        return _frame(figure, axes, _LABEL)


def case_plot(case: CaseResult, key: str) -> Markup:
    """A case's own line, and the teacher-forced one where there is one."""
    lines = [Line("free-running", case.status.value, case.tensors)]
    if case.forced:
        lines.append(Line("each half-layer fed the truth", case.status.value, case.forced, dotted=True))
    return ratio_plot(lines, key)


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


def _frame(figure: Figure, axes: Axes, label: str) -> Frame:
    """Draw; give the colours their variables; drop what only a file of its own needs."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", dpi=POINTS)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    _without_namespaces(root)
    root.attrib = {"role": "img", "aria-label": one_line(label), "viewBox": root.attrib["viewBox"]}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, stand_in in _INKS.items():
        text = text.replace(stand_in, f"var(--{name})")
    height = POINTS * figure.get_figheight()
    box = axes.get_window_extent()
    around = (round(box.x0, 2), round(height - box.y1, 2), round(box.width, 2), round(box.height, 2))
    return Frame(text, cast(Transform, axes.transData.frozen()), around, height)


def _filled(frame: Frame, marks: Markup, key: str) -> Markup:
    """A frame with its data in it; ElementTree has escaped the one, and markupsafe the other."""
    return Markup(frame.svg.replace(_KEY, f"{key}-").removesuffix("</svg>")) + marks + Markup("</svg>")


def _without_namespaces(root: ElementTree.Element) -> None:
    """As HTML wants its SVG, and with no id that nothing refers to: the page holds many of these."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key in [key for key in element.attrib if key.startswith(_XLINK)]:
            element.attrib[key.removeprefix(_XLINK)] = element.attrib.pop(key)
    values = [value for element in root.iter() for value in element.attrib.values()]
    wanted = {name for value in values for name in re.findall(r"#([\w-]+)", value)}
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip(), None
        if (own := element.attrib.pop("id", None)) == "gate":  # once per plot, so a class
            element.attrib["class"] = own
        elif own in wanted:
            element.attrib["id"] = f"{_KEY}{own}"
        for name, value in element.attrib.items():
            element.attrib[name] = re.sub(r"#(?=[\w-])", f"#{_KEY}", value) if name in _REFERRING else value
