"""Summaries of an SAE's decisions (:class:`SaeView`): evidence for a reader; the verdict is the gate's."""

from __future__ import annotations

import numpy as np

from candle_mi_parity.compare.compare_sae import decisions, flips
from candle_mi_parity.compare.sae_view import Flip, Ranked, SaeView
from candle_mi_parity.compare.tensor_result import selected
from candle_mi_parity.trace.trace import Emitted, Selection
from candle_mi_parity.trace.truth import Truth

SHOWN = 20
"""Flips and ranks that are listed."""


def summarize_saes(truth: Truth, trace: Emitted) -> list[SaeView]:
    """One view for each chain whose features the trace holds in the truth's shape.

    :raises TraceError: the bytes of a tensor are not those that the trace declares.
    """
    views = []
    for chain, whole in truth.sae.items():
        entry = trace.entries.get(f"{chain}.features")
        if entry is None:
            continue
        pre, decided = selected(whole.pre.value, entry.part), decisions(whole).part(entry.part)
        got = trace.tensor(entry.name).astype(np.float64)
        if got.shape != pre.shape or not np.isfinite(got).all():
            continue  # the comparison reports it
        found = flips(decided, got)
        over = found.ratio
        flipped = np.argwhere(found.excused | found.unexcused)
        order = sorted(map(tuple, flipped.tolist()), key=lambda index: -over[index])
        mse_expected, mse_noise = truth.scalars[f"{chain}.reconstruction_mse"]
        listed = [
            Flip(
                index=_in_whole(index, entry.part),
                got=float(got[index]),
                pre=float(pre[index]),
                margin=float(decided.margin[index]),
                over_noise=float(over[index]),
                excused=bool(found.excused[index]),
            )
            for index in order[:SHOWN]
        ]
        views.append(
            SaeView(
                chain=chain,
                active_got=int(found.active.sum()),
                active_expected=int(decided.active.sum()),
                flipped=len(order),
                flips=listed,
                mse_got=trace.scalars.get(f"{chain}.reconstruction_mse"),
                mse_expected=mse_expected,
                mse_noise=mse_noise,
                top=_ranks(truth, trace) if chain == "sae" else [],
            )
        )
    return views


def _in_whole(index: tuple[int, ...], part: Selection | None) -> list[int]:
    """Where an element of a stored part is in the whole tensor."""
    if part is None:
        return list(index)
    *batch, row, column = index
    return [*batch, part.rows[row], column if part.columns is None else part.columns[column]]


def _ranks(truth: Truth, trace: Emitted) -> list[Ranked]:
    """The last position's strongest features, as many as the candidate lists."""
    value = truth.tensors["sae.features"].value[0, -1]
    theirs = [(feature.index, feature.value) for feature in trace.top_features[:SHOWN]]
    strongest = np.argsort(-value, kind="stable")[: max(len(theirs), 1)]
    ours = [(int(index), float(value[index])) for index in strongest if value[index] > 0]
    return [
        Ranked(ours[rank] if rank < len(ours) else None, theirs[rank] if rank < len(theirs) else None)
        for rank in range(max(len(ours), len(theirs)))
    ]
