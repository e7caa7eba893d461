"""candle-mi-parity: does candle-mi compute what PyTorch/transformers computes?

Read in the order in which data flows: :mod:`cases` (the table) → :mod:`models` and :mod:`sae` (what a case
runs on) → :mod:`rounding` and :mod:`oracle` (float64 truth and its predicted rounding noise) →
:mod:`candidate` and :mod:`trace` (what candle-mi emitted) → :mod:`compare` → :mod:`ledger` → :mod:`report`.
"""

__version__ = "0.1.0"
