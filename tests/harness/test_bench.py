"""What costs time and memory: a comparison needs one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof import bench, bench_dump


def honest_dump(directory: Path, tensors: int, tensor_bytes: int, arm: str) -> float:
    """Peak memory of a comparison, in units of the largest tensor."""
    largest = bench_dump.generate(directory, tensors, tensor_bytes)
    cost = bench_dump.costs(directory, [arm], rounds=1)[arm]
    return max(cost.allocated, cost.resident) / largest


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["ours", "load_everything"])
def test_a_dump_of_200_mb_is_compared_one_tensor_at_a_time(tmp_path: Path, arm: str) -> None:
    peak = honest_dump(tmp_path, 5, 40 << 20, arm)
    assert (peak < bench.PEAK) == (arm == "ours"), f"{arm} holds {peak:.1f} times the largest tensor"
