"""The memory, disk space and time that a check needs, estimated before it starts."""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.untrusted import memory_bytes
from candle_mi_parity.models.checkpoint import read_config, weight_bytes
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.oracle import Oracle

SAMPLES, BATCH = 16, 160
"""Samples of the noise, and rows × tokens of one pass of them, see :func:`candle_mi_parity.oracle.compute.sample`."""
PER_SECOND, PER_ELEMENT, FIXED = 2e10, 4e-8, 3.0
"""Float64 operations a second on two cores, with noise; the seconds that a number of a hook point takes in each pass,
which is what a long prompt's attention costs; the fixed cost of a truth in seconds: measured."""


def plan(subjects: list[PreparedCase], cache: Path, device: str, steps: int) -> str:
    """Estimates of time, memory and disk in one line, good to a factor of two.

    :param steps: tokens that are generated for each prompt.
    :raises ModelError: the machine has too little memory.
    """
    directory = subjects[0].model_dir
    todo = [s for s in subjects if not (cache / "truth" / Oracle(s, cache, device).key / "free").is_dir()]
    parameters = weight_bytes(directory, 1)
    streamed = bool(todo) and _is_streamed(directory)
    elements = [_elements(subject, steps) for subject in todo]
    tokens = [len(subject.tokens[0]) + steps for subject in todo]
    widest = max(elements, default=0) * 8 * (3 + min(SAMPLES, max(1, BATCH // max(tokens, default=1))))
    memory = 4 * parameters + (parameters if streamed else 8 * parameters) * bool(todo) + widest
    if memory > memory_bytes():
        raise ModelError(
            f"{directory}: needs about {size(memory)} of memory, and this machine has {size(memory_bytes())}: "
            "use shorter prompts or a larger machine"
        )
    # A prompt and its continuation have a truth each.
    passes = sum((1 + SAMPLES + steps) * count for count in tokens) * (2 if steps else 1)
    seconds = 2 * parameters * passes / PER_SECOND + FIXED * (len(todo) + 1)
    seconds += PER_ELEMENT * sum(elements) * (1 + SAMPLES)
    time = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    how = " and their continuations" * bool(steps) + ", layer by layer" * streamed
    return (
        f"truths to compute: {len(todo)}{how} ({len(subjects) - len(todo)} more are in the cache), about {time}, "
        f"memory {size(memory)}, disk {size(12 * sum(elements))}"
    )


def _is_streamed(directory: Path) -> bool:
    from candle_mi_parity.oracle.streaming import is_streamed  # imports torch, which a cached truth does not need

    return is_streamed(directory)


def _elements(subject: PreparedCase, steps: int) -> int:
    """Numbers in all tensors of a prompt."""
    config = {key: value for key, value in read_config(subject.model_dir).items() if type(value) is int}
    tokens = len(subject.tokens[0]) + steps
    width, heads = config["hidden_size"], config.get("num_attention_heads", 1)
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    layer = tokens * 9 * int(width) + 2 * int(heads) * tokens * tokens + int(vocabulary)
    return int(layers) * layer + tokens * int(vocabulary)


def size(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
