"""Transcoders: the truth from the files alone, circuit-tracer's files and numbers, and a fault in each function.

If circuit-tracer is installed (`pip install --no-deps circuit-tracer`), its files and results are compared too;
without it those tests are skipped.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from candle_mi_parity.coverage.calls import TranscoderRow
from candle_mi_parity.coverage.calls_transcoders import TRANSCODERS
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.transcoder import SCOPE
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.interventions import edits_of
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.edits import CltInject
from candle_mi_parity.spec.paths import cache_root
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, changed, passes, right, where
from tests.support.planting import CASES

OURS = {row.id: row for row in TABLE.call if row.transcoder is not None}

RIGHT = [id for id, row in OURS.items() if not row.raises]
Weights = dict[str, np.ndarray]


@functools.cache
def read(name: str) -> list[Weights]:
    """The weights of each layer as float64, from the files and with their names."""
    row, found = TABLE.transcoders[name], []
    for layer in range(row.layers):
        if row.layout == "gemma-scope":
            (file,) = (where(name) / SCOPE / f"layer_{layer}").rglob("params.npz")
            with np.load(file) as arrays:
                found.append({key: arrays[key].astype(np.float64) for key in arrays})
            continue
        kinds = ("W_enc", "W_dec") if row.crosses else ("layer",)
        tensors = [load_file(where(name) / f"{kind}_{layer}.safetensors") for kind in kinds]
        merged = {key.removesuffix(f"_{layer}"): each for part in tensors for key, each in part.items()}
        found.append({key.split(".")[-1]: tensor.double().numpy() for key, tensor in merged.items()})
    return found


def pre(name: str, x: np.ndarray, layer: int) -> np.ndarray:
    weights, scope = read(name)[layer], TABLE.transcoders[name].layout == "gemma-scope"
    return np.asarray(np.einsum("df,d->f" if scope else "fd,d->f", weights["W_enc"], x) + weights["b_enc"])


def rows_of(name: str, layer: int, target: int) -> np.ndarray:
    decoder = read(name)[layer]["W_dec"]
    return np.asarray(decoder[:, target - layer] if TABLE.transcoders[name].crosses else decoder)


def active(name: str, x: np.ndarray, layer: int) -> np.ndarray:
    found, threshold = pre(name, x, layer), read(name)[layer].get("threshold")
    return np.asarray(np.maximum(found, 0) if threshold is None else found * (found > threshold))


def listed(values: np.ndarray) -> np.ndarray:
    return np.sort(values[values != 0])[::-1]


def scores(name: str, direction: str, scoring: dict[str, Any], least: float = 0.0) -> Values:
    row, vector = TABLE.transcoders[name], torch.from_numpy(ARRAYS[direction])
    found = np.full((row.layers, row.features), -np.inf)
    for layer in range(row.layers):
        if layer == scoring["target"] or (layer < scoring["target"] and row.crosses):
            decoder = torch.from_numpy(rows_of(name, layer, scoring["target"]))
            cosine = torch.nn.functional.cosine_similarity(decoder, vector, dim=-1)
            found[layer] = (cosine if scoring["cosine"] else decoder @ vector).numpy()
    order = np.argsort(-found.ravel())
    found.ravel()[order[scoring["k"] :]] = -np.inf
    found[np.abs(found) < least] = -np.inf
    return {"value": found, "listed": np.sort(found[np.isfinite(found)])[::-1]}


def injected(name: str, residual: str, features: list[list[int]], position: int, strength: float) -> np.ndarray:
    stream = ARRAYS[residual].copy()
    for layer, index, target in features:
        stream[:, position] += np.float32(strength) * rows_of(name, layer, target)[index]
    return stream


def plainly(call: str) -> Values:
    """The answer from the files in numpy."""
    row = ROWS[call]
    name, fn, args = str(row.transcoder), row.fn, dict(row.args)
    spec = TABLE.transcoders[name]
    x: np.ndarray = ARRAYS[args["x"]] if isinstance(args.get("x"), str) else np.zeros(0)  # type: ignore[index]
    layer: Any = args.get("layer")
    given: Any = args
    if fn == "clt_config":
        sizes = [spec.layers, spec.width, spec.features, spec.layers * spec.features]
        return {"value": np.array(sizes, dtype=np.float64)}
    if fn == "clt_encode_pre_activation":
        return {"value": pre(name, x, layer)}
    if fn in ("clt_encode", "clt_top_k"):
        found = active(name, x, layer)
        if fn == "clt_top_k":
            found[np.argsort(-found, kind="stable")[given["k"] :]] = 0
        return {"value": found, "listed": listed(found)}
    if fn in ("clt_decoder_vector", "clt_decoder_matrix"):
        return {"value": rows_of(name, layer, given["target"])}
    if fn == "clt_extract_decoder_vectors":
        return {"value": np.stack([rows_of(name, at, given["target"])[index] for at, index in given["features"]])}
    if fn == "clt_load_skip_matrix":
        return {"value": read(name)[layer]["W_skip"]}
    if fn == "clt_inject":
        return {"value": injected(name, **given)}
    if fn == "clt_score_features_batch":
        each = [scores(name, direction, given["scoring"]) for direction in given["directions"]]
        return {key: (np.stack if key == "value" else np.concatenate)([one[key] for one in each]) for key in each[0]}
    return scores(name, **given)


# --- the truth --------------------------------------------------------------------------------------


@pytest.mark.every(20)
@pytest.mark.parametrize("call", RIGHT)
def test_the_files_alone_give_the_truth(call: str) -> None:
    assert passes(call, plainly(call))


def test_there_is_a_call_of_each_function_with_each_layout_and_each_pair_of_layers() -> None:
    layouts = {(row.fn, TABLE.transcoders[str(row.transcoder)].layout) for row in OURS.values()}
    for fn in ("clt_encode", "clt_encode_pre_activation", "clt_decoder_vector", "clt_decoder_matrix"):
        assert {layout for name, layout in layouts if name == fn} == {"clt", "clt-index", "plt", "gemma-scope"}
    assert {name for name, _ in layouts} == set(TRANSCODERS)
    pairs = {
        (row.args["layer"], row.args["target"])
        for row in OURS.values()
        if (row.fn, row.transcoder, row.raises) == ("clt_decoder_vector", "clt", False)
    }
    assert pairs == {(layer, target) for layer in range(3) for target in range(layer, 3)}


@functools.cache
def shim() -> bool:
    """Whether circuit-tracer is installed; an empty package stands for it, without the models that it imports."""
    if (found := importlib.util.find_spec("circuit_tracer")) is None:
        return False
    package, utils = ModuleType("circuit_tracer"), ModuleType("circuit_tracer.utils")
    package.__path__ = list(found.submodule_search_locations or [])
    utils.get_default_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    sys.modules |= {"circuit_tracer": package, "circuit_tracer.utils": utils}
    return True


def circuit_tracer(module: str) -> Any:
    """A module of circuit-tracer's transcoders."""
    if not shim():
        pytest.skip("circuit-tracer is not installed: pip install --no-deps circuit-tracer")
    return importlib.import_module(f"circuit_tracer.transcoder.{module}")


def layers_of(name: str) -> Any:
    """``encode_layer(x, layer, apply_activation_function)`` of circuit-tracer, which reads our files in float64."""
    row = TABLE.transcoders[name]
    if row.crosses:
        cross = circuit_tracer("cross_layer_transcoder")
        return cross.load_clt(str(where(name)), dtype=torch.float64, lazy_decoder=False).encode_layer
    single = circuit_tracer("single_layer_transcoder")
    if row.layout == "plt":
        paths = [str(where(name) / f"layer_{layer}.safetensors") for layer in range(row.layers)]
        found = [single.load_relu_transcoder(path, 0, None, torch.float64, False, False) for path in paths]
    else:
        places = [where(name) / SCOPE / f"layer_{layer}" for layer in range(row.layers)]
        files = [str(next(place.rglob("params.npz"))) for place in places]
        found = [single.load_gemma_scope_transcoder(file, 0, dtype=torch.float64) for file in files]
    return lambda x, layer, apply: found[layer].encode(x, apply)


@pytest.mark.parametrize("name", TABLE.transcoders)
def test_circuit_tracer_reads_our_files_and_gives_the_truth(name: str) -> None:
    encode = layers_of(name)
    for call in RIGHT:
        row: Any = ROWS[call]
        if row.transcoder != name or row.fn not in ("clt_encode", "clt_encode_pre_activation"):
            continue
        with torch.no_grad():
            x = torch.from_numpy(ARRAYS[row.args["x"]])[None]
            value = encode(x, row.args["layer"], row.fn == "clt_encode")[0].numpy()
        assert passes(call, {"value": value} | ({"listed": listed(value)} if row.fn == "clt_encode" else {}))


def written(row: TranscoderRow, out: Path) -> None:
    """What circuit-tracer writes of the same weights."""
    jump = circuit_tracer("activation_functions").JumpReLU
    dtype = getattr(torch, row.dtype)
    weights = [{key: torch.from_numpy(array).to(dtype) for key, array in each.items()} for each in row.weights()]
    if row.crosses:
        kind = "jump_relu" if row.threshold else "relu"
        make = circuit_tracer("cross_layer_transcoder").CrossLayerTranscoder
        clt = make(row.layers, row.features, row.width, kind, lazy_decoder=False, dtype=dtype)
        state = {key: torch.stack([each[key] for each in weights]) for key in ("W_enc", "b_enc", "b_dec")}
        state |= {f"W_dec.{layer}": each["W_dec"] for layer, each in enumerate(weights)}
        if row.threshold:
            state["activation_function.threshold"] = torch.stack([each["threshold"][None] for each in weights])
        clt.load_state_dict(state)
        clt.to_safetensors(str(out))
        return
    out.mkdir()
    make = circuit_tracer("single_layer_transcoder").SingleLayerTranscoder
    for layer, each in enumerate(weights):
        activation = jump(each.pop("threshold")) if row.threshold else torch.nn.functional.relu
        plt = make(row.width, row.features, activation, layer, row.skip, dtype=dtype)
        plt.load_state_dict(each | {"W_dec": each["W_dec"][:, 0]}, strict=False)
        plt.to_safetensors(str(out / f"layer_{layer}.safetensors"))


@pytest.mark.parametrize("name", [name for name, row in TABLE.transcoders.items() if row.layout != "gemma-scope"])
def test_our_files_are_those_that_circuit_tracer_writes(name: str, tmp_path: Path) -> None:
    written(TABLE.transcoders[name], tmp_path / "theirs")
    theirs = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert theirs == sorted(path.name for path in where(name).glob("*.safetensors"))
    for file in theirs:
        ours, other = load_file(where(name) / file), load_file(tmp_path / "theirs" / file)
        assert ours.keys() == other.keys()
        assert all(ours[key].dtype == other[key].dtype and torch.equal(ours[key], other[key]) for key in ours)


# --- faults -----------------------------------------------------------------------------------------


def fires(call: str, fired: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[str, Values]:
    """Another activation function of the pre-activation and the thresholds."""
    row: Any = ROWS[call]
    found = pre(row.transcoder, ARRAYS[row.args["x"]], row.args["layer"])
    value = np.where(fired(found, read(row.transcoder)[row.args["layer"]]["threshold"]), found, 0)
    return call, {"value": value, "listed": listed(value)}


def other(call: str, **args: Any) -> tuple[str, Values]:
    """The right answer to another question."""
    row: Any = ROWS[call]
    asked = row.args | args
    if "scoring" in args:
        asked["scoring"] = row.args["scoring"] | args["scoring"]
    ROWS["other"] = row.model_copy(update={"args": asked})
    try:
        return call, plainly("other")
    finally:
        del ROWS["other"]


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "≥ for > at θ": lambda: fires("clt-encode/clt-theta", lambda pre, theta: pre >= theta),
    "θ that is not read": lambda: fires("clt-encode/scope-theta", lambda pre, _: pre > 0),
    "the θ of the next feature": lambda: fires("clt-encode/scope-theta", lambda pre, theta: pre > np.roll(theta, 1)),
    "θ subtracted": lambda: changed("clt-encode/scope-0", lambda value: np.where(value > 0, value - 0.1, 0)),
    "a list from the smallest": lambda: changed("clt-encode/clt-0", lambda values: values[::-1], "listed"),
    "a list one short": lambda: changed("clt-encode/clt-0", lambda values: values[:-1], "listed"),
    "k + 1 features": lambda: other("clt-top/clt", k=3),
    "the first k features": lambda: changed("clt-top/clt-bf16", lambda value: np.sort(value)),
    "no bias": lambda: changed("clt-pre/plt-1", lambda value: value - read("plt")[1]["b_enc"]),
    "the encoder of another layer": lambda: other("clt-pre/scope-1", layer=2),
    "the target for the offset": lambda: other("clt-vector/clt-1-1", target=2),
    "the features of another layer": lambda: other("clt-vector/clt-many-10-11", layer=9),
    "layers sorted as texts": lambda: other("clt-pre/clt-many-10", layer=0),
    "the next feature's row": lambda: changed("clt-matrix/clt-1-1", lambda rows: np.roll(rows, 1, axis=0)),
    "bfloat16 rounded once more": lambda: changed("clt-vector/clt-f16-0-0", lambda rows: rows * (1 + 2**-11)),
    "rows in the order of layers": lambda: changed("clt-extract/clt", lambda rows: rows[[0, 3, 2, 1]]),
    "the skip matrix transposed": lambda: changed("clt-skip/plt-bf16-0", np.transpose),
    "cosines for projections": lambda: other("clt-score/clt", scoring={"cosine": True}),
    "cosines without the row's norm": lambda: changed(
        "clt-score/clt-cosine",
        lambda _: right("clt-score/clt")["value"] / np.linalg.norm(ARRAYS["other6"]),
    ),
    "the scores of another layer": lambda: other("clt-score/first-layer", scoring={"target": 1}),
    "absolute scores": lambda: changed("clt-score/clt", np.abs),
    "one direction for all": lambda: changed("clt-batch/clt", lambda value: value[[0, 0]]),
    "signed scores pruned": lambda: changed("clt-graph/clt", lambda value: np.where(value < 0, -np.inf, value)),
    "scores pruned before the highest are taken": lambda: other("clt-graph/clt-cosine", least=0.4),
    "the encoder that was loaded before": lambda: other("clt-encode/clt-after-another", layer=2),
    "injected at the next position": lambda: other("clt-inject/first", position=1),
    "injected at all positions": lambda: changed(
        "clt-inject/first", lambda value: value + (value - ARRAYS["x"])[:, :1] * np.array([0, 1, 1])[:, None]
    ),
    "injected with strength 1": lambda: other("clt-inject/plt", strength=1.0),
    "one of two features injected": lambda: other("clt-inject/scope", features=[[2, 4, 2]]),
    "a feature twice injected once": lambda: other("clt-inject/twice", features=[[0, 3, 1]]),
    "NaN": lambda: changed("clt-pre/clt-0", lambda value: np.full_like(value, np.nan)),
    "a feature more": lambda: changed("clt-config/clt", lambda sizes: sizes + np.array([0, 0, 1, 3])),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


PLT = {"layout": "plt", "features": 4, "seed": 1}
EDIT = {"kind": "clt_inject", "hook": "blocks.1.hook_resid_post", "position": 0, "strength": 2.0}
BAD_EDITS: dict[str, dict[str, Any]] = {
    "there is no feature 4 among 4": {"features": [[1, 4]]},
    "features of layer 0 do not write to layer 1": {"features": [[0, 1]]},
    "only at hook_resid_post": {"features": [[1, 1]], "hook": "blocks.1.hook_mlp_out"},
    "does not fit in bfloat16": {"features": [[1, 1]], "strength": 0.7},
    "3 thresholds for 4": {"features": [[1, 1]], "transcoder": PLT | {"threshold": [0.1] * 3}},
    "are float32 and have thresholds": {"features": [[1, 1]], "transcoder": PLT | {"layout": "gemma-scope"}},
    "only the layout plt": {"features": [[1, 1]], "transcoder": PLT | {"layout": "clt", "skip": True}},
}


@pytest.mark.parametrize("message", BAD_EDITS)
def test_an_edit_that_cannot_be_is_refused(message: str) -> None:
    CltInject.model_validate(EDIT | {"transcoder": PLT, "features": [[1, 3]]})
    with pytest.raises(ValidationError, match=message):
        CltInject.model_validate({"transcoder": PLT} | EDIT | BAD_EDITS[message])


@pytest.mark.parametrize("case", ["llama/edit-clt", "llama/edit-plt", "gemma2/edit-clt", "gemma2/edit-clt-scope"])
def test_an_injection_is_what_circuit_tracer_adds_to_the_output_of_the_mlp(case: str) -> None:
    """At ``hook_mlp_out``, which the file's config names. Only the stream behind it is captured with the vectors."""
    subject = prepare(CASES[case], cache_root())
    assert 'feature_output_hook: "hook_mlp_out"' in (subject.transcoders[0] / "config.yaml").read_text()
    model, tokens = load_model(subject.model_dir), torch.tensor(subject.tokens)
    with Float64():  # type: ignore[no-untyped-call]
        there = edits_of(subject, {})
        moved = {hook.replace("resid_post", "mlp_out"): change for hook, change in there.items()}
        found, plain, other = (forward(model, tokens, edits).tensors for edits in (there, None, moved))
    for name, tensor in found.items():
        assert torch.allclose(tensor, other[name], rtol=1e-12, atol=1e-12) == (name not in there)
    assert not torch.allclose(found["logits"], plain["logits"])


@pytest.mark.parametrize("case", ["llama/edit-clt", "gemma2/edit-clt"])
def test_an_injection_adds_the_rows_of_the_files_at_its_position_alone(case: str) -> None:
    subject = prepare(CASES[case], cache_root())
    edit = CASES[case].edits[0]
    assert isinstance(edit, CltInject)
    rows = [load_file(subject.transcoders[0] / f"W_dec_{layer}.safetensors") for layer in range(edit.target + 1)]
    vector = sum(
        rows[layer][f"W_dec_{layer}"][index, edit.target - layer].double() * edit.strength
        for layer, index in edit.features
    )
    stream = torch.zeros(2, 12, len(torch.as_tensor(vector)), dtype=torch.float64)
    with Float64():  # type: ignore[no-untyped-call]
        added = edits_of(subject, {})[edit.hook][0](stream)
    stream[:, edit.position] = torch.as_tensor(vector)
    assert torch.allclose(added, stream, rtol=1e-14) and stream.any()
