"""The page says of every case what the result holds, needs nothing from outside, and believes no name."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from candle_mi_parity.compare.diagnose_sae import look_sae
from candle_mi_parity.compare.gate import ELEMENT_GATE
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import Diagnosis, Status
from candle_mi_parity.report import page, report
from candle_mi_parity.report.plots import LOWEST, Line, heatmap, ratio_plot
from candle_mi_parity.report.report_model import Report, json_schema
from candle_mi_parity.spec.paths import ROOT
from candle_mi_parity.trace.trace import Trace
from tests.support.planting import real, write
from tests.support.results import case, everything, run_of, sae_view, tensor


def text_of(html: str) -> str:
    """What a reader sees, without style and markup, in single spaces."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<style>.*?</style>", "", html))).split())


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (run_of(case("a/b")), Verdict.PASS),
        (run_of(case("a/b", Status.KNOWN)), Verdict.PASS),
        (run_of(case("a/b", Status.FAIL)), Verdict.FAIL),
        (run_of(case("a/b", Status.ERROR)), Verdict.ERROR),
        (run_of(case("a/b", Status.UNMEASURED)), Verdict.INCONCLUSIVE),
        (run_of(), Verdict.INCONCLUSIVE),
    ],
)
def test_the_verdict_is_the_one_word_of_the_heading(result: RunResult, verdict: Verdict) -> None:
    html = page.render(result)
    assert re.findall(r"<h1>(.*?)</h1>", html) == [verdict.value]
    assert f"<title>{verdict.value}: candle-mi 0.2.2</title>" in html


def test_the_four_counts_are_the_results() -> None:
    result = everything()
    html = page.render(result)
    tiles = re.findall(r"<b>(\d+)</b><span>(\w+)</span>", html)
    assert tiles == [("4", "compared"), ("1", "diverging"), ("1", "known"), ("3", "unmeasured")]


def test_every_case_has_a_square_with_its_reason() -> None:
    result = everything()
    rows = page.matrix(result, [name.split("/")[0] for name in [*(c.id for c in result.cases), *result.skipped]])
    cells = {row.name: next(cell for cell in row.cells if cell) for row in rows}
    assert {name: cell.status for name, cell in cells.items()} == {
        **{status.value.lower(): status.value for status in Status},
        "scope-l0": "NOT RUN",
    }
    assert "the largest ratio is 1 of 8" in cells["pass"].why
    assert cells["known"].why == "rope_theta is not read"
    assert cells["fail"].why == "first at blocks.0.attn.hook_scores (values), ratio 4.32e+03, one head (3)"
    assert "SIGKILL" in cells["error"].why and "too noisy" in cells["unmeasured"].why
    assert "needs a download" in cells["scope-l0"].why
    html = unescape(page.render(result))
    assert all(f'title="{cell.why}"' in html for cell in cells.values())
    anchors = re.findall(r'href="#([^"]+)"', html)
    assert all(f'id="{anchor}"' in html for anchor in anchors if anchor.startswith("case-"))


def test_a_failing_case_shows_its_whole_census_and_the_command() -> None:
    said = text_of(page.render(run_of(case("a/b", Status.FAIL))))
    for part in (
        "first divergence blocks.0.attn.hook_scores",
        "past the gate 11 of 96 elements, 7 masked left out",
        "worst index [0, 3, 17]",
        "got 1.25",
        "expected 1.75",
        "absolute 0.5",
        "relative 0.286",
        "ULP 4.19e+06",
        "noise σ 1.5e-07",
        "ratio 1.73e+04 (gate 32)",
        "position ratio 4.32e+03 (gate 8)",
        "inputs agreed? yes",
        "Shape of the error: one head (3)",
        "With every half-layer fed the truth, 1 of 1 diverge: blocks.0.attn.hook_scores",
        "candle-mi-parity run --cases a/b",
    ):
        assert part in said, part


def test_the_plots_draw_the_gate_and_name_each_tensor() -> None:
    html = page.render(run_of(case("a/b", Status.FAIL), case("a/c")))
    plots = re.findall(r"(?s)<svg.*?</svg>", html)
    ratios = [plot for plot in plots if "execution order" in plot]
    assert len(ratios) == 2 and len(plots) == 3  # the case's, the family's, and the picture by position
    for plot in ratios:
        assert 'class="gate"' in plot and "gate 8" in plot
    titles = re.findall(r"<title>([^<]*)</title>", ratios[1])
    assert "a/b: blocks.0.attn.hook_scores, ratio 4.32e+03, FAIL, inputs agreed" in titles
    assert sum(title.startswith("a/c: ") for title in titles) == 2


def test_a_point_lies_where_its_ratio_is_and_none_is_lost() -> None:
    """Exact ones at the bottom, non-finite ones at the top: a logarithm has no place for either."""
    lines = [Line("x", "FAIL", [tensor("a", 0.0), tensor("b", 8.0), tensor("c", math.inf), tensor("d", math.nan)])]
    plot = ratio_plot(lines)
    gate = float(re.findall(r'class="gate" d="M[\d.]+ ([\d.]+)h', plot)[0])
    heights = [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"[^>]*><title>', plot)]
    assert len(heights) == 4
    exact, at_gate, infinite, nan = heights
    assert at_gate == gate and infinite == nan < gate < exact
    assert LOWEST > 0


def test_the_picture_is_red_where_the_error_is_past_the_gate_and_fills_its_axes() -> None:
    picture = [[-1.0, 4.0, 0.0], [5.0, 0.0, 1.0]]
    plot = heatmap(Diagnosis("x", "one head (3)", picture, [0, 5], "head"))
    ((left, top, width, height, data),) = re.findall(
        r'<image x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"[^>]*base64,([^"]+)"', plot
    )
    red, _, blue = np.moveaxis(pixels_of(base64.b64decode(data)).astype(int), -1, 0)
    assert np.array_equal(red > blue, np.array(picture) > math.log10(ELEMENT_GATE))
    assert red.shape == (2, 3) and "1.0e+05 σ" in plot and "error over noise of x by position" in plot
    bottom, right = float(top) + float(height), float(left) + float(width)
    assert f'd="M{left} {top}V{bottom:g}H{right:g}"' in plot, "the frame is where the picture is"


def pixels_of(png: bytes) -> np.ndarray:
    """[rows, columns, 3] of a PNG without filters and without a palette."""
    columns, rows = struct.unpack(">II", png[16:24])
    size = int.from_bytes(png[33:37])
    data = np.frombuffer(zlib.decompress(png[41 : 41 + size]), np.uint8).reshape(rows, 1 + 3 * columns)
    return data[:, 1:].reshape(rows, columns, 3)


def test_it_is_made_for_dark_rooms_phones_and_paper() -> None:
    html = page.render(everything())
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media (max-width: 760px)" in html and "@media print" in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]", html), "a plot's stand-in colour is left"


class _Balanced(HTMLParser):
    """Counts what is open; HTML's void elements never are."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_element_is_closed_and_no_id_is_given_twice() -> None:
    parser = _Balanced()
    parser.feed(page.render(everything()))
    assert parser.open == []
    assert sorted(parser.ids) == sorted(set(parser.ids))


def test_the_sae_panel_has_flips_with_margins_mse_and_ranks_side_by_side() -> None:
    passing = case("a/b")
    passing.sae = [sae_view()]
    html = page.render(run_of(passing))
    said = text_of(html)
    assert "a/b its own residual 12 / 13 1 3.25 σ 0.125 0.1250001 1e-07" in said
    assert "[0, 2, 40] 0 1.5 2.5e-06 3.25 by rounding" in said
    assert "1 #7 3.5 #7 3.5000002" in said and "2 #9 1.25 #11 1.5" in said
    assert html.count('class="differs"') == 1


def test_a_flip_that_is_planted_is_listed_with_its_margin(tmp_path: Path) -> None:
    there = real("gemma2/hub")
    assert there.truth.sae, "the case has an SAE"
    honest = look_sae(there.truth, Trace(write(tmp_path / "honest", there)))
    features = there.arrays["sae.features"]
    index = tuple(int(i) for i in np.unravel_index(features.argmax(), features.shape))
    features[index] = 0.0
    arrays = there.arrays | {"sae.features": features}
    own = look_sae(there.truth, Trace(write(tmp_path / "planted", there, arrays)))[0]
    assert own.flipped == honest[0].flipped + 1
    assert own.flips[0].index == list(index) and not own.flips[0].excused
    assert own.flips[0].over_noise > 32 and own.flips[0].got == 0.0
    assert own.active_got == honest[0].active_got - 1
    best = honest[0].top[0]
    assert best.expected and best.got and best.expected[0] == best.got[0]


def test_the_report_is_what_its_schema_says_and_the_schema_is_in_the_repository() -> None:
    stored = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert stored == json_schema(), "python -m candle_mi_parity.report.report_model > docs/report.schema.json"
    result = everything()
    result.cases[2].tensors[-1] = tensor("x", math.inf, Status.FAIL, "nonfinite")
    document = json.loads(json.dumps(report.document(result)))
    jsonschema.validate(document, stored)
    Report.model_validate(document)
    for spoil in (
        {"format": "candle-mi-parity/report/1"},
        {"verdict": "MAYBE"},
        {"surplus": 1},
        {"cases": [{**document["cases"][0], "tensors": [{"name": "x"}]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | spoil, stored)
