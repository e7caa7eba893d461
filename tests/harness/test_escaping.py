"""Names that attack the views: no control character is printed, and no page gets a tag or a handler."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from candle_mi_parity.compare.verdict import Status, TensorResult, Worst
from candle_mi_parity.files.escape import one_line, printable, templates
from candle_mi_parity.report import check_page, diff_views, history, hunt_page, hunt_tables, page, tables, views_ci
from candle_mi_parity.repro.write import code_cell
from tests.support.results import HOSTILE, a_history, a_hunt, a_report, checked, differing, shown

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
TEXTS = """slug case command version title model_type torch transformers tensor dtype candle_dtype heads element_gate
position_gate samples imports watched module value extra lines settings unusual pretrained
was_pretrained stands_for full_attention named plain oracle"""
WORST = Worst.of([0], 1.0, 2.0, 0.5, 2.0)
OTHERS: dict[str, Any] = {
    "edits": [], "in_attention": [], "tokens": [1], "shape": [1, 1], "differing": [(HOSTILE, HOSTILE, HOSTILE)],
    "first": TensorResult(HOSTILE, Status.FAIL, worst=WORST, detail=HOSTILE), "side": "input",
    "config": {"num_hidden_layers": HOSTILE, "hidden_size": HOSTILE}, "json": str, "one_line": one_line,
    "recurrent": None, "rwkv": False, "writes": {0: [HOSTILE]},
    "sae": SimpleNamespace(hook=HOSTILE, cfg={"dtype": HOSTILE}),
    "encoder": SimpleNamespace(normalize="layer_norm", centred=True, by_decoder_norm=True, k=HOSTILE, threshold=[]),
}  # fmt: skip


def reproduced(name: str, **known: str) -> Callable[[], str]:
    """A file of a reproduction with the hostile text in every place that is not known."""
    given = dict.fromkeys(TEXTS.split(), HOSTILE) | OTHERS | known
    return lambda: templates(html=False).get_template(f"{name}.j2").render(given)


PAGES: dict[str, Callable[[], str]] = {
    "report.html": lambda: page.render(a_report()),
    "diff.html": lambda: diff_views.page(differing()),
    "history.html": lambda: history.page(a_history()),
    "check.html": lambda: check_page.page(checked()),
    "hunt.html": lambda: hunt_page.hunt_page(a_hunt()),
}
VIEWS: dict[str, Callable[[], str]] = {
    **PAGES,
    "terminal of run": lambda: shown(partial(tables.run_tables, a_report()), 200),
    "terminal of diff": lambda: shown(partial(diff_views.terminal, differing()), 200),
    "terminal of hunt": lambda: shown(lambda console: hunt_tables.hunt_tables(a_hunt(), console, Path("out")), 200),
    "junit.xml": lambda: views_ci.junit(a_report()),
    "summary.md": lambda: views_ci.summary(a_report()),
    "annotations": lambda: "\n".join(views_ci.workflow_commands(a_report())),
    **{name: reproduced(name) for name in ("ISSUE.md", "test.rs", "check.py", "Cargo.toml")},
    "check_rwkv.py": reproduced("check_rwkv.py", model_type="rwkv6"),
}


HARMFUL = re.compile(
    r'<(?:script|iframe|object|embed|link|base)\b|<[^>]*\s(?:on\w+|srcdoc)=|\b(?:href|src|action)="(?!#|data:image/png;base64,|causes/\d+/ISSUE\.md")'
)
"""Tags that execute or load something, handlers, and addresses outside the page and its reproductions."""


def harm_in(name: str, text: str) -> list[str]:
    """Control characters in a view, and in a page what is harmful and any other policy."""
    found = [f"sends {c!a}" for c in sorted({c for c in text if not c.isprintable() and c not in "\n\t"})]
    if name in PAGES:
        policies = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"', text)
        found += HARMFUL.findall(text) + ([] if policies == [POLICY] else [f"its policies are {policies}"])
    return found


@pytest.mark.parametrize("name", VIEWS)
def test_a_hostile_name_does_no_harm(name: str) -> None:
    text = VIEWS[name]()
    assert "owned" in text, "the hostile name is not shown, so that nothing is tested"
    assert not harm_in(name, text)
    assert harm_in(name, text + HOSTILE)


@pytest.mark.parametrize("text", ["a`b", "a|b", "a\nb", HOSTILE])
def test_a_cell_of_a_markdown_table_stays_one_cell(text: str) -> None:
    cell = code_cell(text)
    assert "`" not in cell and "\n" not in cell and not re.search(r"(?<!\\)\|", cell)
    assert printable(cell) == cell
