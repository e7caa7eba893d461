"""Which divergences ``repro`` can show with a Rust test, as far as the case and its first tensor tell."""

from __future__ import annotations

from candle_mi_parity.compare.verdict import TOKENS
from candle_mi_parity.spec.cases import Case, SaeFile, ScopeSae
from candle_mi_parity.spec.edits import Inject, Knockout, Scale, StateKnockout, StateSteer, Steer

_SCALED = ("attn.hook_scores", "attn.hook_pattern")
_ANYWHERE = (Knockout, Steer, StateKnockout, StateSteer)


def not_reproducible(case: Case, first: str = "") -> str:
    """Why ``repro`` does not take a divergence, as a sentence without its full stop; empty if it may.

    :param first: the first diverging tensor; empty where it is not known yet.
    """
    if first == TOKENS:
        return "the token ids differ, and the Rust test is given token ids; compare the tokenizers on the case's text"
    if other := [feature for feature in case.features if feature not in ("quantized", "mmap", "rwkv")]:
        return f"no Rust test is written for a model of candle-mi's feature {other[0]}"
    for edit in case.edits:
        at = {Scale: _SCALED, Inject: ("hook_resid_post",)}.get(type(edit), ())
        if "rwkv" in case.features and isinstance(edit, Scale):
            at = ("",)  # its script runs the layers one by one
        if not (isinstance(edit, _ANYWHERE) or (at and edit.hook.endswith(at))):
            return f"no Rust test is written for {edit.kind} at {edit.hook}"
    # An SAE that the divergence does not touch stays out of the reproduction.
    if first.startswith("sae.") or any(isinstance(edit, Inject) for edit in case.edits):
        if isinstance(case.sae, SaeFile):
            return f"only a generated SAE can be made smaller, and {case.sae.path} is a file"
        if isinstance(case.sae, ScopeSae):
            return "an SAE in Gemma Scope's layout cannot be made smaller"
    return ""
