"""Comparing a generated dump: time and peak memory, each in a process of its own, beside numpy and torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.trace.trace import FORMAT, Trace
from candle_mi_parity.trace.truth import Expected, Truth, TruthTensor

WIDTH = 512
NOISE = 1e-7
Arm = Callable[[Path], None]


@dataclass(frozen=True)
class Cost:
    """One arm on one dump.

    :ivar seconds: the best of the rounds.
    :ivar allocated: peak of what Python and numpy allocated, bytes.
    :ivar resident: growth of the process's peak resident memory, bytes, files that are mapped included.
    """

    seconds: float
    allocated: int
    resident: int


def generate(directory: Path, tensors: int, tensor_bytes: int) -> int:
    """A truth and an honest trace of it.

    :param tensor_bytes: of each tensor in float32, [1, T, :data:`WIDTH`].
    :returns: the size of the largest tensor in the dump, bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (1, max(1, tensor_bytes // (4 * WIDTH)), WIDTH)
    value = rng.standard_normal(shape)
    got = (value + NOISE * rng.standard_normal(shape)).astype(np.float32)
    noise = np.full(shape, NOISE, np.float32)
    names = [f"blocks.{i}.hook_resid_post" for i in range(tensors)]
    expected: dict[str, Expected] = {name: TruthTensor(value, noise) for name in names}
    Truth([[1]], expected, meta={"mode": "free"}).save(directory / "truth.safetensors")
    save_file(dict.fromkeys(names, got), directory / "trace.safetensors")
    digest = hashlib.sha256(got.tobytes()).hexdigest()
    entry = {"shape": list(shape), "dtype": "float32", "sha256": digest, "nonfinite": 0, "file": "trace.safetensors"}
    header: dict[str, object] = {
        "emitter": "bench", "candle": "none", "features": [], "device": "cpu", "dtype": "float32",
        "candle_mi": {"version": "0", "source": "path", "checksum": None, "revision": None, "tree_digest": None},
        "case": {"id": "bench", "digest": "0" * 64}, "model_digest": "0" * 64, "sae_digest": None,
        "inputs_digest": None,
    }  # fmt: skip
    document = {
        "format": FORMAT, "header": header, "tokens": [[1]], "scalars": {}, "top_features_last_pos": [],
        "run": {"started": "", "seconds": {}, "threads": 1, "peak_rss_bytes": None},
        "tensors": [entry | {"name": name, "key": name} for name in names],
    }  # fmt: skip
    (directory / "trace.json").write_text(json.dumps(document), encoding="utf-8")
    file_digest(directory / "trace.safetensors")  # in the page cache for every arm alike
    return got.nbytes


def ours(directory: Path) -> None:
    truth, trace = Truth.load(directory / "truth.safetensors"), Trace(directory / "trace.json")
    results = compare(truth, trace, None, None)
    if not results or any(result.status is not Status.PASS for result in results):
        raise AssertionError(f"an honest dump did not pass: {[result.message() for result in results][:1]}")


def load_everything(directory: Path) -> None:
    """The reader that the memory figure is to catch: every tensor of both sides at once."""
    truth, trace = Truth.load(directory / "truth.safetensors"), Trace(directory / "trace.json")
    held = [(trace.tensor(name), expected.value, expected.noise) for name, expected in truth.tensors.items()]
    assert all(np.allclose(got, value, rtol=0, atol=1e-5) for got, value, _ in held)


def allclose(directory: Path) -> None:
    """numpy: read a tensor of each side, compare, go on."""
    truth, trace = (directory / f"{name}.safetensors" for name in ("truth", "trace"))
    with safe_open(trace, framework="numpy") as got, safe_open(truth, framework="numpy") as expected:
        for name in got.keys():  # noqa: SIM118 -- not a mapping
            assert np.allclose(got.get_tensor(name), expected.get_tensor(f"{name}|value"), rtol=0, atol=1e-5)


def assert_close(directory: Path) -> None:
    """torch: the same, in float64 as its dtype check asks."""
    import torch

    truth, trace = (directory / f"{name}.safetensors" for name in ("truth", "trace"))
    with safe_open(trace, framework="pt") as got, safe_open(truth, framework="pt") as expected:
        for name in got.keys():  # noqa: SIM118 -- not a mapping
            value = expected.get_tensor(f"{name}|value")
            torch.testing.assert_close(got.get_tensor(name).double(), value, rtol=0, atol=1e-5)


ARMS: dict[str, Arm] = {arm.__name__: arm for arm in (ours, allclose, assert_close, load_everything)}


def costs(directory: Path, arms: list[str], rounds: int = 3) -> dict[str, Cost]:
    """Time the arms in turn, so that a load on the machine meets all of them, then each one's memory."""
    seconds = dict.fromkeys(arms, math.inf)
    for _ in range(rounds):
        for arm in arms:
            seconds[arm] = min(seconds[arm], _apart(directory, arm, "time")["seconds"])
    memory = {arm: _apart(directory, arm, "memory") for arm in arms}
    return {arm: Cost(seconds[arm], int(memory[arm]["allocated"]), int(memory[arm]["resident"])) for arm in arms}


def _apart(directory: Path, arm: str, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "proof.bench_dump", str(directory), arm, what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # numpy's comparison has one thread
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(directory: Path, arm: str, what: str) -> dict[str, float]:
    """Inside the process: what one arm costs."""
    run = ARMS[arm]
    if what == "time":
        run(directory)  # its first run imports and maps
        started = time.perf_counter()
        run(directory)
        return {"seconds": time.perf_counter() - started}
    import torch  # noqa: F401 -- no arm's memory, though one imports it

    before = _reset_peak()
    run(directory)
    resident = _resident("VmHWM") - before
    tracemalloc.start()
    run(directory)
    return {"allocated": tracemalloc.get_traced_memory()[1], "resident": resident}


def _reset_peak() -> int:
    """Resident bytes now, from which the peak is counted; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
