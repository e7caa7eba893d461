"""Mistakes in candle-mi's source that a plain forward pass does not show: each fails a run, and is named."""

from collections import Counter
from pathlib import Path

import pytest

from candle_mi_parity.errors import HubError
from candle_mi_parity.models.tokenizers import load_tokenizers, tokenizer_directory
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import cache_root
from validation.mistakes import Seen, judge, load_mistakes

MISTAKES = {mistake.id: mistake for mistake in load_mistakes()}


@pytest.mark.rust
@pytest.mark.thorough
@pytest.mark.xdist_group("mistakes")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_a_run_and_is_named_in_its_last_lines(tmp_path: Path, name: str) -> None:
    """One that cannot be seen has to pass, so that a check which sees it is noticed."""
    if "tokens" in MISTAKES[name].only:
        try:
            for row in load_tokenizers().tokenizer:
                tokenizer_directory(row, cache_root())
        except HubError as error:
            pytest.skip(str(error))
    seen = judge(MISTAKES[name], tmp_path, everything=False)
    assert seen.as_expected, f"{seen.verdict}\n" + "\n".join(seen.last)


def test_the_mistakes_are_of_many_kinds_and_most_are_not_seen_in_a_plain_forward_pass() -> None:
    mistakes = list(MISTAKES.values())
    assert len(mistakes) >= 30 and max(Counter(mistake.kind for mistake in mistakes).values()) <= 3
    assert sum(not mistake.plain for mistake in mistakes) >= 20
    assert sum(bool(mistake.survives) for mistake in mistakes) <= 3
    ids = {case.id for case in load_cases()}
    for mistake in mistakes:
        assert mistake.cases or mistake.only
        assert not mistake.cases or mistake.at == "*" or mistake.at.removeprefix("forwards/") in ids


def seen(verdict: str, *last: str, survives: str = "") -> Seen:
    mistake = MISTAKES["token-ids-u16"].model_copy(update={"at": "a/b", "first": "logits", "survives": survives})
    return Seen(mistake, verdict, list(last))


def test_a_mistake_counts_only_when_one_line_names_its_case_and_tensor() -> None:
    line = "FAIL: a/b first at logits"
    assert seen("FAIL", "verdict", line).killed
    assert not seen("FAIL", "FAIL: a/b first at hook_embed", "FAIL: c/d first at logits").killed
    assert not seen("FAIL").killed
    for verdict in ("KNOWN", "ERROR", "INCONCLUSIVE", "it does not build"):
        assert not seen(verdict, line).killed


def test_a_survivor_that_is_seen_is_noticed() -> None:
    assert seen("KNOWN", survives="why").as_expected and seen("PASS", survives="why").as_expected
    for verdict in ("FAIL", "ERROR", "it does not build"):
        assert not seen(verdict, "FAIL: a/b first at logits", survives="why").as_expected
