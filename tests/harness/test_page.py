"""Page, terminal and JSON show every case of a result, and answer both questions."""

import json
import math
import re
import tomllib
from functools import partial
from html import unescape
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from candle_mi_parity.compare.diagnose_sae import summarize_saes
from candle_mi_parity.compare.gate import ELEMENT_GATE
from candle_mi_parity.compare.hunt_result import HuntResult
from candle_mi_parity.compare.run_result import FORWARDS, RunResult, Section
from candle_mi_parity.compare.suspects import SUSPECTS, suspect
from candle_mi_parity.compare.verdict import Diagnosis, Explained, Status
from candle_mi_parity.files.escape import printable
from candle_mi_parity.files.json_out import write_text
from candle_mi_parity.files.toml_out import toml_rows
from candle_mi_parity.report import hunt_page, hunt_tables, page, tables
from candle_mi_parity.report.plots import PlotLine, Point, heatmap, histogram, ratio_plot
from candle_mi_parity.report.report_model import REPORT, document, json_schema
from candle_mi_parity.spec.cases import Table, load_cases
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.spec.paths import ROOT
from candle_mi_parity.trace.trace import Trace
from tests.support.planting import real, write
from tests.support.results import (
    HOSTILE,
    LONG,
    a_hunt,
    case,
    changed,
    everything,
    refused,
    run_of,
    sae_view,
    shown,
    tensor,
)

FAMILY = [case(f"gemma2/{name}", Status.FAIL) for name in ("hub", "v5", "window")]


def text_of(html: str) -> str:
    """The visible text, in single spaces."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<style>.*?</style>", "", html))).split())


def terminal(result: RunResult) -> str:
    return shown(partial(tables.run_tables, result), tables.WIDE)


GONE = changed(run_of(case("a/b")), baseline="0.2.2", gone={"CMI001": ["a/b"], "CMI004": ["a/b"]})
RESULTS = [
    run_of(case("a/b")),
    run_of(case("a/b", Status.KNOWN), refused("a/c"), case("a/d")),
    run_of(*FAMILY),
    run_of(case("a/b", Status.ERROR)),
    run_of(case("a/b", Status.UNMEASURED), case("a/c")),
    run_of(),
    changed(run_of(case("a/b", Status.FAIL)), fault="no space left"),
    GONE,
    changed(run_of(case("a/b", Status.KNOWN)), strict=True),
]
ANSWERS = """PASS | Yes: 1 of 1 cases agree. | Nothing new.
KNOWN | Not everywhere: 1 known cause gives other numbers, 1 is refused; 1 of 3 cases agree. | Nothing new.
FAIL | Not everywhere: 3 new cases differ; 0 of 3 cases agree. | New: 3 cases fail.
ERROR | Not everywhere: 1 new case crashes; 0 of 1 cases agree. | New: 1 case could not be judged.
INCONCLUSIVE | As far as measured: 1 of 2 cases agree, 1 could not be measured. | Nothing new.
INCONCLUSIVE | Unknown: no case was judged. | Unknown: no case was judged.
ERROR | Not everywhere: 1 new case differs; 0 of 1 cases agree. | Unknown: no space left.
PASS | Yes: 1 of 1 cases agree. | New since 0.2.2: 2 known divergences of 0.2.2 are gone (CMI001, CMI004).
FAIL | Not everywhere: 1 known cause gives other numbers; 0 of 1 cases agree. | Nothing new, but --strict lets no \
known divergence pass."""


@pytest.mark.parametrize(("answers", "result"), [*zip(ANSWERS.splitlines(), RESULTS, strict=True)])
def test_both_questions_are_answered_in_every_view(answers: str, result: RunResult) -> None:
    verdict, right, new = answers.split(" | ")
    assert (result.verdict.value, result.is_right(), result.is_new()) == (verdict, right, new)
    html = page.render(result)
    assert re.findall(r"<h1[^>]*>(.*?)</h1>", html) == [right.partition(": ")[0]]
    assert f'<header class="{verdict}">' in html and f"<title>{verdict}: candle-mi 0.2.2</title>" in html
    lines = terminal(result).splitlines()
    assert lines[-3].endswith(f"? {right}") and lines[-2].endswith(f"? {new}")
    assert [line for line in lines if line.startswith("verdict")] == [f"verdict: {result.line()}"] == lines[-1:]
    assert result.line().startswith(f"{verdict}: ") and new in result.line()


def test_the_counts_add_up_to_the_cases() -> None:
    result = everything()
    shown = re.findall(r"<b>(\d+)</b><span>([\w ]+)</span>", page.render(result))
    assert {name: int(count) for count, name in shown} == result.tally()
    assert list(result.tally().values()) == [1, 2, 0, 1, 1, 1] and len(result.cases) + len(result.skipped) == 6


def test_the_terminal_shows_what_is_new_and_one_line_a_cause() -> None:
    text = terminal(run_of(*(case(f"llama/{i}") for i in range(200)), case("a/known", Status.KNOWN), *FAMILY))
    assert len(text.splitlines()) < 40 and "llama/7" not in text and "a/known" not in text
    assert "known: ≠ CMI001" in text and text.count("look at: rotary") == 1 and "the same in 2 more" in text
    assert "blocks.0.attn.hook_scores\n" in text.replace(" ", ""), "a name stays whole if stdout is a file"
    assert "gone: CMI004: Now right: a/b" in terminal(GONE)


def test_every_case_has_a_square_with_its_sign_and_reason() -> None:
    result = everything()
    result.cases.append(refused("refusedfam/refused"))
    models, saes = page.groups(result)
    assert (models.name, saes.name, models.wanted, saes.wanted) == ("models", "sparse autoencoders", True, False)
    assert saes.counts == {"not run": ("–", 1)}
    assert sum(count for _, count in models.counts.values()) == len(result.cases)
    cells = {row.name: next(cell for cell in row.cells if cell) for row in [*models.rows, *saes.rows]}
    signs = "fail ≠ FAIL, error ✗ ERROR, unmeasured ? UNMEASURED, known ≠ KNOWN, refused ⊘ KNOWN, pass ✓ PASS"
    assert ", ".join(f"{name} {cell.sign} {cell.status}" for name, cell in cells.items()) == (
        f"{signs}, scope-l0 – NOT-RUN"
    )
    assert "the largest ratio is 1 of 8" in cells["pass"].why
    assert cells["known"].why.startswith("CMI001: rope_theta is not read; equal to PyTorch with rope_theta = 10000.0")
    assert cells["fail"].why == "first at blocks.0.attn.hook_scores (values), ratio 4.32e+03, one head (3)"
    assert "SIGKILL" in cells["error"].why and "too noisy" in cells["unmeasured"].why
    assert "needs a download" in cells["scope-l0"].why
    html = unescape(page.render(result))
    assert all(f'title="{cell.why}"' in html for cell in cells.values())


def test_new_failures_are_grouped_and_the_smallest_is_open() -> None:
    html = page.render(run_of(*FAMILY, case("gemma/hub", Status.FAIL), case("a/b", Status.KNOWN)))
    assert html.count('<details class="case">') == 3 and html.count('<details class="case" open>') == 2
    text = text_of(html)
    assert "new-1: gemma2 first differs at attn.hook_scores" in text and "new-2: gemma first" in text
    assert text.index("Causes") < text.index("Features, families and cases") < text.index("With every half-layer")
    assert "CMI001 Gone since 0.2.2: a/b agrees." in text_of(page.render(GONE))


def test_failing_cases_are_named_before_the_other_forwards_that_fail_with_them() -> None:
    others = [case(f"forwards/a/{number}", Status.FAIL, bad=f"logits {number % 9}") for number in range(30)]
    result = run_of(*FAMILY, case("a/b", Status.FAIL))
    result.sections[FORWARDS] = Section("other forward", others, of_tensors=True)
    last = terminal(result).splitlines()[-10:]
    (line,) = (line for line in last if line.startswith("FAIL: "))
    assert line.index("4 first at blocks.0.attn.hook_scores (gemma2/hub, gemma2/v5, ") < line.index("(forwards/a/0")
    assert line.endswith("; and 4 other places")
    (folded,) = (line for line in last if "other forwards agree, and new: " in line)
    assert folded.endswith("forwards/a/2 and 27 more")


EVIDENCE = """first divergence blocks.0.attn.hook_scores | past the gate 11 of 96 elements, 7 masked left out
worst element batch 0, head 1, query 3, key 17
got 1.25 | expected 1.75 | absolute 0.5 | relative 0.286 | ULP 4.19e+06 | noise σ 1.5e-07
ratio 1.73e+04 (gate 32) | position ratio 4.32e+03 (gate 8) | inputs agreed? yes | Shape of the error: one head (3)
Look at: rotary, scale, grouped-query repetition | none of 42 single changes | candle-mi-parity run --cases a/b
With every half-layer fed the truth, 1 of 1 diverge: blocks.0.attn.hook_scores . | candle-mi-parity repro a/b"""


def test_a_failing_case_shows_its_evidence_the_suspect_and_the_commands() -> None:
    bad, found = case("a/b", Status.FAIL), case("a/c", Status.FAIL)
    bad.shrink, bad.unexplained = "candle-mi-parity repro a/b", "none of 42 single changes explains it"
    found.explained = Explained([], "rms_norm_eps = 1e-05", "rms_norm_eps = 1e-05", {"hook_embed": 1.0})
    text = text_of(page.render(run_of(bad, found)))
    assert not [part for part in re.split(r" \| |\n", EVIDENCE) if part not in text]
    equal = "equal to PyTorch with rms_norm_eps = 1e-05, all 1 tensors, worst 1 of 8"
    assert equal in text and equal in terminal(run_of(found))


def test_the_plots_draw_the_gate_the_explanation_and_each_tensor() -> None:
    html = page.render(run_of(case("a/b", Status.FAIL), case("a/c", Status.KNOWN)))
    plots = re.findall(r'(?s)<svg class="ratios".*?</svg>\n.*?</svg>', html)
    assert len(plots) == 3 and html.count('<svg class="heat"') == 2
    assert all('class="gate"' in plot and "gate 8" in plot for plot in plots)
    new, known, family = (re.findall(r"<title>([^<]*)</title>", plot) for plot in plots)
    assert {"", "fed the truth: "} <= {
        title.partition("blocks.0.attn.hook_scores 4.32e+03, FAIL")[0] for title in new
    }
    assert "explained: blocks.0.attn.hook_scores 1.2" in known and 'class="PASS explained"' in plots[1]
    assert sum(title.startswith("a/c: ") for title in family) == 3
    assert "Equal to PyTorch with rope_theta = 10000.0, all 2 tensors, worst 1.2 of 8." in text_of(html)


def test_every_point_lies_where_its_ratio_is() -> None:
    """Exact ones at the bottom, non-finite ones at the top."""
    ratios = {"a": 0.0, "b": 8.0, "c": math.inf, "d": math.nan}
    plot = ratio_plot([PlotLine("FAIL", [Point(name, ratio, "FAIL", name) for name, ratio in ratios.items()])])
    gate = float(re.findall(r'<line class="gate" x2="100%" y1="([\d.]+)"', plot)[0])
    exact, at_gate, infinite, nan = (float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', plot))
    assert at_gate == gate and infinite == nan < gate < exact


def test_the_picture_is_red_where_the_error_is_past_the_gate() -> None:
    picture = [[-1.0, 4.0, 0.0], [5.0, 0.0, math.log10(ELEMENT_GATE)]]
    plot = heatmap(Diagnosis("x", "one head (3)", picture, [0, 5], "head"))
    steps = {int(step): path for step, path in re.findall(r'class="heat-(\d)" d="([^"]*)"', plot)}
    red = {cell for step, path in steps.items() if step >= 3 for cell in re.findall(r"M(\d \d)h1v1h-1z", path)}
    assert red == {"1 0", "0 1", "2 1"} and sum(path.count("M") for path in steps.values()) == 6
    assert 'viewBox="0 0 3 2"' in plot and "error over noise of x by position" in plot


def test_ids_are_unique_and_links_lead_to_them() -> None:
    html = page.render(run_of(*FAMILY, *everything().cases, refused("a/c")))
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) and {"CMI001", "of-new-1"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    for tag in ("div", "details", "table", "tr", "td", "svg", "section"):
        assert len(re.findall(f"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_the_sae_panel_has_flips_with_margins_mse_and_ranks_side_by_side() -> None:
    passing, wrong = case("a/b"), case("a/c", Status.KNOWN)
    passing.sae = wrong.sae = [sae_view()]
    wrong.tensors.append(tensor("sae.features", 99.0, Status.FAIL, "values"))
    html = page.render(run_of(passing, wrong))
    text = text_of(html)
    assert "a/b its own residual 12 / 13 active 1 flip, 3.25 σ MSE 0.125 / 0.1250001 ± 1e-07" in text
    assert text.index("≠ KNOWN a/c its own residual") < text.index("✓ PASS a/b its own residual")
    assert "[0, 2, 40] 0 1.5 2.5e-06 3.25 by rounding" in text
    assert "1 #7 3.5 #7 3.5000002" in text and "2 #9 1.25 #11 1.5" in text
    assert html.count('class="differs"') == 2


def test_a_flip_that_is_planted_is_listed_with_its_margin(tmp_path: Path) -> None:
    there = real("gemma2/hub")
    (honest, _) = summarize_saes(there.truth, Trace(write(tmp_path / "honest", there)))
    features = there.arrays["sae.features"]
    index = tuple(int(i) for i in np.unravel_index(features.argmax(), features.shape))
    features[index] = 0.0
    flipped = write(tmp_path / "flipped", there, there.arrays | {"sae.features": features})
    (found, _) = summarize_saes(there.truth, Trace(flipped))
    assert found.flipped == honest.flipped + 1 and found.active_got == honest.active_got - 1
    assert found.flips[0].index == list(index) and not found.flips[0].excused
    assert found.flips[0].over_noise > 32 and found.flips[0].got == 0.0
    best = honest.top[0]
    assert best.expected and best.got and best.expected[0] == best.got[0]


def test_the_page_of_a_hunt_shows_its_figures_its_causes_and_what_it_did_not_reach() -> None:
    result = a_hunt()
    html = hunt_page.hunt_page(result)
    text = text_of(html)
    assert re.findall(r"<h1>(.*?)</h1>", html) == ["FAIL"] and '<header class="FAIL">' in html
    assert "3 divergences that no explanation covers, in 1029 inputs that were judged." in text
    assert "3010 tried, 1029 judged" in text and "48.9 inputs a second" in text and LONG + " --resume" in text
    refused = sum(result.tallies["forward"].refused.values())
    assert f"1000 11 7 {refused} 12 5" in text, "agree, known, new, refused, without a truth, too noisy"
    assert "The candidate computes PyTorch's numbers with" in text and 'href="causes/1/ISSUE.md"' in html
    assert 'of the gate family genes 0.53 mistral {"weights.x": ' in text and '0.25 llama {"' in text
    assert "321 of 1000 regions" in text and "never entered: 2" in text
    assert "changed nothing on either side: 3 of 4" in text
    plots = re.findall(r'(?s)<svg class="bars".*?</svg>', html)
    titles = [re.findall(r"<title>(.*?)</title>", plot) for plot in plots]
    assert titles == [["900 inputs from 0 to 0.8", "60 inputs from 0.8 to 1.6", "1 inputs from 4 to 4.8"],
                      ["959 inputs from 0 to 3.2", "2 inputs from 3.2 to 6.4"]]  # fmt: skip


def test_the_smallest_inputs_on_the_page_can_be_copied_into_their_tables(tmp_path: Path) -> None:
    result = a_hunt()
    result.write(tmp_path / "hunt.json")
    for held in (result, HuntResult.read(tmp_path / "hunt.json")):
        html = hunt_page.hunt_page(held)
        row, _, call, text = (unescape(part) for part in re.findall(r'(?s)<pre class="copy">(.*?)</pre>', html))
        assert tomllib.loads(row) == {"case": [result.causes[0].smallest]}
        Table.model_validate({"format": 1, **tomllib.loads(row)})
        assert tomllib.loads(call) == result.causes[1].smallest
        assert json.loads(text) == HOSTILE
        assert "The candidate answers as the file as it is written." in text_of(html)


@pytest.mark.parametrize(
    "value", [HOSTILE, "\x7f\\\"'\n\U0001f600", 1e-5, -math.inf, True, 10**20, [], {}, {"a b": [{"c": "d"}]}]
)
def test_a_row_of_toml_is_read_as_it_was_written(value: object) -> None:
    text = toml_rows({"row": [{"key": value, "absent": None}, {"b": 1}], "table": {"key": value}})
    assert tomllib.loads(text) == {"row": [{"key": value}, {"b": 1}], "table": {"key": value}}
    assert text == printable(text)


def test_a_bar_is_as_high_as_its_count_on_a_log_scale() -> None:
    plot = histogram({0: 1000, 3: 10, 4: 1, 9: 0}, 8.0, "x")
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([\d.]+)"', plot)]
    assert heights == pytest.approx([150, 150 * 1.1 / 3.1, 150 * 0.1 / 3.1], abs=0.1)


def test_the_terminal_of_a_hunt_is_short_and_its_verdict_last() -> None:
    result = a_hunt()
    result.causes *= 100
    result.faults = {f"fault {number}": 1 for number in range(50)}
    lines = shown(lambda console: hunt_tables.hunt_tables(result, console, Path("out"))).splitlines()
    assert len(lines) <= 40
    assert lines[-1].startswith("FAIL: 3010 inputs") and lines[-2] == "page: out/hunt.html"
    assert "refused 59 times: refusal 59" in lines and "  and 285 more, in out/hunt.html" in lines
    assert "3 entries of the menu changed nothing on either side" in lines


def test_the_report_is_what_its_schema_says_and_the_schema_is_in_the_repository() -> None:
    stored = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert stored == json_schema(), "python -m candle_mi_parity.report.report_model > docs/report.schema.json"
    result = everything()
    result.cases[2].tensors[-1] = tensor("x", math.inf, Status.FAIL, "nonfinite")
    report = json.loads(json.dumps(document(result)))
    jsonschema.validate(report, stored)
    REPORT.model_validate(report)
    known = next(case for case in report["cases"] if case["status"] == "KNOWN")
    assert known["outcome"] == "diverges" and known["explained"]["change"] == "rope_theta = 10000.0"
    assert [cause["id"] for cause in report["causes"]] == ["new-1", "new-2", "new-3", "CMI001"]
    short = {"cases": [{**report["cases"][0], "tensors": [{"name": "x"}]}]}
    for change in ({"format": "candle-mi-parity/report/3"}, {"verdict": "MAYBE"}, {"surplus": 1}, short):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(report | change, stored)


def test_the_docs_name_the_suspects_that_page_and_terminal_name() -> None:
    text = (ROOT / "docs" / "reading-a-report.md").read_text().partition("| first divergence |")[2]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", text, re.MULTILINE)
    assert {tuple(re.findall("`(.*?)`", points)): parts for points, parts in rows} == SUSPECTS
    assert all(suspect(name) for name in [*hook_names(2), "logits", "lens.blocks.0.hook_resid_post", "sae.features"])
    assert not suspect("logits.next_token")
    assert suspect("weights.model.layers.0.mlp.up_proj.weight").startswith("the dequantisation")


def test_a_report_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text("x", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_every_case_of_the_table_is_in_one_group_and_a_group_is_closed_until_something_is_new() -> None:
    cases = [case(row.id) for row in load_cases()]
    groups = page.groups(run_of(*cases))
    assert {group.name for group in groups} == set(page.FEATURES)
    assert sum(len([c for c in row.cells if c]) for group in groups for row in group.rows) == len(cases)
    assert page.render(run_of(*cases)).count('<details class="feature">') == len(groups)
    broken = [case(found.id, Status.FAIL) if found.id == "rwkv6/hub" else found for found in cases]
    assert [group.name for group in page.groups(run_of(*broken)) if group.wanted] == ["RWKV"]
