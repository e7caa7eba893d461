"""Text from a trace, a checkpoint or an error, made safe to show: a terminal obeys what it is printed."""

from __future__ import annotations


def printable(text: str) -> str:
    """Control characters, escapes and text-direction marks are spelt out (``\\x1b``); a newline stays one."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = 300) -> str:
    """The same on one line, cut where it is long."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"
