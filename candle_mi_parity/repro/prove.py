"""The proof of a reproduction: its Rust test is compiled and run, on the diverging candle-mi and on a fixed one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.cargo import condense
from candle_mi_parity.candidate.spelling import Candidate, CandidateError
from candle_mi_parity.repro.crate import dependencies, write_crate

TIMEOUT_SECONDS = 1800
DIFFERS = "differs from PyTorch"
"""Part of the message of the test's assertion, and of no other failure in it."""


class TestOutcome(StrEnum):
    """Result of one test; BROKEN: it failed before it compared anything, for example because a file is missing."""

    __test__ = False  # pytest must not collect it

    PASSES = "passes"
    DIFFERS = "differs"
    BROKEN = "broken"


def prove(tests: Sequence[Path], candidate: Candidate, cache: Path) -> dict[str, TestOutcome]:
    """Run the tests of all folders as modules of one crate, so that the dependencies are linked once.

    :param tests: ``tests/parity_<case>.rs`` of each folder, with its data beside it.
    :returns: file stem → outcome.
    :raises CandidateError: cargo cannot build the crate, or a test was not run.
    """
    needed = dependencies(candidate, cache)
    spelt = hashlib.sha256(f"{candidate.kind}:{candidate.target}".encode()).hexdigest()[:8]
    crate = cache / "crates" / f"repro-{spelt}"
    target = needed.target
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(target.suffix + ".lock")):
        _lay_out(crate, tests)
        write_crate(crate, needed, extra='\n[[test]]\nname = "parity"\npath = "tests/all.rs"\n')
        command = ["cargo", "test", "--release", "--manifest-path", str(crate / "Cargo.toml"), "--test", "parity"]
        environment = {**os.environ, "CARGO_TARGET_DIR": str(target), "CARGO_TERM_COLOR": "never"}
        environment.pop("CARGO_BUILD_TARGET", None)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
        except FileNotFoundError:
            raise CandidateError("no cargo on PATH: install a Rust toolchain, see rustup.rs") from None
        except subprocess.TimeoutExpired:
            raise CandidateError(f"cargo test did not end within {TIMEOUT_SECONDS} s") from None
    outcomes = read_outcomes(done.stdout)
    if missing := [path.stem for path in tests if path.stem not in outcomes]:
        raise CandidateError(f"{missing[0]} was not run: {condense(done.stderr.splitlines())}")
    return outcomes


def read_outcomes(output: str) -> dict[str, TestOutcome]:
    """Module → outcome, from the output of libtest."""
    messages = dict(re.findall(r"^---- (\w+)::\w+ stdout ----\n(.*?)(?=^---- |\Z)", output, re.MULTILINE | re.DOTALL))
    outcomes = {}
    for name, word in re.findall(r"^test (\w+)::\w+ \.\.\. (ok|FAILED)$", output, re.MULTILINE):
        differs = TestOutcome.DIFFERS if DIFFERS in messages.get(name, "") else TestOutcome.BROKEN
        outcomes[name] = TestOutcome.PASSES if word == "ok" else differs
    return outcomes


def _lay_out(crate: Path, tests: Sequence[Path]) -> None:
    shutil.rmtree(crate / "tests", ignore_errors=True)
    (crate / "tests").mkdir(parents=True)
    for path in tests:
        shutil.copy(path, crate / "tests")
        shutil.copytree(path.with_suffix(""), crate / "tests" / path.stem)
    modules = "".join(f"mod {path.stem};\n" for path in tests)
    (crate / "tests" / "all.rs").write_text(modules, encoding="utf-8")
