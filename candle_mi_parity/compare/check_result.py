"""The result of ``candle-mi-parity check``: plain data, and the answer as a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import TOKENS, CaseResult, Explained, Failure, Outcome, Status
from candle_mi_parity.files.escape import number, one_line
from candle_mi_parity.files.json_out import plain
from candle_mi_parity.spec.forecast import Forecast

CHECK_FORMAT = "candle-mi-parity/check/1"


@dataclass(frozen=True)
class Matters:
    """The size of the difference on one prompt, whether or not rounding explains it.

    :ivar kl_mean: KL(truth ‖ candidate) of the next token in nats, mean over the positions; None without logits.
    :ivar kl_max: its maximum, at ``kl_position``.
    :ivar top1: number of positions with the same likeliest next token, of ``positions``.
    :ivar relative: hook → ‖candidate − truth‖ / ‖truth‖ of the whole tensor.
    :ivar rounding: hook → what rounding alone is predicted to contribute to that.
    """

    positions: int = 0
    kl_mean: float | None = None
    kl_max: float = 0.0
    kl_position: int = 0
    top1: int = 0
    relative: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LensRow:
    """The likeliest token of one layer's logit lens at the last position, from each side's own residual stream."""

    hook: str
    expected: str
    got: str


@dataclass
class PromptResult:
    """One prompt judged.

    :ivar text: the prompt, or the number of its token ids.
    :ivar generated: number of tokens that PyTorch appended to another prompt.
    """

    id: str
    text: str
    tokens: list[int]
    case: CaseResult
    generated: int = 0
    matters: Matters | None = None
    lens: list[LensRow] = field(default_factory=list)


@dataclass(frozen=True)
class Continuation:
    """Greedy continuations of one prompt compared token by token.

    :ivar steps: number of tokens that PyTorch appended, in float64.
    :ivar parted: the step, from 1, at which the candidate's likeliest token first differs; None for none.
    :ivar margin: difference of PyTorch's logits there, between its token and the candidate's.
    :ivar tie: whether that margin is inside the gate, so that either token is right.
    """

    prompt: str
    steps: int
    text: str
    parted: int | None = None
    expected: str = ""
    got: str = ""
    margin: float = 0.0
    tie: bool = False

    def line(self) -> str:
        head = f"{self.prompt}: {self.steps} tokens generated greedily: "
        if self.parted is None:
            return f"{head}the same"
        reason = "a tie inside the gate" if self.tie else "more than rounding explains"
        return (
            f"{head}part at step {self.parted}: PyTorch {self.expected!r}, candle-mi {self.got!r}, "
            f"margin {number(self.margin)} ({reason})"
        )


@dataclass
class CheckResult:
    """The whole answer.

    :ivar who: the subject of the sentence, as ``candle-mi 0.2.2``.
    :ivar forecast: known divergences that the config can show.
    :ivar census: the census on the model's type, where its family has no hook map.
    :ivar keys: number of keys in ``config.json``.
    :ivar sae_keys: explanation → its keys that are of the SAE's ``cfg.json``.
    :ivar not_exercised: what these prompts do not show, one line each.
    :ivar unknown: keys of the config that transformers reads and about which nothing is known.
    :ivar cite: what identifies this check, for a paper's appendix; name → value.
    :ivar in_part: whether only some hooks were looked at.
    :ivar dumped: names of the tensors that the user's own program dumped; empty for another candidate.
    :ivar fault: why the check ended early, or empty.
    """

    model: str
    who: str
    candidate: str
    identity: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    forecast: list[Forecast] = field(default_factory=list)
    census: str = ""
    keys: int = 0
    sae_keys: dict[str, list[str]] = field(default_factory=dict)
    prompts: list[PromptResult] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    not_exercised: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cite: dict[str, str] = field(default_factory=dict)
    in_part: bool = False
    dumped: list[str] = field(default_factory=list)
    fault: str = ""

    @property
    def verdict(self) -> Verdict:
        """FAIL for any divergence or refusal, also for a known one."""
        statuses = {prompt.case.status for prompt in self.prompts}
        if Status.FAIL in statuses or any(c.parted and not c.tie for c in self.continuations):
            return Verdict.FAIL
        if self.fault or Status.ERROR in statuses:
            return Verdict.ERROR
        return Verdict.INCONCLUSIVE if Status.UNMEASURED in statuses or not statuses else Verdict.PASS

    @property
    def subject(self) -> str:
        """``who`` at the start of a sentence."""
        return self.who.replace("the ", "The ", 1) if self.who.startswith("the ") else self.who

    @property
    def agrees(self) -> bool:
        return self.verdict is Verdict.PASS

    @property
    def sentence(self) -> str:
        """The answer in words."""
        cases = [prompt.case for prompt in self.prompts]
        wrong = [case for case in cases if case.status is Status.FAIL]
        looked = max((self._number(t.name for t in case.tensors if t.name != TOKENS) for case in cases), default=0)
        of_what = self._tensors(looked)
        were = "was" if looked == 1 else "were"
        where = f"the {of_what} that {were} looked at" if self.in_part and looked else "this model"
        if self.fault and not wrong:
            return f"Not answered: {self.fault}."
        if wrong:
            refuses = all(case.outcome is Outcome.REFUSED for case in wrong)
            refused = "SAE" if all(case.failure is Failure.SAE for case in wrong) else "model"
            what = f"refuses this {refused}" if refuses else f"does not compute PyTorch's numbers on {where}"
            some = f" in {len(wrong)} of {len(cases)} prompts" if len(wrong) < len(cases) else ""
            return f"{self.subject} {what}{some}: {' Also: '.join(self._causes(wrong))}"
        if error := next((case for case in cases if case.status is Status.ERROR), None):
            return f"Not answered: {one_line(error.error)}"
        tensors, compared = sum(case.expected for case in cases), sum(case.compared for case in cases)
        judged = [tensor for case in cases for tensor in case.tensors if tensor.status is not Status.UNMEASURED]
        worst = max((tensor.ratio for tensor in judged), default=0.0)
        count = sum(1 for prompt in self.prompts if not prompt.generated)
        prompts = ("1 prompt" if count == 1 else f"{count} prompts") + " with continuations" * (count < len(cases))
        size = f"{'' if self.in_part else f'{of_what}, '}{prompts}, worst {worst:.2g} of 8"
        if idle := [case for case in cases if case.status is Status.UNMEASURED and not case.is_noisy]:
            some = f"in {len(idle)} of {len(cases)} prompts, " if len(idle) < len(cases) else ""
            return f"Not measured: {some}{one_line(idle[0].error.rstrip('.'))}."
        if self.verdict is Verdict.PASS:
            return f"{self.subject} computes PyTorch's numbers on {where}: {size}."
        noisy = sum(case.unmeasured for case in cases)
        if not compared:
            why = next((case.error for case in cases if case.error), "no prompt was judged")
            return f"Not answered: {one_line(why)}"
        derived = ", with those that are computed from your dump," if self.dumped else ""
        return (
            f"{self.subject} computes PyTorch's numbers on {where} as far as can be judged: {size}; "
            f"{noisy} of {tensors} tensors{derived} are too noisy in this format, or beyond its range, to judge."
        )

    def _causes(self, wrong: list[CaseResult]) -> list[str]:
        """One text for each cause; cases that share an explanation are one, whatever else explains each of them."""
        groups: dict[object, list[CaseResult]] = {}
        for case in wrong:
            first, found = case.first_divergence, case.explained
            ids = frozenset(found.ids if found else ())
            shared = [key for key in groups if ids and isinstance(key, frozenset) and key & ids]
            cases = [*(one for key in shared for one in groups.pop(key)), case]
            own = (found.says, found.change) if found else first.name if first else case.error
            key = ids.union(*shared) if ids else own
            groups[key] = groups.get(key, []) + cases
        return [self._cause(cases) for cases in groups.values()]

    def _number(self, names: Iterable[str]) -> int:
        """How many of these tensors the candidate gave; of a user's dump, without those computed from them."""
        return sum(1 for name in names if not self.dumped or name in self.dumped)

    def _tensors(self, number: int) -> str:
        return f"{number} tensor{'' if number == 1 else 's'}{' of your dump' if self.dumped else ''}"

    def _cause(self, cases: list[CaseResult]) -> str:
        """The text on the cases of one cause."""
        # The smallest case is the one that was searched in full.
        case = min(cases, key=lambda case: sum(tensor.compared for tensor in case.tensors))
        found, first = case.explained, case.first_divergence
        if first and first.name == TOKENS:
            return f"{_beginnings(first.detail)}. Nothing was fed to the model."
        if found is None and case.outcome is Outcome.REFUSED:
            return one_line(case.error)
        if found is None:
            where = f"first at {first.name} ({number(first.ratio)} of 8, {first.reason}); " if first else ""
            return f"{where}{case.unexplained or 'no change that was tried explains it'}."
        whole = _largest([one.explained for one in cases if one.explained])
        ids = list(dict.fromkeys(id for one in whole for id in one.ids))
        says, remedy = self._told(ids, whole)
        if case.outcome is Outcome.REFUSED:
            text = f"{says} Its words: {one_line(case.error)}"
        else:
            here = "; ".join(told.about for told in self.forecast if told.id in ids and told.about)
            says = f"{says} This model: {here}. " if here else f"{says} " if ids else ""
            worst = max(one.explained.worst for one in cases if one.explained)
            change = " or, on other prompts, with ".join(one.change for one in whole)
            tensors = self._tensors(max(self._number(one.ratios) for one in whole))
            named = f" ({', '.join(ids)})" if ids else ""
            text = f"{says}Equal to PyTorch with {change} in all {tensors}, worst {worst:.2g} of 8{named}."
        return text + (f" Remedy: {remedy}" if remedy else "")

    def _told(self, ids: list[str], whole: list[Explained]) -> tuple[str, str]:
        """What explanations say, and the remedies, each once, with the causes that have none beside others."""
        told = {one.id: one for one in self.forecast}
        known = [told[id] for id in ids if id in told]
        says = [one.says for one in (known if len(whole) > 1 and len(known) == len(ids) else whole)]
        remedies = [one.remedy for one in (known if len(known) == len(ids) > 1 else whole) if one.remedy]
        lacking = [f"{one.about or one.id} ({one.id})" for one in known if not one.remedy]
        if remedies and lacking:
            remedies.append(f"No remedy is known for {' and '.join(lacking)}.")
        return " ".join(dict.fromkeys(says)), " ".join(dict.fromkeys(remedies))

    def document(self) -> dict[str, Any]:
        """The result for JSON."""
        head = {"format": CHECK_FORMAT, "verdict": self.verdict.value, "sentence": self.sentence}
        found: dict[str, Any] = plain(head | asdict(self))
        return found


def _beginnings(text: str) -> str:
    """A text in which lists of more than 8 token ids are shortened to their beginnings."""
    return re.sub(r"\[((?:\d+, ){8})[\d, ]*…?\]?", r"[\1…]", text)


def _largest(explained: list[Explained]) -> list[Explained]:
    """One explanation of each change, without those of which another has all causes and more."""
    sets = [set(one.ids) for one in explained]
    kept = {one.change: one for one in explained if not any(set(one.ids) < other for other in sets)}
    return list(kept.values())
