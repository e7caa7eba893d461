"""Does the suite see what it should, and nothing else? Seeded faults and false positives; no part of the wheel.

``python -m validation.faults`` and ``python -m validation.false_positives``.
"""
