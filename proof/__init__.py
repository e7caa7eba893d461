"""Proof that the suite sees what it should: planted faults, and how small one may be. No part of the wheel."""
