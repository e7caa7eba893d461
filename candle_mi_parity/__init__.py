"""candle-mi-parity: does candle-mi compute what PyTorch/transformers computes?

One sub-package for each layer, described in ``docs/architecture.md``; this module has what other programs call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from candle_mi_parity.compare.check_result import CheckResult

__version__ = "0.1.0"


def check(
    model: str | Path,
    prompt: str | Sequence[str] = (),
    tokens: Sequence[Sequence[int]] = (),
    sae: str | Path | None = None,
    edits: Sequence[dict[str, Any]] | str | Path = (),
    **options: Any,
) -> CheckResult:
    """Does a candle-mi compute PyTorch's numbers on a model? The Python of ``candle-mi-parity check``.

    >>> result = check("models/mine", prompt="The capital of France is", sae="saes/l12")  # doctest: +SKIP
    >>> assert result.agrees, result.sentence                                              # doctest: +SKIP

    :param model: a directory, or a hub id ``ID`` or ``ID@REVISION``.
    :param prompt: one text or several; with neither texts nor ``tokens``, a short built-in set.
    :param tokens: prompts as token ids.
    :param sae: an NPZ, a directory of SAELens, or ``REPO:FILE`` of the hub.
    :param edits: interventions, as rows of ``fixtures/cases.toml`` or a TOML file of them.
    :param options: further fields of :class:`candle_mi_parity.run.check.CheckOptions`: ``hook``, ``candidate``,
        ``trace``, ``dtype``, ``device``, ``hooks``, ``layers``, ``generate``, ``out``.
    :raises ParityError: an input that cannot be used, in one line.
    """
    from candle_mi_parity.run.check import CheckOptions
    from candle_mi_parity.run.check import check as run_check
    from candle_mi_parity.run.check_inputs import edits_of, prompts_of, read_edits

    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [",".join(str(token) for token in row) for row in tokens]
    rows = read_edits(Path(edits)) if isinstance(edits, str | Path) else edits_of(list(edits), "edits", Path())
    options |= {name: Path(options[name]) for name in ("trace", "out") if options.get(name)}
    prompts, where = tuple(prompts_of(texts, None, ids)), str(sae) if sae else None
    return run_check(CheckOptions(str(model), prompts, sae=where, edits=tuple(rows), **options))
