"""Seeded faults: does the suite detect each, where it was planted? ``python -m validation.faults``."""
