"""The part of ``check`` that computes: it makes a case of each prompt, judges it, and measures differences."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from candle_mi_parity import __version__
from candle_mi_parity.candidate.build import build, changed_since
from candle_mi_parity.candidate.dumped import DumpSource
from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.requests import TIMEOUT_SECONDS
from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.candidate.watched import Seen, WatchedSource
from candle_mi_parity.compare.check_result import CheckResult, PromptResult
from candle_mi_parity.compare.verdict import CaseResult, Failure, Status
from candle_mi_parity.errors import CaseTableError, ModelError, ParityError, TraceError
from candle_mi_parity.files.cache import cached
from candle_mi_parity.judge.case import Judgement, Progress, judge_case
from candle_mi_parity.judge.explain import explain_new
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.dequantize import quantization_of
from candle_mi_parity.models.indexed import files_read
from candle_mi_parity.models.prepared_case import PreparedCase, prepare, tokenizer
from candle_mi_parity.models.resolve import as_model, model_directory
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.run.check import CheckOptions, known_release
from candle_mi_parity.run.check_files import TOKENIZERS, nonfinite_weight, require_usable, tokenizer_fault
from candle_mi_parity.run.check_findings import not_exercised, unknown_keys
from candle_mi_parity.run.check_inputs import Prompt, built_in
from candle_mi_parity.run.check_measures import Decode, continuation, lens_rows, matters
from candle_mi_parity.run.check_plan import plan
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.cases import Case, HubModel
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.families import MAPPED, RECURRENT
from candle_mi_parity.trace.dump import as_trace, check_names, read_dump
from candle_mi_parity.trace.trace import CandleMi

if TYPE_CHECKING:  # they import torch, which a check with cached truths does not need
    from candle_mi_parity.coverage.census_record import Reader
    from candle_mi_parity.coverage.unmapped import Give


class Checking:
    """One check; see :func:`candle_mi_parity.run.check.check`."""

    def __init__(
        self, options: CheckOptions, result: CheckResult, progress: Progress, opened: Callable[[], Source] | None
    ) -> None:
        self.options, self.result, self.progress, self._opened = options, result, progress, opened
        self.model, self.sae = as_model(options.model), options.sae_file
        if isinstance(self.model, HubModel):
            from candle_mi_parity.models.hub import to_download

            progress.keep(to_download(self.model))
        self.directory = model_directory(self.model, options.cache)
        require_usable(self.directory)
        self.config: dict[str, Any] = read_config(self.directory)
        self.quantized = quantization_of(self.directory) is not None
        if self.quantized and self.config.get("model_type") not in MAPPED:
            raise ModelError(f"{self.directory}: a quantised checkpoint of a family whose hooks are not mapped")
        if self.quantized and options.dtype not in (None, "float32"):
            raise ModelError(f"{self.directory}: candle-mi loads a quantised checkpoint in float32 only")
        self.has_tokenizer = any((self.directory / name).is_file() for name in TOKENIZERS)
        self.dump = read_dump(options.trace) if options.trace else None
        if self.dump:
            result.dumped = list(self.dump.arrays)
            check_names(self.dump, self.layers, self.sae.hook if self.sae else None)
        self.table = load_explanations(parse_candidate(result.candidate).table)
        self.release = known_release(result.candidate, self.table)
        self._model: Any = None

    @property
    def layers(self) -> int:
        found = self.config.get("num_hidden_layers")
        return found if isinstance(found, int) else 0

    def run(self) -> None:
        """Judge every prompt.

        :raises ParityError: nothing could be judged.
        """
        self.result.versions = library_versions()
        cases = [self._case(prompt) for prompt in self._prompts()]
        known = (*MAPPED, *RECURRENT)
        subjects = self._mapped(cases) if self.config.get("model_type") in known else self._unmapped(cases)
        judged = [prompt.case for prompt in self.result.prompts]
        if all(case.status is Status.ERROR and case.failure is Failure.INPUT for case in judged):
            self.result.prompts.clear()
            raise ParityError(judged[0].error)
        self._conclude(subjects)

    def _prompts(self) -> list[Prompt]:
        given = list(self.options.prompts)
        if self.dump and len(given) > 1:
            raise TraceError(f"a trace is of one prompt, and {len(given)} were given")
        if self.dump and not given:
            return [Prompt(id="trace", tokens=self.dump.tokens)]
        return given or built_in(self.config, self.has_tokenizer, bool(self.options.edits))

    def _case(self, prompt: Prompt) -> Case:
        if prompt.text is not None and not self.has_tokenizer:
            raise ModelError(
                f"{self.directory} has no tokenizer, which --prompt needs: give token ids with --tokens, or one of "
                f"{', '.join(TOKENIZERS)}"
            )
        return Case(
            id=f"check/{prompt.id}",
            model=self.model,
            tokens=prompt.tokens,
            text=prompt.text,
            sae=self.sae,
            dtype=self.options.dtype or (self.dump.dtype if self.dump else "float32"),  # type: ignore[arg-type]
            edits=list(self.options.edits),
            unmeasured=["*"],
            loader="pretrained" if self.quantized else self.options.loader,
            features=self._features(),
        )

    def _features(self) -> list[str]:
        """The features of candle-mi without which ``from_pretrained`` refuses the model."""
        if self.quantized:
            return ["quantized"]
        if self.config.get("model_type") in RECURRENT:
            return ["rwkv"]
        sharded = len(files_read(self.directory, self.options.loader)) > 1
        return ["mmap"] if self.options.loader == "pretrained" and sharded else []

    def _mapped(self, cases: list[Case]) -> list[PreparedCase]:
        """Judge a model of a family with a hook map, as ``run`` does, and explain divergences."""
        options = self.options
        try:
            subjects = [prepare(case, options.cache) for case in cases]
        except ModelError as error:
            texts = any(case.text is not None for case in cases)
            raise ModelError((tokenizer_fault(self.directory) if texts else "") or str(error)) from error
        self._hold_tokens(subjects[0])
        self.progress.keep(plan(subjects, options.cache, options.device, options.generate))
        with self._open() as source:
            watched = WatchedSource(source, options.hooks, options.layers)
            watched.wanted(subjects[0].captures)
            if source.identity and self.dump is None:
                self._identify(source.identity)
            judgements = [self._judged(subject, watched) for subject in subjects]
            if options.generate and self.dump is None:
                judgements += [self._continued(subject, watched) for subject in subjects]
            explain_new(judgements, self.table, options.cache, options.search, self.progress, options.search)
            built = parse_candidate(self.result.candidate)
            if self.dump is None and (reason := changed_since(built, source.identity, options.cache)):
                raise CandidateError(f"{reason}; check again")
        return [seen.subject for seen in watched.seen.values()] or subjects

    def _hold_tokens(self, subject: PreparedCase) -> None:
        dump, tokens = self.dump, subject.tokens[0]
        if dump and tokens != dump.tokens:
            raise TraceError(f"trace {dump.directory}: its tokens are {dump.tokens}, the prompt's are {tokens}")

    def _identify(self, identity: CandleMi) -> None:
        self.result.identity = identity.model_dump(exclude_none=True)
        self.release = self.table.baseline(identity.version) or self.release

    def _open(self) -> Source:
        """:raises CandidateError: the candidate cannot be built; without Rust, with the alternatives."""
        if self._opened:
            return self._opened()
        if self.dump is not None:
            return DumpSource(self.dump, self.release)
        options = self.options
        candidate = parse_candidate(self.result.candidate)
        try:
            return open_source(candidate, options.cache, options.out / "traces", self.progress.note, options.device)
        except CandidateError as error:
            if shutil.which("cargo"):
                raise
            raise type(error)(
                f"{error}; without Rust, `--trace DIR` judges tensors that your own program dumped, and "
                "`--candidate torch` judges PyTorch's own float32"
            ) from error

    def _judged(self, subject: PreparedCase, watched: WatchedSource, generated: int = 0) -> Judgement:
        case = subject.case
        judged = judge_case(case, watched, self.result.candidate, self.options.cache, self.table, self.progress)
        judged.result.shrink = ""  # `repro` takes only cases of the table
        if judged.result.status is Status.KNOWN:  # to a user, a known divergence is as wrong as a new one
            judged.result.status = Status.FAIL
        self._add(subject, judged.result, watched.seen.get(case.id), generated)
        return judged

    def _add(self, subject: PreparedCase, case: CaseResult, seen: Seen | None, generated: int = 0) -> None:
        """Add a prompt to the result, with measures of the difference where both sides gave numbers."""
        case.reproduce = self.options.command()
        if case.status is Status.ERROR and case.failure is Failure.INPUT and self._broken:
            case.error = self._broken
        tokens = subject.tokens[0]
        text = subject.case.text if subject.case.text is not None else f"{len(tokens)} token ids"
        prompt = PromptResult(subject.case.id.removeprefix("check/"), text, tokens, case, generated)
        self.result.prompts.append(prompt)
        if seen is not None:
            hooks = [self.sae.hook] if self.sae else []
            hooks += [*(edit.hook for edit in self.options.edits), f"blocks.{self.layers - 1}.hook_resid_post"]
            prompt.matters = matters(seen, list(dict.fromkeys(hooks)))
            if subject.captures and case.status is Status.FAIL:
                prompt.lens = lens_rows(seen, self._decode, partial(self._likeliest, subject))

    @cached_property
    def _broken(self) -> str:
        return nonfinite_weight(self.directory)

    @cached_property
    def _decode(self) -> Decode:
        """Token id → its text; ``#id`` where the model has no tokenizer."""
        if not self.has_tokenizer:
            return lambda token: f"#{token}"
        known = tokenizer(self.directory)
        return lambda token: str(known.decode([token]))

    def _likeliest(self, subject: PreparedCase, streams: np.ndarray) -> list[list[int]]:
        """Streams [B, T, d] → likeliest tokens [B][T], through PyTorch's final norm and unembedding."""

        def computed() -> list[list[int]]:
            from candle_mi_parity.oracle.downstream import project

            if self._model is None:
                with TORCH:
                    self._model = Oracle(subject, self.options.cache).computation.model
            tokens: list[list[int]] = project(self._model, streams).argmax(-1).tolist()
            return tokens

        key = [subject.model_digest, subject.case.dtype, hashlib.sha256(streams.tobytes()).hexdigest()]
        found: list[list[int]] = cached(self.options.cache, "lens", [*key, self.result.versions], computed)
        return found

    def _continued(self, subject: PreparedCase, watched: WatchedSource) -> Judgement:
        """Judge a prompt together with PyTorch's greedy continuation."""
        from candle_mi_parity.oracle.continuation import greedy

        steps, tokens, name = self.options.generate, subject.tokens[0], subject.case.id
        self.progress.case_starts(subject.case, f"PyTorch generates {steps} tokens")
        with TORCH:
            more = greedy(Oracle(subject, self.options.cache, self.options.device), self.options.cache, steps)
        changed = {"id": f"{name}-and-{steps}", "text": None, "tokens": [*tokens, *more]}
        case = subject.case.model_copy(update=changed)
        judged = self._judged(prepare(case, self.options.cache), watched, len(more))
        seen = watched.seen.get(case.id)
        if seen is not None and "logits" in seen.emitted.entries:
            compared = continuation(name.removeprefix("check/"), len(tokens), seen, self._decode)
            self.result.continuations.append(compared)
        return judged

    def _unmapped(self, cases: list[Case]) -> list[PreparedCase]:
        """Judge a model of another family, at the hook points that its module names suggest, or by its logits.

        :raises ParityError: an option that needs a hook map, or a candidate that cannot be built.
        """
        from candle_mi_parity.coverage.census import Question
        from candle_mi_parity.coverage.unmapped import unmapped_subject

        options, family = self.options, self.config.get("model_type")
        needs: dict[str, object] = {"--sae": options.sae, "--edits": options.edits, "--generate": options.generate}
        needs |= {"--hooks and --layers": options.hooks or options.layers, "--device": options.device != "cpu"}
        needs |= {"--loader": options.loader != "hf"}
        if asked := [name for name, value in needs.items() if value]:
            raise CaseTableError(f"{family} is not among the families whose hooks are mapped: {asked[0]} needs them")
        subjects = [unmapped_subject(case, options.cache) for case in cases]
        self._hold_tokens(subjects[0])
        self.result.notes.append(f"{family} is not among the families whose hooks are mapped")
        if self.dump is not None:
            dump = self.dump
            self._judge_unmapped(subjects, lambda subject, truth: as_trace(dump, truth, subject.case.dtype))
            return subjects
        candidate = parse_candidate(self.result.candidate)
        if not candidate.has_source:
            raise CandidateError(f"{family} has no hook map: only a candle-mi can be asked, not {candidate.spec}")
        built = build(candidate, options.cache, self.progress.note)
        identity = CandleMi.model_validate(built.identity["candle_mi"])
        self._identify(identity)
        out = (options.out / "traces").resolve()
        out.mkdir(parents=True, exist_ok=True)
        with EmitterProcess(built.path) as emitter:
            question = Question(str(family), "", emitter, identity, options.cache, out, TIMEOUT_SECONDS)
            readers: list[Reader] = []

            def give(subject: PreparedCase, truth: object) -> Any:
                if not readers:
                    readers.append(question.reader(replace(subject, captures=[])))
                return question.emit(subject, readers[0])

            self._judge_unmapped(subjects, give)
        if "auto" in readers:
            self.result.notes.append(f"candle-mi reads {family} through its auto-config")
        return subjects

    def _judge_unmapped(self, subjects: list[PreparedCase], give: Give) -> None:
        from candle_mi_parity.coverage.unmapped import judge_unmapped

        for subject in subjects:
            self.progress.case_starts(subject.case, "truth and candle-mi")
            case, seen, note = judge_unmapped(subject, self.options.cache, give)
            self._add(subject, case, seen)
            if note and note not in self.result.notes:
                self.result.notes.append(note)

    def _conclude(self, subjects: list[PreparedCase]) -> None:
        """Add what the prompts do not show, unknown keys, and what identifies the check."""
        result = self.result
        result.not_exercised = not_exercised(result.forecast, self.table, subjects)
        try:
            result.unknown = unknown_keys(self.directory, subjects[0].model_type, self.options.cache)
        except ParityError as error:
            result.notes.append(f"which keys transformers reads is not known: {error}")
        result.cite = self._cite(subjects)

    def _cite(self, subjects: list[PreparedCase]) -> dict[str, str]:
        """Everything that identifies the check, for a paper's appendix."""
        result, first = self.result, subjects[0]
        tokens = hashlib.sha256(json.dumps([subject.tokens for subject in subjects]).encode()).hexdigest()
        made = [f"{key} {value}" for key, value in result.identity.items() if key != "version"]
        found = {
            "candidate": ", ".join([result.who, *made]),
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
