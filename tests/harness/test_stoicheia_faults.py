"""A planted fault in the answers of AlgZoo's networks and tasks fails, in every function."""

from collections.abc import Callable

import numpy as np
import pytest

from candle_mi_parity.coverage.calls_stoicheia import NETWORKS
from candle_mi_parity.coverage.calls_tasks import TASKS
from candle_mi_parity.coverage.formulas import Formula
from tests.support.calls import ARRAYS, ROWS, Values, changed, other, passes, right


def by(call: str, formula: Formula) -> tuple[str, Values]:
    return call, right(call, formula)


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "a parameter more": lambda: changed("stoicheia-config/cycle", lambda sizes: sizes + np.array([0, 0, 0, 0, 0, 1])),
    "W_hh transposed": lambda: changed("stoicheia-weights/pth-views", np.transpose, "weight_hh"),
    "bfloat16 rounded once more": lambda: changed(
        "stoicheia-weights/f16", lambda weights: weights * (1 + 2**-11), "weight_oh"
    ),
    "a row of the batch for another": lambda: changed("stoicheia-forward/4x3", lambda out: out[::-1], "output"),
    "edits that are ignored where nothing is captured": lambda: (
        "stoicheia-edit/hidden-zero",
        right("stoicheia-edit/hidden-zero")
        | {"output": right("stoicheia-edit/hidden-zero", Formula.EDITS_IGNORED)["output"]},
    ),
    "the state of the step before": lambda: changed(
        "stoicheia-forward/4x3", lambda _: right("stoicheia-forward/4x3")["rnn.hook_hidden.0"], "rnn.hook_hidden.1"
    ),
    "no positions": lambda: other("stoicheia-forward/cycle", x="net_tokens3"),
    "a causal mask": lambda: changed("stoicheia-forward/cycle", np.tril, "blocks.0.attn.hook_pattern"),
    "one head": lambda: by("stoicheia-forward/cycle-heads", Formula.ONE_HEAD),
    "no biases": lambda: by("stoicheia-forward/cycle-bias", Formula.BIASES_UNREAD),
    "edits that are ignored": lambda: by("stoicheia-edit/pattern-scale", Formula.EDITS_IGNORED),
    "an edit of the next step": lambda: other(
        "stoicheia-edit/hidden-scale", edits=[["rnn.hook_hidden.2", "scale", -0.5, ""]]
    ),
    "an edit of the next position": lambda: other(
        "stoicheia-edit/embed-patch", edits=[["hook_embed", "patch_at", 2, "net_donor4"]]
    ),
    "two edits in another order": lambda: other(
        "stoicheia-edit/one-hook-twice",
        edits=[["rnn.hook_hidden.1", "scale", -2.0, ""], ["rnn.hook_hidden.1", "add", 0, "net_donor4"]],
    ),
    "the first row projected": lambda: changed("stoicheia-project/stream", lambda rows: rows[:1].repeat(2, 0)),
    "the neuron after the ablated one": lambda: other("stoicheia-ablated/first", ablated=[1]),
    "ablated before ReLU alone": lambda: other("stoicheia-ablated/two", ablated=[]),
    "states for pre-activations": lambda: changed("stoicheia-traced/4x3", lambda pre: np.maximum(pre, 0), "pre"),
    "one more right": lambda: changed("stoicheia-accuracy/4x3", lambda share: share + 1 / 64),
    "the last of equal": lambda: changed("stoicheia-argmax/tie", lambda _: 2.0),
    "a list from the best": lambda: changed("stoicheia-neurons/4x3", lambda deltas: deltas[::-1], "listed"),
    "a difference the other way": lambda: changed("stoicheia-neurons/4x3", np.negative, "delta"),
    "an interaction that is added": lambda: changed(
        "stoicheia-pairs/4x3", lambda each: 2 * right("stoicheia-pairs/4x3")["delta"] - each, "interaction"
    ),
    "scales for their inverse": lambda: changed("stoicheia-standardize/4x3", lambda each: 1 / each, "scales"),
    "W_hh not scaled": lambda: changed(
        "stoicheia-standardize/4x3", lambda _: right("stoicheia-weights/4x3")["weight_hh"], "weight_hh"
    ),
    "active at 0": lambda: by("stoicheia-pattern/zero", Formula.ZERO_FIRES),
    "a region lost": lambda: changed(
        "stoicheia-regions/2x2", lambda counts: counts - (np.arange(len(counts)) == 0), "counts"
    ),
    "a representative of another region": lambda: changed(
        "stoicheia-regions/4x3", lambda own: np.roll(own, 1, 0), "own"
    ),
    "the map at 0 of the region above": lambda: by("stoicheia-map/zero", Formula.ZERO_FIRES),
    "columns in the reverse order": lambda: changed("stoicheia-map/4x3", lambda columns: columns[:, ::-1]),
    "roles as they are coded": lambda: by("stoicheia-probe/maximum", Formula.SIGNALS_AS_CODED),
    "roles as they are coded, of a recent input": lambda: by("stoicheia-probe/signs", Formula.SIGNALS_AS_CODED),
    "a correlation with its sign": lambda: changed("stoicheia-probe/signs", np.negative),
    "agreement for disagreement": lambda: changed("stoicheia-surprise/4x3", lambda share: 1 - share, "disagreement"),
    "the estimator's accuracy for the network's": lambda: changed(
        "stoicheia-surprise/constant", lambda _: right("stoicheia-surprise/constant")["model"], "estimate"
    ),
    "other samples": lambda: other("stoicheia-surprise/6x5", n_samples=149),
    "the largest": lambda: changed("stoicheia-2nd-argmax/x4", lambda _: ARRAYS["net_x4"].max(1)),
    "the lower of two": lambda: changed("stoicheia-argmedian/x4", lambda _: np.sort(ARRAYS["net_x4"])[:, 1]),
    "the upper median": lambda: by("stoicheia-median/x4", Formula.UPPER_MEDIAN),
    "a length for a class": lambda: by("stoicheia-cycle/permutations", Formula.CYCLE_LENGTH),
    "the way into a cycle counted": lambda: changed(
        "stoicheia-cycle/functions", lambda each: each + np.array([1, 0, 0, 0])
    ),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


def test_every_function_is_faulty_once() -> None:
    faulty = {ROWS[make()[0]].fn for make in PLANTED.values()}
    # oracle_predict has the tasks' own truth; forward_fast the one of network_forward, of which a pass is planted.
    assert set(NETWORKS | TASKS) - faulty == {"oracle_predict", "forward_fast"}
