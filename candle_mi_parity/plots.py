"""The page's plots, drawn by matplotlib as SVG that takes its colours from the page's style sheet.

Every mark has a ``<title>``, which browsers show on hover, so that the page needs no script.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from candle_mi_parity.diagnose import Diagnosis
from candle_mi_parity.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.printable import one_line
from candle_mi_parity.verdict import CaseResult, TensorResult

LOWEST, HIGHEST = 1e-2, 1e9
"""Ratios are drawn within; an exact tensor lies at the bottom, a non-finite ratio at the top."""
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_INKS = {
    "ink": "#010101",
    "faint": "#020202",
    "gate": "#030303",
    "PASS": "#040404",
    "KNOWN": "#050505",
    "FAIL": "#060606",
    "UNMEASURED": "#070707",
    "ERROR": "#080808",
}
"""Stand-ins that become the page's CSS variables."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
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


def ratio_plot(lines: Sequence[Line], key: str) -> Markup:
    """Ratio by execution order on a log scale, one line each, with the gate drawn; every point says its tensor.

    :param key: unique on the page, for the ids inside the SVG.
    """
    order = _execution_order(lines)
    place = {name: x for x, name in enumerate(order)}
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        figure = Figure(figsize=(7.2, 2.7))
        axes = figure.add_axes((0.095, 0.19, 0.895, 0.75))
        highest = 10 * POSITION_GATE
        titles: dict[str, list[str]] = {}
        for number, line in enumerate(lines):
            drawn = [tensor for tensor in line.tensors if tensor.name in place]
            xs, ys = [place[t.name] for t in drawn], [_height(t.ratio) for t in drawn]
            highest = max([highest, *ys])
            style, colour = (":" if line.dotted else "-"), _INKS[line.status]
            axes.plot(xs, ys, style, color=colour, linewidth=1, alpha=0.7, zorder=2)
            points = axes.scatter(xs, ys, s=9, c=[_ink(line, t) for t in drawn], linewidths=0, zorder=3)
            points.set_gid(f"points-{number}")
            titles[f"points-{number}"] = [_point_title(line, tensor) for tensor in drawn]
        axes.axhline(POSITION_GATE, color=_INKS["gate"], linewidth=1, linestyle="--", gid="gate", zorder=1)
        across = axes.get_yaxis_transform()
        axes.text(1, POSITION_GATE * 1.4, f"gate {POSITION_GATE:g}", transform=across, ha="right", fontsize=8,
                  color=_INKS["gate"])  # fmt: skip
        _scales(axes, highest, order)
        return _svg(figure, titles, "ratio of error to noise by execution order")


def _scales(axes: Axes, highest: float, order: list[str]) -> None:
    axes.set_yscale("log")
    axes.set_ylim(LOWEST / 2, highest * 3)
    axes.yaxis.set_major_locator(LogLocator(10, numticks=6))
    # matplotlib's own labels are formulas, and setting them takes longer than drawing all the rest.
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda ratio, _: f"10{f'{math.log10(ratio):.0f}'.translate(_RAISED)}")
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_ylabel("error / noise")
    starts: dict[str, int] = {}
    for x, name in enumerate(order):
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        if block.isdecimal():
            starts.setdefault(block, x)
    stride = math.ceil(len(starts) / 12) or 1
    shown = list(starts.items())[::stride]
    axes.set_xticks([x for _, x in shown], [f"block {block}" if len(shown) < 8 else block for block, _ in shown])
    axes.set_xlabel("tensors in execution order" + ("" if len(shown) < 8 else ", first of each block"))
    axes.set_xlim(-1, max(len(order), 2))


def heatmap(diagnosis: Diagnosis, key: str) -> Markup:
    """The largest error over σ by position × head (or block of features): blue inside the gate, red past it."""
    rows, columns = len(diagnosis.picture), len(diagnosis.picture[0])
    gate = math.log10(ELEMENT_GATE)
    top = max(gate + 1, *(max(row) for row in diagnosis.picture))
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        figure = Figure(figsize=(4.2, min(max(1.35, 0.75 + 0.16 * rows), 4.2)))
        axes = figure.add_subplot()
        image = axes.imshow(
            diagnosis.picture,
            cmap="RdBu_r",
            norm=TwoSlopeNorm(gate, min(-2.0, gate - 1), top),
            interpolation="none",
            aspect="auto",
        )
        axes.set_xlabel(diagnosis.column)
        axes.set_ylabel("position")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        shown = range(0, rows, math.ceil(rows / 8))
        axes.set_yticks(list(shown), [str(diagnosis.rows[row]) for row in shown])
        axes.set_xlim(-0.5, columns - 0.5)
        bar = figure.colorbar(image, ax=axes, ticks=[-2, gate, top], fraction=0.06, pad=0.03)
        bar.ax.set_yticklabels(["≤ 0.01 σ", f"{ELEMENT_GATE:g} σ (gate)", f"{10**top:.1e} σ"])
        figure.subplots_adjust(left=0.12, right=0.76, top=0.96, bottom=0.5 / figure.get_figheight())
        return _svg(figure, {}, f"error over noise of {diagnosis.tensor} by position")


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


def _ink(line: Line, tensor: TensorResult) -> str:
    """Of a point; what diverges in a known case is as known as the case."""
    known = line.status == "KNOWN" and tensor.status.value == "FAIL"
    return _INKS["KNOWN" if known else tensor.status.value]


def _height(ratio: float) -> float:
    return HIGHEST if not math.isfinite(ratio) else min(max(ratio, LOWEST), HIGHEST)


def _point_title(line: Line, tensor: TensorResult) -> str:
    inputs = {None: "", True: ", inputs agreed", False: ", inputs differ"}[tensor.inputs_agreed]
    return f"{line.label}: {one_line(tensor.name)}, ratio {tensor.ratio:.3g}, {tensor.status.value}{inputs}"


def _svg(figure: Figure, titles: dict[str, list[str]], label: str) -> Markup:
    """Draw; give each mark its title and the colours their variables; drop what only a file of its own needs."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    for group in root.iter(f"{_SVG}g"):
        for mark, title in zip(group.iter(f"{_SVG}use"), titles.get(group.get("id", ""), []), strict=False):
            ElementTree.SubElement(mark, "title").text = title
    _without_namespaces(root)
    root.attrib = {"role": "img", "aria-label": one_line(label), "viewBox": root.attrib["viewBox"]}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, stand_in in _INKS.items():
        text = text.replace(stand_in, f"var(--{name.lower()})")
    return Markup(text)  # written by ElementTree, which escapes


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
        if element.get("id") not in (*wanted, "gate"):
            element.attrib.pop("id", None)
        elif element.get("id") == "gate":  # once per plot, so a class
            element.attrib["class"] = element.attrib.pop("id")
