"""``candle-mi-parity repro``: reproduce the chosen cases, write a folder for each, and prove them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers

from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.repro.crate import dependencies
from candle_mi_parity.repro.prove import TestOutcome, prove
from candle_mi_parity.repro.repro import AgreesError, Reproduction, ReproError, known_of, reproduce
from candle_mi_parity.repro.write import Origin, slug, write_folder
from candle_mi_parity.spec.cases import load_cases, select
from candle_mi_parity.trace.trace import CandleMi


@dataclass
class ReproducedCase:
    """A reproduction and its folder.

    :ivar proof: result of its test on the candidate, and ``fixed`` on a fixed one; None if it was not run.
    """

    reproduction: Reproduction
    folder: Path
    proof: TestOutcome | None = None
    fixed: TestOutcome | None = None

    @property
    def proven(self) -> bool:
        """No test contradicts it."""
        return self.proof in (None, TestOutcome.DIFFERS) and self.fixed in (None, TestOutcome.PASSES)

    def line(self) -> str:
        """Case, first tensor, error, size and test results."""
        config, first = self.reproduction.pair.case.config, self.reproduction.first
        layers, width, heads = config["num_hidden_layers"], config["hidden_size"], self.reproduction.heads
        tokens = len(self.reproduction.pair.case.tokens)
        text = f"{self.reproduction.original.id}: {first.name} {first.element_ratio:.3g} σ, {layers} layers of width "
        text += f"{width}, {heads} heads, {tokens} tokens"
        text += f"; test: {self.proof.value} on the candidate" if self.proof else ""
        return text + (f"; test: {self.fixed.value} on the fixed one" if self.fixed else "")


def named(found: CandleMi, spec: str) -> str:
    """Which candle-mi a candidate is: ``0.2.2``, or the version, place and digest of a source tree."""
    if found.source == "registry":
        return found.version
    digest = f"; revision {found.revision}" if found.revision else ""
    digest += f"; sha256 of its files {found.tree_digest}" if found.tree_digest else ""
    return f"{found.version} of `{spec}` (not the release{digest})"


def repro(
    pattern: str | None,
    candidate: str,
    out: Path,
    cache: Path,
    tell: Callable[[str], None],
    proof: bool = False,
    fixed: str | None = None,
    leave: Callable[[str], None] = lambda line: None,
) -> list[ReproducedCase]:
    """Reproduce cases, write a folder for each, and prove them.

    :param pattern: glob over case ids, of which those that agree or cannot be reproduced are skipped; None for every
        known divergence.
    :param proof: whether the tests are run on the candidate.
    :param fixed: a candidate on which the tests must pass.
    :param leave: called with the reason for each case that diverges or is refused and cannot be reproduced.
    :raises AgreesError: nothing diverges.
    :raises ReproError: the only case cannot be reproduced.
    :raises ParityError: the candidate cannot be built.
    """
    chosen = parse_candidate(candidate)
    if not chosen.has_source:
        raise CandidateError(f"`repro` must build candle-mi, and {candidate} has no source; use 0.2.2, path: or git:")
    # transformers warns about special tokens outside a vocabulary of eight.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    found: list[ReproducedCase] = []
    left = 0
    with (
        tempfile.TemporaryDirectory(prefix="parity-repro-") as traces,
        open_source(chosen, cache, Path(traces), tell) as source,
    ):
        assert source.identity is not None
        needed = dependencies(chosen, cache)
        for case in select(load_cases(), [pattern] if pattern else []):
            rows = known_of(prepare(case, cache), source)
            sentence = " ".join(row.says for row in rows if row.change is not None)
            if not (pattern or sentence):
                continue
            try:
                reproduction = reproduce(case, source, cache, tell)
            except AgreesError:
                if pattern == case.id:
                    raise
                continue
            except ReproError as error:
                if pattern == case.id:
                    raise
                left += 1
                leave(str(error))
                continue
            again = f"candle-mi-parity repro {case.id} --candidate {candidate}"
            origin = Origin(named(source.identity, candidate), again, sentence)
            found.append(ReproducedCase(reproduction, write_folder(reproduction, origin, needed, out / case.id)))
    if not found:
        where = pattern or "the default lane"
        if left:
            raise ReproError(f"none of the {left} cases of {where} that diverge or are refused can be reproduced")
        raise AgreesError(f"no case of {where} diverges; there is nothing to reproduce")
    tests = [line.folder / "tests" / f"{slug(line.reproduction.original.id)}.rs" for line in found]
    for spec, field in ((candidate if proof or fixed else None, "proof"), (fixed, "fixed")):
        if spec is not None:
            tell(f"cargo test: {len(tests)} tests against {spec}")
            outcomes = prove(tests, parse_candidate(spec), cache)
            for line, test in zip(found, tests, strict=True):
                setattr(line, field, outcomes[test.stem])
    return found
