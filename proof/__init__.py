"""Proof that the suite sees what it should: planted faults, and how small one may be. No part of the wheel."""

from candle_mi_parity.spec.paths import ROOT

OUT = ROOT / "build" / "proof"
