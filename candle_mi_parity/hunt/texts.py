"""Hunt in texts: candle-mi's tokenizer against transformers' on generated texts, and the shortest that diverge."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.candidate.tokens import read_tokens, tokenize
from candle_mi_parity.compare.hunt_result import Cause, Tally
from candle_mi_parity.coverage.tokens_judge import KINDS, Answers, load_reference, tokenised
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.tokenizers import load_tokenizers
from candle_mi_parity.spec.explanations import baseline

Tokenizing = Callable[[list[str]], Answers]
"""Texts → the answers of a candidate by kind, None where it refuses."""
Signature = tuple[str, str]
"""The first kind of answer that differs, and in which way."""
BATCH = 500
"""Texts of one request: an emitter loads the tokenizer anew each time, which takes up to 1.4 s."""

_SPACES = " \t\n\r\v\f\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
_WORDS = (
    *("don't", "I'M", "we'll", "naïve", "Ångström", "ﬁn", "ǅ", "ß", "İstanbul", "Straße"),
    *(
        "日本語",
        "한국어",
        "中文字符",
        "ไทย",
        "हिन्दी",
        "العربية",
        "עברית",
        "Ελληνικά",
        "кириллица",
        "ქართული",
        "𝔘𝔫𝔦",
        "𐎠𐏃",
    ),
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "🇫🇷🇩🇪",
        "👍🏽",
        "☃️",
        "1️⃣",
        "e\u0301",
        "a\u0308\u0323",
        "\u1100\u1161\u11a8",
        "Z\u0351\u036b\u0343",
    ),
    *(
        "▁",
        "Ġ",
        "Ċ",
        "##",
        "</w>",
        "<0x41>",
        "<0xE2>",
        "\\n",
        "%20",
        "&amp;",
        "http://a.b/c?d=e#f",
        "snake_case",
        "x**2",
    ),
)
_DIGITS = "0123456789٣५߄９½²Ⅷ.,-+eE_"


def special_tokens(directory: Path) -> list[str]:
    """The contents of the added tokens in ``tokenizer.json``, at most 400 of them."""
    read = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    found = [token["content"] for token in read.get("added_tokens", []) if token["content"]]
    return found[:: max(1, len(found) // 400)]


def texts(specials: list[str]) -> SearchStrategy[str]:
    """Pieces of every kind that a tokenizer treats in its own way, one after the other."""
    pieces: list[SearchStrategy[str]] = [
        st.text(st.characters(codec="utf-8"), max_size=6),
        st.text(st.characters(codec="utf-8", min_codepoint=0x10000), min_size=1, max_size=3),
        st.text(st.characters(codec="utf-8", categories=["M", "Cf", "Cc"]), min_size=1, max_size=4),
        st.text(st.characters(codec="ascii"), min_size=1, max_size=12),
        st.text(_SPACES, min_size=1, max_size=6),
        st.text(_DIGITS, min_size=1, max_size=12),
        st.sampled_from(_WORDS),
        st.builds(
            lambda word, count: word * count,
            st.sampled_from(["a", "é", "漢", " ", "\n", "=", "0"]),
            st.integers(2, 300),
        ),
    ]
    if specials:
        token = st.sampled_from(specials)
        pieces += [
            token,
            token.map(lambda one: one[:-1]),
            st.builds(lambda one, by: one + by, token, st.sampled_from(_SPACES)),
        ]
    return st.lists(st.one_of(pieces), max_size=6).map("".join)


def generated(strategy: SearchStrategy[str], examples: int, seed: int) -> list[str]:
    """Texts of a strategy, the same for the same seed."""
    found: list[str] = []

    @seeded(seed)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(text: str) -> None:
        found.append(text)

    collect()
    return found[:examples]


def emitted(source: LiveSource, directory: Path, out: Path) -> Tokenizing:
    """candle-mi's tokenizer.

    :param out: the JSON file that the emitter writes.
    """
    digest = file_digest(directory / "tokenizer.json")

    def ask(batch: list[str]) -> Answers:
        tokens = read_tokens(tokenize(source.emitter, directory, batch, out))
        if tokens.candle_mi != source.identity or tokens.tokenizer_digest != digest:
            raise TraceError(f"{out}: the tokens are of another candle-mi or another tokenizer.json")
        return {kind: getattr(tokens, kind) for kind in KINDS}

    return ask


def known_of(name: str, version: str) -> str | None:
    """The id of what is known of a tokenizer in the release that a version is held to."""
    rows = load_tokenizers().known
    release = baseline(rows, version) if version else ""
    return next((row.id for row in rows if name in row.tokenizers and release in row.releases), None)


@dataclass
class _Hunt:
    """
    :ivar known: the id under which answers of ``tokenizer.json`` as it is written are known; None if they are not.
    """

    ask: Tokenizing
    name: str
    reference: Any
    written: Any
    known: str | None
    specials: list[str]
    already: dict[Signature, Cause]
    tally: Tally = field(default_factory=Tally)
    causes: list[Cause] = field(default_factory=list)

    def judge(self, batch: list[str]) -> list[tuple[Signature | None, str, bool]]:
        """For each text how it diverges, in words, and whether it is as ``tokenizer.json`` is written.

        :raises TraceError: not as many answers as texts.
        """
        got, right = self.ask(batch), tokenised(self.reference, batch)
        found: list[tuple[Signature | None, str, bool]] = []
        if any(len(got[kind]) != len(batch) for kind in KINDS):
            raise TraceError(f"{self.name}: {len(got[KINDS[0]])} texts were answered, expected {len(batch)}")
        for place, text in enumerate(batch):
            kind = next((kind for kind in KINDS if got[kind][place] != right[kind][place]), None)
            if kind is None:
                found.append((None, "", False))
                continue
            one = tokenised(self.written, [text])
            as_written = all(got[each][place] == one[each][0] for each in KINDS)
            reason = "refused" if got[kind][place] is None else "values"
            if any(special in text for special in self.specials):
                reason += ", a special token in the text"
            detail = f"gives {got[kind][place]!a}, expected {right[kind][place]!a}"
            found.append(((kind, reason), detail, as_written))
        return found

    def run(self, batch: list[str]) -> None:
        """Judge and count a batch, and shrink what is new in it."""
        for text, (signature, detail, as_written) in zip(batch, self.judge(batch), strict=True):
            self.tally.tried += 1
            if signature is None:
                self.tally.agree += 1
            elif as_written and self.known is not None:
                self.tally.known[self.known] = self.tally.known.get(self.known, 0) + 1
            elif (cause := self.already.get(signature)) is not None:
                cause.count += 1
            else:
                self._report(text, signature, detail, as_written)

    def _report(self, text: str, signature: Signature, detail: str, as_written: bool) -> None:
        """Reduce a text as long as it diverges in the same way, many candidates at once."""
        while True:
            smaller = list(reductions(text))
            for shorter, found in zip(smaller, self.judge(smaller), strict=True):
                if found[0] == signature and found[2] == as_written:
                    text, detail = shorter, found[1]
                    break
            else:
                break
        explained = "tokenizer.json as it is written" if as_written else ""
        self.causes.append(Cause("text", self.name, *signature, detail[:600], {"text": text}, explained))
        self.already[signature] = self.causes[-1]


def reductions(text: str) -> Iterator[str]:
    """Texts that are smaller than a text: parts left out, long ones first, and characters replaced by ``a``."""
    size = len(text) // 2
    while size >= 1:
        step = max(size, len(text) // 64, 1)
        for start in range(0, len(text), step):
            yield text[:start] + text[start + size :]
        size //= 2
    for place in range(min(len(text), 64)):
        if text[place] > "a" or text[place] < " ":
            yield f"{text[:place]}a{text[place + 1 :]}"


def hunt_texts(
    ask: Tokenizing,
    name: str,
    directory: Path,
    version: str,
    seed: int,
    examples: int,
    already: Collection[Cause] = (),
) -> tuple[Tally, list[Cause]]:
    """Tokenise generated texts, and shrink each new divergence.

    :param ask: the candidate, see :func:`emitted`.
    :param name: of the tokenizer in ``fixtures/tokenizers.toml``.
    :param directory: holds ``tokenizer.json`` and ``tokenizer_config.json``.
    :param version: the release whose known causes are subtracted; empty for none.
    :param examples: number of texts, without those that shrinking tries.
    :param already: causes that were found earlier, whose ``count`` grows.
    :raises ModelError: transformers cannot load the tokenizer.
    """
    reference, written = (load_reference(directory, as_written) for as_written in (False, True))
    specials = special_tokens(directory)
    earlier = {(cause.first, cause.reason): cause for cause in already if cause.what == name}
    hunt = _Hunt(ask, name, reference, written, known_of(name, version), specials, earlier)
    wanted = generated(texts(specials), examples, seed)
    for start in range(0, len(wanted), BATCH):
        hunt.run(wanted[start : start + BATCH])
    return hunt.tally, hunt.causes
