"""The size of a difference in next tokens, in the stream at a hook, and in the logit lens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from candle_mi_parity.candidate.watched import Seen
from candle_mi_parity.compare.check_result import Continuation, LensRow, Matters
from candle_mi_parity.compare.gate import ELEMENT_GATE, UNITS, measure
from candle_mi_parity.files.chunks import positions
from candle_mi_parity.spec.hook_points import is_lens

Decode = Callable[[int], str]


def matters(seen: Seen, hooks: list[str]) -> Matters:
    """The measures of one prompt.

    :param hooks: where the relative difference is measured, if the candidate has the tensor.
    """
    relative, rounding = {}, {}
    for hook in hooks:
        expected = seen.truth.tensors.get(hook)
        if hook not in seen.emitted.entries or expected is None:
            continue
        got, value = seen.emitted.tensor(hook).astype(np.float64), expected.value
        size = float(np.linalg.norm(value))
        if got.shape != value.shape or not size:
            continue
        relative[hook] = float(np.linalg.norm(got - value)) / size
        rounding[hook] = float(np.linalg.norm(expected.noise.astype(np.float64))) / size
    kl, top1 = _next_tokens(seen)
    if not kl.size:
        return Matters(relative=relative, rounding=rounding)
    worst = int(np.argmax(kl))
    return Matters(kl.size, float(kl.mean()), float(kl[worst]), worst, top1, relative, rounding)


def _next_tokens(seen: Seen) -> tuple[np.ndarray, int]:
    """KL(truth ‖ candidate) in nats at each position, and the number of equal likeliest tokens.

    Empty and 0 where the candidate has no logits of this shape.
    """
    entry, expected = seen.emitted.entries.get("logits"), seen.truth.tensors["logits"]
    if entry is None or tuple(entry.shape) != expected.shape:
        return np.zeros(0), 0
    found, same = [], 0
    for rows in positions(entry.shape):
        got = seen.emitted.rows("logits", rows).astype(np.float64)
        value = expected.rows(rows).value if rows != slice(None) else expected.value
        with np.errstate(invalid="ignore"):  # NaN is judged elsewhere
            p, q = _log_softmax(value), _log_softmax(got)
            divergence = (np.exp(p) * (p - q)).sum(-1)
            found.append(np.maximum(divergence, 0.0).reshape(-1))  # rounding may take one of 0 below it
        same += int((value.argmax(-1) == got.argmax(-1)).sum())
    return np.concatenate(found), same


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def lens_rows(seen: Seen, decode: Decode, likeliest: Callable[[np.ndarray], list[list[int]]]) -> list[LensRow]:
    """The likeliest token at the last position after each layer, of PyTorch's own stream and of the candidate's.

    :param likeliest: streams [B, T, d] → tokens [B][T], through PyTorch's final norm and unembedding.
    """
    entries = seen.emitted.entries
    hooks = [name for name in seen.truth.tensors if is_lens(name) and name in entries and entries[name].part is None]
    if not hooks:
        return []
    expected = np.concatenate([seen.truth.tensors[name].value[:1, -1:] for name in hooks], axis=1)
    got = np.concatenate([seen.emitted.tensor(name)[:1, -1:] for name in hooks], axis=1)
    ours, theirs = likeliest(np.concatenate([expected, got]))
    return [LensRow(name, decode(a), decode(b)) for name, a, b in zip(hooks, ours, theirs, strict=True)]


def continuation(prompt: str, length: int, seen: Seen, decode: Decode) -> Continuation:
    """Where greedy continuations first differ.

    The candidate was given the prompt with PyTorch's continuation. Up to the first difference, its own greedy loop
    would have had the same input.

    :param length: tokens of the prompt.
    """
    tokens = seen.subject.tokens[0]
    expected = seen.truth.tensors["logits"]
    value, noise = expected.value[:, length - 1 : -1], expected.noise[:, length - 1 : -1]
    got = seen.emitted.tensor("logits").astype(np.float64)[:, length - 1 : -1]
    text = "".join(decode(token) for token in tokens[length:])
    parted = np.flatnonzero((value.argmax(-1) != got.argmax(-1))[0])
    if not parted.size:
        return Continuation(prompt, len(tokens) - length, text)
    step = int(parted[0])
    ours, theirs = int(value[0, step].argmax()), int(got[0, step].argmax())
    sigma = measure(np.zeros_like(value), value, noise, unit=UNITS[seen.subject.case.dtype]).sigma[0, step]
    margin = float(value[0, step, ours] - value[0, step, theirs])
    tie = margin < ELEMENT_GATE * float(sigma[ours] + sigma[theirs])
    texts = (decode(ours), decode(theirs))
    return Continuation(prompt, len(tokens) - length, text, step + 1, *texts, margin, bool(tie))
