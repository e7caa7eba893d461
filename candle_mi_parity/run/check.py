"""``candle-mi-parity check``: does a candidate compute PyTorch's numbers on a user's own model?

Each prompt becomes a case, judged as any case of the table is; what is new here is where the inputs come from, and
that the answer is about one model. Importing this module loads no torch: what the config alone says comes first.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from candle_mi_parity import __version__
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.check_result import CheckResult, PromptResult
from candle_mi_parity.compare.verdict import Failure, Status
from candle_mi_parity.errors import HubError, ModelError, ParityError, TraceError
from candle_mi_parity.models.checkpoint import local_path, read_config
from candle_mi_parity.models.resolve import as_model
from candle_mi_parity.run.check_inputs import Prompt, built_in, sae_of
from candle_mi_parity.spec.cases import Case, HubModel, Model, SaeFile
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.explanations import Explanations, load_explanations
from candle_mi_parity.spec.families import FAMILIES
from candle_mi_parity.spec.forecast import forecast
from candle_mi_parity.spec.paths import cache_root

if TYPE_CHECKING:
    from candle_mi_parity.candidate.sources import Source
    from candle_mi_parity.candidate.watched import WatchedSource
    from candle_mi_parity.judge.case import Judgement
    from candle_mi_parity.models.prepared_case import Subject
    from candle_mi_parity.trace.dump import Dump

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Told:
    """What a check tells while it works; the terminal overrides it."""

    def foretold(self, result: CheckResult) -> None:
        """What the config alone says is in the result."""

    def line(self, text: str) -> None:
        """A line to keep."""

    def step(self, text: str) -> None:
        """What is being done just now."""


@dataclass(frozen=True)
class CheckOptions:
    """What a check is asked.

    :ivar model: a directory, or a hub id ``ID[@REVISION]``.
    :ivar prompts: none for a short built-in set.
    :ivar sae: see :func:`candle_mi_parity.run.check_inputs.sae_of`; ``hook`` is its place.
    :ivar candidate: as the user spells it; empty for the newest release that the suite knows.
    :ivar trace: a directory of the user's own tensors, which are then judged in place of a candidate's.
    :ivar dtype: the format in which the model runs; None for float32, or for what the trace is in.
    :ivar hooks: globs over hook names; none for all.
    :ivar generate: tokens of a greedy continuation.
    :ivar search: seconds that explaining what is not listed may take.
    """

    model: str
    prompts: tuple[Prompt, ...] = ()
    sae: str | None = None
    hook: str | None = None
    edits: tuple[Edit, ...] = ()
    candidate: str = ""
    trace: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    hooks: tuple[str, ...] = ()
    generate: int = 0
    search: float = 120.0
    out: Path = Path("build/check")
    cache: Path = field(default_factory=cache_root)

    def command(self) -> str:
        """The one command that does the same again, but for edits and prompts that came from files."""
        words = ["candle-mi-parity", "check", self.model]
        for prompt in self.prompts:
            given = prompt.text if prompt.text is not None else ",".join(map(str, prompt.tokens or ()))
            words += ["--prompt" if prompt.text is not None else "--tokens", given]
        options: dict[str, object] = {
            "--sae": self.sae,
            "--hook": self.hook,
            "--candidate": self.candidate,
            "--trace": self.trace,
        }
        options |= {"--dtype": self.dtype, "--generate": self.generate or None}
        options |= {"--device": None if self.device == "cpu" else self.device}
        words += [str(word) for name, value in options.items() if value for word in (name, value)]
        return shlex.join([*words, *(word for glob in self.hooks for word in ("--hooks", glob))])


def blank(options: CheckOptions) -> CheckResult:
    """The result of a check that has judged nothing yet.

    :raises CandidateError: the candidate is misspelt.
    """
    candidate = options.candidate or load_explanations().releases[-1]
    who = f"the trace in {options.trace}" if options.trace else parse_candidate(candidate).label
    return CheckResult(options.model, who, candidate)


def check(
    options: CheckOptions,
    told: Told | None = None,
    result: CheckResult | None = None,
    opened: Callable[[], Source] | None = None,
) -> CheckResult:
    """Judge a candidate on a model.

    :param result: of :func:`blank`, to fill as prompts are judged, so that its owner has them when the check breaks
        off.
    :param opened: gives the source of the traces; None opens the candidate's own.
    :raises ParityError: the model, the SAE, a prompt or the candidate cannot be used; nothing was judged then.
    """
    told, result = told or Told(), result or blank(options)
    table = load_explanations()
    release = _release(result.candidate, table)
    model = as_model(options.model)
    sae = sae_of(options.sae, options.hook) if options.sae else None
    config = _config(model)
    _foretell(result, options, table, release, config, sae)
    told.foretold(result)
    if isinstance(model, HubModel):
        from candle_mi_parity.models.hub import to_download

        told.line(to_download(model))
    return _Check(options, told, result, table, release, model, sae, opened).run()


def _release(candidate: str, table: Explanations) -> str:
    """The release whose known divergences are foretold; of a build from source, the newest until it says its own."""
    named = parse_candidate(candidate)
    version = named.target if named.kind in ("version", "stored") else table.releases[-1]
    return table.baseline(version) or table.releases[-1]


def _config(model: Model) -> dict[str, Any]:
    """``config.json``, before any weights are there.

    :raises ParityError: no such model, or no config.
    """
    if isinstance(model, HubModel):
        from candle_mi_parity.models.hub import fetch_config

        try:
            return read_config(fetch_config(model))
        except HubError as error:
            raise HubError(f"{error}; there is no directory of that name either") from error
    directory = local_path(getattr(model, "path", ""), ModelError)
    if directory.is_file():
        raise ModelError(f"{directory} is a file; give the directory that holds config.json and safetensors weights")
    if not directory.is_dir():
        raise ModelError(f"model directory {directory} does not exist")
    return read_config(directory)


def _foretell(
    result: CheckResult,
    options: CheckOptions,
    table: Explanations,
    release: str,
    config: dict[str, Any],
    sae: SaeFile | None,
) -> None:
    from candle_mi_parity.judge.known import facts_about
    from candle_mi_parity.models.sae import sae_path

    file = sae_path(sae, 0, options.cache) if sae else None
    edits = [edit.model_dump() for edit in options.edits]
    facts = facts_about(config, file, 0, options.dtype or "float32", edits)
    result.keys, result.forecast = len(config), forecast(table, release, facts)


@dataclass
class _Check:
    """One check at work: the part that computes."""

    options: CheckOptions
    told: Told
    result: CheckResult
    table: Explanations
    release: str
    model: Model
    sae: SaeFile | None
    opened: Callable[[], Source] | None

    def run(self) -> CheckResult:
        from candle_mi_parity.models.resolve import model_directory
        from candle_mi_parity.run.run import library_versions

        options, result = self.options, self.result
        self.told.step("model")
        self.directory = model_directory(self.model, options.cache)
        self.config: dict[str, Any] = read_config(self.directory)
        self.has_tokenizer = any((self.directory / name).is_file() for name in TOKENIZERS)
        result.versions = library_versions()
        self.dump = self._dump()
        cases = [self._case(prompt) for prompt in self._prompts()]
        if self.config.get("model_type") not in FAMILIES:
            from candle_mi_parity.run.check_unmapped import judge_unmapped_family

            judge_unmapped_family(self, cases)
        else:
            self._judge(cases)
        told = [prompt.case for prompt in result.prompts]
        if all(case.status is Status.ERROR and case.failure is Failure.INPUT for case in told):
            result.prompts.clear()
            raise ParityError(told[0].error)
        return result

    def _dump(self) -> Dump | None:
        if self.options.trace is None:
            return None
        from candle_mi_parity.trace.dump import check_names, read_dump

        dump = read_dump(self.options.trace)
        layers = self.config.get("num_hidden_layers")
        check_names(dump, layers if isinstance(layers, int) else 0, self.sae.hook if self.sae else None)
        return dump

    def _prompts(self) -> list[Prompt]:
        if self.dump and not self.options.prompts:
            return [Prompt(id="trace", tokens=self.dump.tokens)]
        if self.dump and len(self.options.prompts) > 1:
            raise TraceError(f"a trace is of one prompt, and {len(self.options.prompts)} were given")
        return list(self.options.prompts) or built_in(self.config, self.has_tokenizer, bool(self.options.edits))

    def _case(self, prompt: Prompt) -> Case:
        if prompt.text is not None and not self.has_tokenizer:
            raise ModelError(f"{self.directory} has no tokenizer, which --prompt needs: give token ids with --tokens")
        return Case(
            id=f"check/{prompt.id}",
            model=self.model,
            tokens=prompt.tokens,
            text=prompt.text,
            sae=self.sae,
            dtype=self.options.dtype or (self.dump.dtype if self.dump else "float32"),  # type: ignore[arg-type]
            edits=list(self.options.edits),
            unmeasured=["*"],
        )

    def _judge(self, cases: list[Case]) -> None:
        from candle_mi_parity.candidate.watched import WatchedSource
        from candle_mi_parity.judge.explain import explain_new
        from candle_mi_parity.models.prepared_case import prepare
        from candle_mi_parity.run.check_findings import finish
        from candle_mi_parity.run.check_plan import plan

        options = self.options
        subjects = [prepare(case, options.cache) for case in cases]
        if self.dump and subjects[0].tokens[0] != self.dump.tokens:
            raise TraceError(
                f"trace {self.dump.directory}: its tokens are {self.dump.tokens}, the prompt's are "
                f"{subjects[0].tokens[0]}"
            )
        self.told.line(plan(subjects, options.cache, options.device, options.generate).line())
        with self._open() as source:
            watched = WatchedSource(source, options.hooks)
            watched.wanted(subjects[0].captures)
            if source.identity and self.dump is None:
                self.result.identity = source.identity.model_dump(exclude_none=True)
                self.release = self.table.baseline(source.identity.version)
            judgements = [self._one(case, subject, watched) for case, subject in zip(cases, subjects, strict=True)]
            if options.generate and self.dump is None:
                judgements += [self._continued(subject, watched) for subject in list(subjects)]
            explain_new(judgements, self.table, options.cache, options.search, _progress(self.told), options.search)
        finish(self, [seen.subject for seen in watched.seen.values()] or subjects)

    def _open(self) -> Source:
        """The source of the traces.

        :raises CandidateError: it cannot be had; without Rust, what can be done all the same.
        """
        from candle_mi_parity.candidate.dumped import DumpSource
        from candle_mi_parity.candidate.sources import open_source

        if self.opened:
            return self.opened()
        if self.dump is not None:
            return DumpSource(self.dump, self.release)
        options = self.options
        try:
            candidate = parse_candidate(self.result.candidate)
            return open_source(candidate, options.cache, options.out / "traces", self.told.line, options.device)
        except CandidateError as error:
            if shutil.which("cargo") is None:
                raise type(error)(
                    f"{error}; without Rust, `--trace DIR` judges tensors that your own program dumped, and "
                    "`--candidate torch` checks the rest of the way"
                ) from error
            raise

    def _one(self, case: Case, subject: Subject, watched: WatchedSource) -> Judgement:
        """One prompt, which is in the result from then on."""
        from candle_mi_parity.judge.case import judge_case
        from candle_mi_parity.run.check_findings import measured

        self.told.step(f"{case.id.removeprefix('check/')} ({len(subject.tokens[0])} tokens)")
        judged = judge_case(
            case, watched, self.result.candidate, self.options.cache, self.table, _progress(self.told)
        )
        judged.result.reproduce, judged.result.shrink = self.options.command(), ""  # it is no row of the table
        if judged.result.status is Status.KNOWN:  # to a user, what is known is as wrong as what is new
            judged.result.status = Status.FAIL
        text = case.text if case.text is not None else f"{len(subject.tokens[0])} token ids"
        prompt = PromptResult(case.id.removeprefix("check/"), text, subject.tokens[0], judged.result)
        self.result.prompts.append(prompt)
        measured(self, prompt, watched.seen.get(case.id))
        return judged

    def _continued(self, subject: Subject, watched: WatchedSource) -> Judgement:
        """A prompt with what PyTorch appends to it, given to both sides as one."""
        from candle_mi_parity.models.prepared_case import prepare
        from candle_mi_parity.oracle.continuation import greedy
        from candle_mi_parity.oracle.oracle import Oracle
        from candle_mi_parity.oracle.torch_state import TORCH
        from candle_mi_parity.run.check_findings import decoder
        from candle_mi_parity.run.check_measures import continuation

        steps, length = self.options.generate, len(subject.tokens[0])
        name = f"{subject.case.id}-and-{steps}"
        self.told.step(f"{subject.case.id.removeprefix('check/')}: PyTorch generates {steps} tokens")
        with TORCH:
            more = greedy(Oracle(subject, self.options.cache, self.options.device), self.options.cache, steps)
        changed = {"id": name, "text": None, "tokens": [*subject.tokens[0], *more]}
        case = subject.case.model_copy(update=changed)
        judged = self._one(case, prepare(case, self.options.cache), watched)
        seen = watched.seen.get(name)
        if seen is not None and "logits" in seen.emitted.entries:
            told = continuation(subject.case.id.removeprefix("check/"), length, seen, decoder(self))
            self.result.continuations.append(told)
        return judged

    def identify(self, subjects: list[Subject]) -> dict[str, str]:
        """Everything that identifies the check."""
        result, first = self.result, subjects[0]
        tokens = hashlib.sha256(json.dumps([subject.tokens for subject in subjects]).encode()).hexdigest()
        made = {key: value for key, value in result.identity.items() if key != "version"}
        found = {
            "candidate": f"{result.who}{''.join(f', {key} {value}' for key, value in made.items())}",
            "oracle": f"transformers {result.versions['transformers']}, torch {result.versions['torch']}, float64",
            "candle-mi-parity": __version__,
            "model": f"{result.model}, sha256 of config and weights {first.model_digest}",
            "prompts": f"{len(subjects)}, sha256 of token ids {tokens}",
            "arithmetic": f"{first.case.dtype} on {self.options.device}; a divergence is an error of 8 times the "
            "predicted rounding noise of a position, or 32 times that of an element",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": self.options.command(),
        }
        found |= {f"{load.repo}@{load.revision}": f"commit {load.commit}" for load in first.downloads}
        return found | ({"SAE": f"{self.options.sae}, sha256 {first.sae_digest}"} if first.sae_digest else {})


def _progress(told: Told) -> Any:
    """A case's own steps, told on."""
    from candle_mi_parity.judge.case import Progress

    class Steps(Progress):
        def case_starts(self, case: Case, step: str) -> None:
            told.step(f"{case.id.removeprefix('check/')}: {step}")

        def note(self, line: str) -> None:
            told.step(line.removeprefix("check/"))

    return Steps()
