"""Made-up results, one of each status, and names that attack the views."""

import math
from collections.abc import Callable

from rich.console import Console

from candle_mi_parity.compare.align import Distance
from candle_mi_parity.compare.check_result import CheckResult, Continuation, LensRow, Matters, PromptResult
from candle_mi_parity.compare.diff import CaseDiff, Diff, Direction, Kind, Side, TensorDiff
from candle_mi_parity.compare.hunt_result import Branches, Cause, Entry, HuntResult, Tally
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.sae_view import Flip, Ranked, SaeView
from candle_mi_parity.compare.verdict import CaseResult, Diagnosis, Explained, Failure, Status, TensorResult, Worst
from candle_mi_parity.report.history import History, make_history
from candle_mi_parity.spec.forecast import Forecast
from candle_mi_parity.trace.trace import Run

HOSTILE = "<script>alert(1)</script>\x1b[2J\x1b]0;owned\x07\u202e${{7*7}}{{7*7}}"
LONG = "blocks.0." + "a_name_without_a_place_to_break" * 5
VERSIONS = {"candle-mi-parity": "0.1.0", "torch": "2.15.0", "transformers": "5.24.0", "python": "3.11"}
VERSIONS |= {"machine": "Linux", "device": "cpu"}


def shown(show: Callable[[Console], object], width: int = 500) -> str:
    """What is written to a terminal, without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(console)
    return capture.get()


def tensor(name: str, ratio: float = 1.0, status: Status = Status.PASS, reason: str = "") -> TensorResult:
    worst = Worst.of([0, 1, 3, 17], 1.25, 1.75, 1.5e-7, ratio * 4)
    return TensorResult(
        name, status, reason, ratio, ratio * 4, 1.0, 96, 7, 11 if reason else 0, inputs_agreed=True, worst=worst
    )


def case(name: str, status: Status = Status.PASS, bad: str = "blocks.0.attn.hook_scores") -> CaseResult:
    tensors = [tensor("hook_embed", 0.0), tensor("blocks.0.attn.hook_q")]
    result = CaseResult(name, name.split("/")[0], "0" * 64, status, f"candle-mi-parity run --cases {name}", tensors)
    if status in (Status.FAIL, Status.KNOWN):
        tensors.append(tensor(bad, 4321.0, Status.FAIL, "values"))
        result.teacher_forced = [tensor(bad, 4321.0, Status.FAIL, "values")] if status is Status.FAIL else []
        result.diagnosis = Diagnosis(bad, "one head (3)", [[0.1, 3.5], [0.2, 4.25]], [0, 5], "head")
    if status is Status.KNOWN:
        result.explained = Explained(
            ["CMI001"], "rope_theta is not read.", "rope_theta = 10000.0", {"hook_embed": 0.0, bad: 1.2}, "Write it."
        )
    if status is Status.ERROR:
        result.tensors, result.error = [], "crash: emitter was ended by SIGKILL"
        result.failure = Failure.CRASH
    if status is Status.UNMEASURED:
        tensors[1] = tensor("blocks.0.attn.hook_q", 1.0, Status.UNMEASURED, "noisy")
        result.error = "too noisy to judge, and not declared so: blocks.0.attn.hook_q"
    result.expected = len(result.tensors)
    return result


def refused(name: str) -> CaseResult:
    """A known refusal."""
    result = case(name, Status.KNOWN)
    result.tensors, result.diagnosis, result.expected = [], None, 0
    result.error, result.failure = "model: unsupported rope", Failure.MODEL
    result.explained = Explained(["CMI030"], "Not implemented.")
    return result


def everything() -> RunResult:
    """One case of each status, and one that did not run."""
    cases = [case(f"{status.value.lower()}fam/{status.value.lower()}", status) for status in Status]
    skipped = {"gemma-2-2b/scope-l0": "needs a download from the hub"}
    return RunResult("0.2.2", {"version": "0.2.2", "source": "registry"}, VERSIONS, cases, skipped)


def run_of(*cases: CaseResult) -> RunResult:
    return RunResult("0.2.2", {}, VERSIONS, list(cases), {})


def changed(result: RunResult, **fields: object) -> RunResult:
    """The same result with other fields."""
    vars(result).update(fields)
    return result


def sae_view(chain: str = "sae") -> SaeView:
    """One flip that rounding explains, and two ranks of which the second differs."""
    flip = Flip([0, 2, 40], 0.0, 1.5, 2.5e-6, 3.25, excused=True)
    ranks = [Ranked((7, 3.5), (7, 3.5000002)), Ranked((9, 1.25), (11, 1.5))]
    return SaeView(chain, 12, 13, 1, [flip], 0.125, 0.1250001, 1e-7, ranks)


def a_report() -> RunResult:
    """Everything that the page can show, with names that attack it and names that do not break."""
    result = everything()
    judged = case("llama/sae")
    judged.sae = [sae_view(), sae_view("sae_on_truth")]
    hostile, broken = case(f"llama/{HOSTILE}", Status.FAIL, bad=LONG), case(f"llama/{LONG}", Status.ERROR)
    hostile.error = broken.error = f"{HOSTILE} {LONG}"
    result.cases += [refused("llama/rope-yarn"), judged, hostile, broken]
    result.cases += [case("llama/v5", Status.KNOWN), case("mistral/v5", Status.FAIL)]
    result.cases += [case(f"{family}/hub") for family in ("gemma", "gemma2", "phi3", "qwen2", "qwen3", "starcoder2")]
    result.skipped["mistral/sae"], result.stale = f"{HOSTILE} {LONG}", [HOSTILE, LONG]
    return result


def checked() -> CheckResult:
    """A check of a model with a prompt of each status, and a name that attacks."""
    result = CheckResult(HOSTILE, "candle-mi 0.2.2", "0.2.2", keys=26, versions=VERSIONS, census=HOSTILE)
    result.forecast = [Forecast("CMI001", "rope_theta is not read.", "Write it.", False, {"rope_theta": 1e5})]
    for number, status in enumerate((Status.FAIL, Status.PASS, Status.UNMEASURED, Status.ERROR)):
        judged = case(f"check/p{number}", status)
        judged.sae = [sae_view()]
        found = Matters(24, 0.01, 0.2, 7, 20, {"blocks.1.hook_resid_post": 0.1}, {"blocks.1.hook_resid_post": 1e-6})
        lens = [LensRow("blocks.0.hook_resid_post", HOSTILE, "Paris"), LensRow("blocks.1.hook_resid_post", "a", "a")]
        result.prompts.append(PromptResult(f"p{number}", HOSTILE, [1, 2], judged, matters=found, lens=lens))
    result.continuations = [Continuation("p0", 4, "text", 2, HOSTILE, "Rome", 0.5)]
    result.not_exercised, result.unknown, result.notes = [LONG], [LONG], [HOSTILE]
    result.cite = {"model": HOSTILE, "command": "candle-mi-parity check " + LONG}
    return result


def differing() -> Diff:
    """A case that got worse, one that got better, one that cannot be compared."""
    good, bad = case("llama/v5"), case("llama/v5", Status.FAIL, bad=LONG)
    lost = case(f"llama/{HOSTILE}", Status.ERROR)
    lost.error = f"no oracle: {HOSTILE} {LONG}"
    before = tensor(LONG)
    ran = Run(started="", seconds={"forward": 0.25}, threads=2, peak_rss_bytes=1 << 28)
    far = Distance(False, 4321.0, 17284.0, 3)
    away = TensorDiff(LONG, Kind.MOVED, before, bad.tensors[-1], far, Direction.AWAY, worse=f"{LONG} now diverges")
    towards = TensorDiff(
        HOSTILE, Kind.MOVED, bad.tensors[-1], before, far, Direction.TOWARDS, better=f"{HOSTILE} agrees now"
    )
    gone = TensorDiff("hook_embed", Kind.VANISHED, good.tensors[0], None, worse="hook_embed vanished")
    fixed, honest = case("mistral/v5", Status.KNOWN), case("mistral/v5")
    known, other = case("phi3/window", Status.KNOWN), case("phi3/window", Status.KNOWN)
    other.explained = Explained(["CMI006"], "One key too many.", "sliding_window + 1", {"hook_embed": 0.5})
    cases = [
        CaseDiff(Side(good, None, ran), Side(bad, None, ran), [away, gone], worse=["agrees → diverges", away.worse]),
        CaseDiff(Side(fixed, None, ran), Side(honest, None), [towards], better=[towards.better], partial=True),
        CaseDiff(Side(lost, None), Side(lost, None)),
        CaseDiff(Side(known, None), Side(other, None), note="A: rope_theta = 10000.0; B: sliding_window + 1"),
    ]
    return Diff("0.1.10", HOSTILE, {"version": "0.1.10"}, {}, VERSIONS, cases)


def a_history() -> History:
    """Four releases in which divergences come and go."""
    hostile = case(f"mistral/{HOSTILE}", Status.KNOWN, bad=LONG)
    old = run_of(case("llama/v5", Status.KNOWN), hostile, case("gemma/window"))
    new = run_of(case("llama/v5"), hostile, case("gemma/window", Status.ERROR))
    return make_history({"0.1.6": old, "0.1.10": old, "0.1.24": new, "0.2.2": run_of(case("llama/v5"))})


def a_hunt() -> HuntResult:
    """A hunt with a cause with and without an explanation and a folder, and names that attack."""
    genes = {"config.rope_theta": ["set", 1e4], "weights.embedding-mean": True}
    model = {"source": "tiny", "config": "models/llama.json", "dialect": "hub", "change": {"rope_theta": 1e4}}
    model |= {"weights": ["embedding-mean"]}
    row = {"id": "llama/hunt", "model": model, "tokens": {"random": 1}}
    known = Cause("forward", "llama", "blocks.0.hook_resid_post", "values", "12 of 8", row, genes=genes)
    known.explained, known.change, known.count = f"{HOSTILE} {LONG}", {"variants": ["no-causal-mask"]}, 7
    known.proposed, known.folder = f"[[explanation]]\nsays = '{HOSTILE} {LONG}'\n", "causes/1"
    other = Cause(
        "call",
        HOSTILE,
        LONG,
        HOSTILE,
        HOSTILE,
        {"call": [{"id": HOSTILE}, {LONG: [1e-5, math.inf]}]},
        no_folder=HOSTILE,
    )
    text = Cause("text", "qwen", "ids", "values", HOSTILE, {"text": HOSTILE}, "the file as it is written")
    result = HuntResult(HOSTILE, 3, ["llama", "mistral"], "0.2.2", f"candle-mi-parity hunt --families {LONG}")
    result.rounds, result.seconds, result.causes = 12, 61.5, [known, other, text]
    refused = {HOSTILE: 40, LONG: 3} | {f"refusal {number}": number for number in range(1, 60)}
    result.tallies["forward"] = Tally(3000, 1000, {"CMI001": 9, "CMI001 CMI004": 2}, refused, {HOSTILE: 12}, 5)
    result.tallies["call"] = Tally(10, 9)
    result.position, result.element = {0: 900, 1: 60, 5: 1}, {0: 959, 1: 2}
    result.nearest = [
        (0.53, "mistral", {"weights.x": HOSTILE, "tokens": {"random": 3}}),
        (0.25, "llama", {LONG: True}),
    ]
    result.faults, result.skipped = {HOSTILE: 2, LONG: 1}, {"text": HOSTILE}
    result.entries = {f"llama: {name}": Entry(9, asked=9) for name in (HOSTILE, LONG, "config.rope_theta null")}
    result.entries["llama: weights.norm-zero"] = Entry(9, asked=1, excites=True)
    result.branches = Branches(1000, list(range(321)), [HOSTILE, LONG])
    return result
