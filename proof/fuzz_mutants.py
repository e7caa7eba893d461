"""Mutations: of bytes, of a JSON tree, of an array. Each draws from a seeded generator and from nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np

ODD_BYTES = [b"\x00", b"\xff", b"[", b"{", b"}", b'"', b"\\", b"-", b"1e999", b"NaN", b"\x1b[2J", b"../", b"9" * 40]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**400, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), 0.5, "", "x", "\x1b[2J\x07", "../trace.safetensors", "/dev/zero", "~nobody/x"),
    *("\ud800", "\x00", "a" * 5000, "<script>", [], {}, [[]], [None], {"a": {}}, [2**62] * 9, "0" * 64, "float64"),
]


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """One to four changes anywhere."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(BYTE_CHANGES)(rng, data)
    return bytes(data)


def _span(rng: Random, data: bytearray) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + rng.choice((1, 1, 2, 8, 64, 1000))))


def _flip(rng: Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _delete(rng: Random, data: bytearray) -> None:
    del data[_span(rng, data)]


def _double(rng: Random, data: bytearray) -> None:
    span = _span(rng, data)
    data[span.stop : span.stop] = data[span]


def _insert(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.choice(ODD_BYTES), rng.randbytes(rng.randrange(1, 9))))


def _overwrite(rng: Random, data: bytearray) -> None:
    span = _span(rng, data)
    data[span] = rng.randbytes(span.stop - span.start)


def _cut(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _move(rng: Random, data: bytearray) -> None:
    span = _span(rng, data)
    piece = bytes(data[span])
    del data[span]
    at = rng.randrange(len(data) + 1)
    data[at:at] = piece


def _digit(rng: Random, data: bytearray) -> None:
    places = [i for i, byte in enumerate(data[:20000]) if 48 <= byte <= 57]
    if places:
        data[rng.choice(places)] = 48 + rng.randrange(10)


BYTE_CHANGES: list[Callable[[Random, bytearray], None]] = [
    _flip, _delete, _double, _insert, _overwrite, _cut, _move, _digit,
]  # fmt: skip

Place = tuple[Any, Any]
"""A container and the key or index of a value in it."""


def places(tree: Any) -> Iterator[Place]:
    """Every value of a tree but its root."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    for key in keys:
        yield tree, key
        yield from places(tree[key])


def mutate_tree(rng: Random, tree: Any) -> Any:
    """A copy with one to three values changed."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        there = list(places(changed))
        if there:
            rng.choice(TREE_CHANGES)(rng, there, *rng.choice(there))
    return changed


def _remove(_rng: Random, _there: list[Place], holder: Any, key: Any) -> None:
    del holder[key]


def _replace(rng: Random, _there: list[Place], holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def _other(rng: Random, there: list[Place], holder: Any, key: Any) -> None:
    from_holder, from_key = rng.choice(there)
    holder[key] = copy.deepcopy(from_holder[from_key])


def _add(rng: Random, there: list[Place], holder: Any, key: Any) -> None:
    value = copy.deepcopy(rng.choice([holder[key], rng.choice(ODD_VALUES)]))
    if isinstance(holder, list):
        holder.insert(key, value)
    else:
        holder[rng.choice([f"{key}x", "odd", "\x1b[31m", *(str(k) for _, k in there[:20])])] = value


def _nudge(rng: Random, _there: list[Place], holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(min(value, 2**1000)), str(value)])
    elif isinstance(value, float):
        holder[key] = value * (1 + rng.choice((-1, 1)) * 10 ** rng.uniform(-12, 3))
    elif isinstance(value, str) and value:
        at = rng.randrange(len(value))
        holder[key] = value[:at] + rng.choice(["", "x", "\n", "\u202e", value[at] * 2]) + value[at + 1 :]
    elif isinstance(value, list):
        rng.shuffle(value)


def _nest(rng: Random, _there: list[Place], holder: Any, key: Any) -> None:
    for _ in range(rng.choice((1, 1, 50, 300))):
        holder[key] = [holder[key]]


TREE_CHANGES: list[Callable[[Random, list[Place], Any, Any], None]] = [
    _remove, _replace, _replace, _other, _add, _nudge, _nudge, _nest,
]  # fmt: skip


def dumped(tree: Any) -> bytes:
    """As JSON, with NaN and lone surrogates where the tree has them."""
    return json.dumps(tree).encode("ascii")


def mutate_array(rng: Random, array: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Values, axes, extent or dtype."""
    change = rng.choice(ARRAY_CHANGES)
    return np.ascontiguousarray(change(rng, array.copy(), others))


def _scaled(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    factor = array.dtype.type(1 + rng.choice((-1, 1)) * 10 ** rng.uniform(-9, 1))
    return np.asarray(array * factor, array.dtype)


def _element(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    flat = array.reshape(-1)
    at = rng.randrange(flat.size)
    value = float(flat[at])
    with np.errstate(over="ignore"):
        flat[at] = rng.choice(
            [0.0, -value, value * (1 + 10 ** rng.uniform(-9, 2)), float("nan"), float("inf"), -float("inf"), 1e-30]
        )
    return array


def _noisy(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    draws = np.random.default_rng(rng.getrandbits(32)).standard_normal(array.shape)
    return (array * (1 + 10 ** rng.uniform(-10, 0) * draws)).astype(array.dtype)


def _turned(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    a, b = rng.randrange(array.ndim), rng.randrange(array.ndim)
    return array.swapaxes(a, b)


def _rolled(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    return np.roll(array, rng.choice((-1, 1)), axis=rng.randrange(array.ndim))


def _shorter(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    axis = rng.randrange(array.ndim)
    return np.take(array, range(rng.randrange(array.shape[axis] + 1)), axis)


def _reshaped(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    return array.reshape(rng.choice([(-1,), (*array.shape, 1), (1, *array.shape), array.shape[::-1]]))


def _recast(rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(array.astype(rng.choice([np.float16, np.float32, np.float64])))


def _rounded(_rng: Random, array: np.ndarray, _others: list[np.ndarray]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(np.float16).astype(array.dtype)


def _swapped(rng: Random, _array: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    return np.asarray(rng.choice(others)).copy()


ARRAY_CHANGES: list[Callable[[Random, np.ndarray, list[np.ndarray]], np.ndarray]] = [
    _scaled, _scaled, _element, _element, _noisy, _turned, _rolled, _shorter, _reshaped, _recast, _rounded, _swapped,
]  # fmt: skip
