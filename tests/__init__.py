"""Tests: the cases against every candidate, and in ``harness`` the suite itself."""
