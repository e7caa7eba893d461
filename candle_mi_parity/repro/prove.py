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
"""What the test's assertion says, and nothing else that can go wrong in it."""


class Outcome(StrEnum):
    """Of one test.

    ``BROKEN`` is a test that failed before it compared: a model that is refused, a file that is missing.
    """

    PASSES = "passes"
    DIFFERS = "differs"
    BROKEN = "broken"


def prove(tests: Sequence[Path], candidate: Candidate, cache: Path) -> dict[str, Outcome]:
    """Run the tests of many folders as modules of one crate: the dependencies are built and linked once.

    :param tests: ``tests/parity_<case>.rs`` of each folder, its data beside it.
    :returns: by the file's stem.
    :raises CandidateError: cargo cannot build it, or a test was not run.
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


def read_outcomes(output: str) -> dict[str, Outcome]:
    """By module, from the output of libtest."""
    said = dict(re.findall(r"^---- (\w+)::\w+ stdout ----\n(.*?)(?=^---- |\Z)", output, re.MULTILINE | re.DOTALL))
    outcomes = {}
    for name, word in re.findall(r"^test (\w+)::\w+ \.\.\. (ok|FAILED)$", output, re.MULTILINE):
        differs = Outcome.DIFFERS if DIFFERS in said.get(name, "") else Outcome.BROKEN
        outcomes[name] = Outcome.PASSES if word == "ok" else differs
    return outcomes


def _lay_out(crate: Path, tests: Sequence[Path]) -> None:
    shutil.rmtree(crate / "tests", ignore_errors=True)
    (crate / "tests").mkdir(parents=True)
    for path in tests:
        shutil.copy(path, crate / "tests")
        shutil.copytree(path.with_suffix(""), crate / "tests" / path.stem)
    modules = "".join(f"mod {path.stem};\n" for path in tests)
    (crate / "tests" / "all.rs").write_text(modules, encoding="utf-8")
