"""The modules of the emitter have no circular imports."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from candle_mi_parity.candidate.plan import EMITTER


def imports(source: Path) -> dict[str, set[str]]:
    """Module → the modules that its code names as ``crate::<module>``, without tests and comments."""
    found = {}
    for path in source.glob("*.rs"):
        if not path.stem.endswith(("_tests", "_fuzz")):
            code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            groups = re.findall(r"\bcrate::(?:(\w+)|\{([^}]*)\})", code)
            found[path.stem] = {
                name for single, group in groups for name in [single, *re.split(r"\W+", group)] if name
            }
    return found


def order(source: Path) -> list[str]:
    """The modules in an order in which each follows those that it imports.

    :raises CycleError: there is no such order.
    """
    return list(TopologicalSorter(imports(source)).static_order())


def test_no_import_is_circular() -> None:
    found = order(EMITTER / "src")
    assert set(found) == set(imports(EMITTER / "src")), "an imported module has no file"
    assert found.index("protocol") < found.index("request") < found.index("dispatch")


def test_a_circular_import_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a.rs").write_text("use crate::b::B;\n")
    (tmp_path / "b.rs").write_text("pub fn f() -> crate::c::C {}\n")
    (tmp_path / "c.rs").write_text("// crate::a\nuse std::fs;\n")
    assert order(tmp_path) == ["c", "b", "a"]
    (tmp_path / "c.rs").write_text("use crate::{a, b};\n")
    with pytest.raises(CycleError):
        order(tmp_path)
