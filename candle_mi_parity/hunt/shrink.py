"""The smallest genes with the same divergence, and what the candidate computes instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from candle_mi_parity.compare.hunt_result import Cause
from candle_mi_parity.errors import ParityError
from candle_mi_parity.hunt.bench import Answer, Bench, Found
from candle_mi_parity.hunt.genes import PLAIN_TOKENS, Genes, case_of, conditions_of
from candle_mi_parity.judge.known import known_divergence
from candle_mi_parity.judge.search import search
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import Explanations, proposed

MOST = 120
"""Largest number of inputs that are judged to shrink one."""


def smallest(judge: Callable[[Genes], Answer], genes: Genes, answer: Answer) -> tuple[Genes, Answer]:
    """The smallest genes that are judged as ``genes`` were, each step keeping the signature, and their answer."""
    left = MOST
    changed = True
    while changed:
        changed = False
        for fewer in _fewer(genes):
            if left <= 0:
                return genes, answer
            left -= 1
            found = judge(fewer)
            if found.signature == answer.signature and found.key == answer.key:
                genes, answer, changed = fewer, found, True
                break
    return genes, answer


def _fewer(genes: Genes) -> Iterator[Genes]:
    """Smaller genes: without one, with a smaller block, with fewer positions of an edit, with fewer tokens."""
    for slot in genes:
        if slot != "tokens":
            yield {name: value for name, value in genes.items() if name != slot}
    for slot, value in genes.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
            for key in value[1]:
                yield genes | {slot: ["set", {name: held for name, held in value[1].items() if name != key}]}
        if slot.startswith("edit.") and len(places := value.get("at", [])) > 1:
            yield from (
                genes | {slot: value | {"at": [each for each in places if each != place]}} for place in places
            )
    if fed := genes.get("recurrent", {}).get("feedback"):
        yield genes | {"recurrent": genes["recurrent"] | {"feedback": fed[1:]}}
    yield from _fewer_tokens(genes)


def _fewer_tokens(genes: Genes) -> Iterator[Genes]:
    tokens = genes.get("tokens", PLAIN_TOKENS)
    if isinstance(tokens, list):
        yield genes | {"tokens": {"random": len(tokens)}}
        return
    if "batch" in tokens or "seed" in tokens:
        yield genes | {"tokens": {"random": tokens["random"]}}
    # Half of them fewer, a quarter fewer, … one fewer: a length that matters is found in about log² steps.
    count, step = tokens["random"], tokens["random"] // 2
    while step:
        yield genes | {"tokens": tokens | {"random": count - step}}
        step //= 2


def cause_of(
    bench: Bench,
    family: str,
    genes: Genes,
    answer: Answer,
    found: Sequence[Found],
    table: Explanations,
    cache: Path,
    seconds: float,
) -> Cause:
    """Shrink a new divergence and search its explanation.

    :param seconds: time limit of the search.
    """
    genes, answer = smallest(lambda fewer: bench.judge(family, fewer, found), genes, answer)
    cause = as_drawn(family, genes, answer)
    if answer.kind == "new" and answer.reason != "overlap" and seconds > 0:
        with bench.cleared():
            _explain(cause, bench, family, genes, table, cache, seconds)
    return cause


def as_drawn(family: str, genes: Genes, answer: Answer) -> Cause:
    """The cause with these genes, neither shrunk nor explained."""
    row = case_of(family, genes).model_dump(mode="json", exclude_defaults=True, exclude={"unmeasured", "stored"})
    return Cause("forward", family, answer.first, answer.reason, answer.detail, row, genes=genes)


def _explain(
    cause: Cause, bench: Bench, family: str, genes: Genes, table: Explanations, cache: Path, seconds: float
) -> None:
    """Record what the candidate computes instead, if the search finds it."""
    try:
        result, evidence = bench.evidence(family, genes)
        if bench.source.identity is not None:
            known = known_divergence(evidence, table, bench.source.identity)
            result.unexplained = getattr(known, "why", "")
        search(result, evidence, table, cache, [], seconds)
    except ParityError as error:
        cause.detail = f"{cause.detail}; no search: {error}"
        return
    if result.explained is None:
        cause.detail = f"{cause.detail}; {result.unexplained}"
    else:
        cause.explained = result.explained.change
        if key := result.explained.key:
            cause.change = json.loads(key)
            release = bench.source.identity.version if bench.source.identity is not None else ""
            change = Counterfactual.model_validate_json(key)
            cause.proposed = proposed(change, family, release, table, conditions_of(genes))
