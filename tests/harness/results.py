"""Results made by hand, one of each status, and names that attack whoever shows them."""

from __future__ import annotations

from candle_mi_parity.diagnose import Diagnosis
from candle_mi_parity.verdict import CaseResult, RunResult, Status, TensorResult, Worst

HOSTILE = "<script>alert(1)</script>\x1b[2J\x1b]0;owned\x07\u202e${{7*7}}{{7*7}}"
VERSIONS = {
    "candle-mi-parity": "0.1.0",
    "torch": "2.15.0",
    "transformers": "5.24.0",
    "python": "3.11",
    "machine": "Linux",
    "device": "cpu",
}


def tensor(name: str, ratio: float = 1.0, status: Status = Status.PASS, reason: str = "") -> TensorResult:
    worst = Worst.of([0, 3, 17], 1.25, 1.75, 1.5e-7, ratio * 4)
    return TensorResult(
        name, status, reason, ratio, ratio * 4, 1.0, 96, 7, 11 if reason else 0, inputs_agreed=True, worst=worst
    )


def case(name: str, status: Status = Status.PASS, bad: str = "blocks.0.attn.hook_scores") -> CaseResult:
    tensors = [tensor("hook_embed", 0.0), tensor("blocks.0.attn.hook_q")]
    result = CaseResult(name, name.split("/")[0], "0" * 64, status, f"candle-mi-parity run --cases {name}", tensors)
    if status in (Status.FAIL, Status.KNOWN):
        tensors.append(tensor(bad, 4321.0, Status.FAIL, "values"))
        result.forced = [tensor(bad, 4321.0, Status.FAIL, "values")]
        result.diagnosis = Diagnosis(bad, "one head (3)", [[0.1, 3.5], [0.2, 4.25]], [0, 5], "head")
    if status is Status.KNOWN:
        result.known = "rope_theta is not read"
    if status is Status.ERROR:
        result.tensors, result.error = [], "crash: emitter was ended by SIGKILL"
    if status is Status.UNMEASURED:
        tensors[1] = tensor("blocks.0.attn.hook_q", 1.0, Status.UNMEASURED, "noisy")
        result.error = "too noisy to judge, and not declared so: blocks.0.attn.hook_q"
    result.expected = len(result.tensors)
    return result


def everything() -> RunResult:
    """One case of each status, and one that did not run."""
    cases = [case(f"{status.value.lower()}fam/{status.value.lower()}", status) for status in Status]
    skipped = {"gemma-2-2b/scope-l0": "needs a download from the hub"}
    return RunResult("0.2.2", {"version": "0.2.2", "source": "registry"}, VERSIONS, cases, skipped, [])


def run_of(*cases: CaseResult) -> RunResult:
    return RunResult("0.2.2", {}, VERSIONS, list(cases), {}, [])
