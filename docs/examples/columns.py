"""Markdown tables of reports: several candidates side by side, or the divergences of one.

python docs/examples/columns.py torch/report.json transformer-lens/report.json 0.2.2/report.json
python docs/examples/columns.py transformer-lens/report.json
"""

import json
import sys
from collections import Counter
from pathlib import Path

WORDS = {"agrees": "agree", "diverges": "other numbers", "refused": "refused", "crashed": "crashed",
         "unmeasured": "not measured", "error": "not judged", "absent": "absent"}  # fmt: skip


def counts(report):
    """Family → how many cases have each outcome; what was not run is absent."""
    found = {}
    for case in report["cases"]:
        found.setdefault(case["id"].partition("/")[0], Counter())[case["outcome"]] += 1
    for case in report["skipped"]:
        found.setdefault(case.partition("/")[0], Counter())["absent"] += 1
    return found


def told(outcomes):
    """``17 agree, 2 absent``."""
    return ", ".join(f"{outcomes[outcome]} {word}" for outcome, word in WORDS.items() if outcomes[outcome])


def table(reports):
    """One row a family, one column a report, and a row of sums."""
    columns = [counts(report) for report in reports]
    families = sorted({family for column in columns for family in column})
    rows = [[family, *(told(column.get(family, Counter())) for column in columns)] for family in families]
    rows.append(["all", *(told(sum(column.values(), Counter())) for column in columns)])
    return markdown(["family", *(report["candidate"] for report in reports)], rows)


def divergences(report):
    """One row a case that differs: the first tensor, its largest error, and by how much that is more than noise."""
    rows = []
    for case in report["cases"]:
        if case["outcome"] == "diverges":
            name = case["first_divergence"]
            first = next(tensor for tensor in case["tensors"] if tensor["name"] == name)
            # A report has infinities as texts.
            sizes = [f"{float(first['worst'][key]):.2g}" for key in ("absolute", "ratio")] if first["worst"] else []
            size = sizes or [first["reason"], ""]
            rows.append([case["id"], f"`{name}`", *size])
    return markdown(["case", "first at", "error", "ratio"], rows)


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    given = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    print(table(given) if len(given) > 1 else divergences(given[0]))
