"""Llama in numpy, as a candidate: it answers requests as docs/emitter-protocol.md says.

candle-mi-parity run --candidate "command:python docs/examples/port.py" --cases llama/hub
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def sha(data):
    return hashlib.sha256(data).hexdigest()


def run(request):
    """Every tensor that a request asks for, and the logits; a request for anything else is refused."""
    directory, config = Path(request["model_dir"]), json.loads(Path(request["model_dir"], "config.json").read_text())
    w, given = load_file(directory / "model.safetensors"), load_file(request["inputs"])
    replaced = {edit["hook"]: given[edit["tensor"]] for edit in request["edits"] if edit["kind"] == "replace"}
    plain = config["model_type"] == "llama" and not config.get("rope_scaling") and request["loader"] == "hf"
    if not plain or request["sae"] or request.get("recurrent") or request["dtype"] != "float32":
        raise NotImplementedError("this port knows the plain Llama in float32")
    if len(replaced) < len(request["edits"]):
        raise NotImplementedError("this port knows edits that replace a tensor")
    size, heads, found = config["head_dim"], config["num_attention_heads"], {}
    tokens = np.array(request["tokens"])
    angles = np.arange(tokens.shape[1])[:, None] * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin))

    def at(hook, value):
        found[hook] = value  # what is replaced is captured before
        return replaced.get(hook, value)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(config["rms_norm_eps"])) * w[f"{name}.weight"]

    def split(x):
        return x.reshape(*x.shape[:2], -1, size).transpose(0, 2, 1, 3)

    def turned(x):
        return x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = at("hook_embed", w["model.embed_tokens.weight"][tokens])
    for i in range(config["num_hidden_layers"]):
        b, p = f"blocks.{i}.", f"model.layers.{i}."
        x = at(f"{b}hook_resid_pre", x)
        q, k, v = (split(norm(x, f"{p}input_layernorm") @ w[f"{p}self_attn.{n}_proj.weight"].T) for n in "qkv")
        q, k, v = at(f"{b}attn.hook_q", q), at(f"{b}attn.hook_k", k), at(f"{b}attn.hook_v", v)
        q, k, v = turned(q), *(np.repeat(each, heads // each.shape[1], 1) for each in (turned(k), v))
        scores = at(f"{b}attn.hook_scores", q @ k.transpose(0, 1, 3, 2) / np.sqrt(np.float32(size)))
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        z = at(f"{b}attn.hook_pattern", powers / powers.sum(-1, keepdims=True)) @ v
        z = z.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ w[f"{p}self_attn.o_proj.weight"].T
        x = at(f"{b}hook_resid_mid", x + at(f"{b}hook_attn_out", z))
        y = at(f"{b}mlp.hook_pre", norm(x, f"{p}post_attention_layernorm"))
        gate, up = (y @ w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        y = at(f"{b}mlp.hook_post", gate / (1 + np.exp(-gate)) * up @ w[f"{p}mlp.down_proj.weight"].T)
        x = at(f"{b}hook_resid_post", x + at(f"{b}hook_mlp_out", y))
    at("logits", at("hook_final_norm", norm(x, "model.norm")) @ w["lm_head.weight"].T)
    for name in request["project"]:
        at(f"lens.{name}", norm(given[name], "model.norm") @ w["lm_head.weight"].T)
    return {
        name: found[name] for name in found if name in request["captures"] or name.startswith(("logits", "lens."))
    }


def write(request, arrays):
    """The trace: a JSON file, and the tensors beside it."""
    out, directory = Path(request["out"]), Path(request["model_dir"])
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    save_file(arrays, out.with_suffix(".safetensors"))
    read = [directory / "config.json", directory / "model.safetensors"]
    tensors = [
        {"name": name, "shape": list(array.shape), "dtype": "float32", "sha256": sha(array.tobytes()),
         "nonfinite": int((~np.isfinite(array)).sum()), "file": f"{out.stem}.safetensors", "key": name}
        for name, array in arrays.items()
    ]  # fmt: skip
    header = {
        "emitter": "1", "candle_mi": {"version": "numpy port 1", "source": "program"}, "candle": "", "features": [],
        "device": "cpu", "dtype": "float32", "case": request["case"], "sae_digest": None,
        "model_digest": sha("".join(sorted(f"{f.name}:{sha(f.read_bytes())}\n" for f in read)).encode()),
        "inputs_digest": sha(Path(request["inputs"]).read_bytes()),
    }  # fmt: skip
    document = {"format": "candle-mi-parity/trace/1", "header": header, "tokens": request["tokens"],
                "tensors": tensors, "scalars": {}, "top_features_last_pos": []}  # fmt: skip
    out.write_text(json.dumps(document))


for line in sys.stdin:
    asked = json.loads(line)
    try:
        write(asked, run(asked))
        reply = {"ok": True, "trace": asked["out"]}
    except Exception as error:
        kind = "absent" if isinstance(error, NotImplementedError) else "forward"
        reply = {"ok": False, "kind": kind, "error": str(error)}
    print(json.dumps(reply | {"case": asked["case"]["id"]}), flush=True)
