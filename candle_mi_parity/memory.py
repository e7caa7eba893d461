"""How much memory there is to take."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory_bytes() -> int:
    """What the machine has, or what its control group or the limit set on this process leaves of that.

    Not what is free just now: on the same machine the same is done.
    """
    there = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = _CGROUP.read_text().strip() if _CGROUP.is_file() else ""
    there += [int(group)] if group.isdigit() else []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min([*there, *([] if limit == resource.RLIM_INFINITY else [limit])])
