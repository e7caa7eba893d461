"""The views of a :class:`CheckResult`: lines for a terminal, and the page ``check.html``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from candle_mi_parity.compare.check_result import CheckResult, PromptResult
from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.sae_view import SaeView
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.files.escape import number, rendered
from candle_mi_parity.report.plots import case_plot, heatmap

GROUPS = {
    "embedding": ("hook_embed",),
    "stream": ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    "q, k, v": ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
    "scores": ("attn.hook_scores",),
    "pattern": ("attn.hook_pattern",),
    "recurrence": ("rwkv.hook_",),
    "attention out": ("hook_attn_out",),
    "MLP": ("mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"),
    "final norm": ("hook_final_norm",),
    "logits": ("logits",),
    "lens": ("lens.",),
    "SAE": ("sae",),
}
"""Column of the matrix → parts of the names of its tensors; the last match counts."""


@dataclass(frozen=True)
class Cell:
    """One group of one prompt's tensors: its worst status and its largest ratio."""

    status: str
    ratio: float
    tensors: int


def lines(result: CheckResult) -> Iterator[str]:
    """The answer for a terminal."""
    yield result.sentence
    for prompt in (prompt for prompt in result.prompts if not prompt.generated):
        if line := matters_line(prompt):
            yield f"  {prompt.id}: {line}"
        for view in prompt.case.sae:
            if view.chain == "sae":
                yield f"  {prompt.id}: {sae_line(view)}"
    yield from (f"  {continuation.line()}" for continuation in result.continuations)
    yield from (f"  Note: {note}" for note in notes(result))
    if result.not_exercised:
        yield "Not exercised by these prompts:"
        yield from (f"  {line}" for line in result.not_exercised)
    if result.unknown:
        yield f"Unknown: {unknown_line(result)}"


def notes(result: CheckResult) -> list[str]:
    """The notes on the check, then those on prompts, each once with the prompts that have it."""
    prompts: dict[str, list[str]] = {}
    for prompt in result.prompts:
        for note in prompt.case.notes:
            prompts.setdefault(note, []).append(prompt.id)
    return [*result.notes, *(f"{', '.join(ids)}: {note}" for note, ids in prompts.items())]


def unknown_line(result: CheckResult) -> str:
    """The line on keys about which nothing is known."""
    keys = ", ".join(result.unknown)
    return f"PyTorch's model reads {keys}; whether {result.who} does so too is not known."


def foretold_lines(result: CheckResult) -> Iterator[str]:
    """The forecast from the config."""
    now = [found for found in result.forecast if not found.needs]
    later = [found for found in result.forecast if found.needs]
    if not result.forecast:
        yield f"{result.candidate}: nothing is known against any of the {result.keys} keys that this model sets."
    elif not now:
        yield f"Known of {result.candidate} on a model like this, with some inputs:"
    else:
        keys, of_sae = set[str](), set[str]()
        for found in now:
            own = set(result.sae_keys.get(found.id, ()))
            keys |= {*found.keys, *found.lacking} - own
            of_sae |= {*found.keys, *found.lacking} & own
        counts = [f"{len(keys)} of its {result.keys} keys"] if keys else []
        counts += [f"{len(of_sae)} {'key' if len(of_sae) == 1 else 'keys'} of the SAE"] if of_sae else []
        by = f", by {' and '.join(counts)}" if counts else ""
        yield f"Known of {result.candidate} on a model like this{by}:"
    if result.census:
        yield f"  {result.census}"
    for found in now:
        remedy = f" {found.remedy}" if found.remedy else ""
        yield f"  {found.about or found.id}: {found.says}{remedy}"
    # What an input does not show is told with the answer, by not_exercised.
    yield from (f"  {found.id}{f' by {found.about}' if found.about else ''}, with {found.needs}" for found in later)


def matters_line(prompt: PromptResult) -> str:
    """The size of the difference on one prompt; empty without numbers of the candidate."""
    found = prompt.matters
    if found is None:
        return ""
    parts = []
    if found.kl_mean is not None:
        parts.append(
            f"next token: KL {number(found.kl_mean)} nats on average, {number(found.kl_max)} at most (position "
            f"{found.kl_position}); the same likeliest token at {found.top1} of {found.positions} positions"
        )
    parts += [
        f"{hook} differs by {number(size)} of its norm (rounding alone: {number(found.rounding[hook])})"
        for hook, size in found.relative.items()
    ]
    return "; ".join(parts)


def sae_line(view: SaeView) -> str:
    """The line on features that differ in one prompt."""
    ranks = [rank for rank in view.top if rank.expected and rank.got]
    same = sum(1 for rank in ranks if rank.expected and rank.got and rank.expected[0] == rank.got[0])
    unexcused = f", {view.flipped} differ" if view.flipped else ", all the same"
    return (
        f"SAE features: {view.active_got} active, PyTorch {view.active_expected}{unexcused}; "
        f"{same} of {len(view.top)} of the strongest at the last position are the same"
    )


def page(result: CheckResult) -> str:
    """The whole page."""
    rows = [(prompt, row(prompt)) for prompt in result.prompts]
    groups = [group for group in GROUPS if any(group in cells for _, cells in rows)]
    given = [prompt for prompt in result.prompts if not prompt.generated]
    bad = [prompt for prompt in result.prompts if prompt.case.first_divergence]
    bad = [prompt for prompt in bad if prompt in given] or bad
    return rendered(
        "check.html.j2",
        result=result,
        notes=notes(result),
        groups=groups,
        rows=[(prompt, [cells.get(group) for group in groups]) for prompt, cells in rows],
        matters=[(prompt, matters_line(prompt)) for prompt in given if prompt.matters],
        bad=[(prompt, _plot(prompt), _picture(prompt)) for prompt in bad],
        foretold=list(foretold_lines(result)),
        sae=[(prompt, view) for prompt in given for view in prompt.case.sae if view.chain == "sae"],
        given=given,
        sae_line=sae_line,
        unknown_line=unknown_line,
        gates=(POSITION_GATE, ELEMENT_GATE),
    )


def row(prompt: PromptResult) -> dict[str, Cell]:
    """The cells of the groups that the prompt has."""
    groups: dict[str, list[TensorResult]] = {}
    for tensor in prompt.case.tensors:
        groups.setdefault(_group(tensor.name), []).append(tensor)
    grave = [Status.FAIL, Status.UNMEASURED, Status.PASS]
    return {
        group: Cell(min((t.status for t in there), key=grave.index).value, max(t.ratio for t in there), len(there))
        for group, there in groups.items()
    }


def _group(name: str) -> str:
    fits = [group for group, parts in GROUPS.items() if any(part in name for part in parts)]
    return fits[-1] if fits else "embedding"


def _plot(prompt: PromptResult) -> Markup | None:
    return case_plot(prompt.case) if any(tensor.compared for tensor in prompt.case.tensors) else None


def _picture(prompt: PromptResult) -> Markup | None:
    found = prompt.case.diagnosis
    return heatmap(found) if found and found.picture and found.picture[0] else None
