"""Which instances of a parametrised test `make test` runs."""

from collections import Counter

import pytest


@pytest.hookimpl(tryfirst=True)  # before `-m "not thorough"` is read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``every(n)``, each instance but the first of n is ``thorough``."""
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("every"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.thorough)
            seen[test] += 1
