"""The models and tokenizers of direct calls: small generated ones, and SmolLM2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from safetensors.numpy import save_file

from candle_mi_parity.models.generate import generated_model, tensor_values
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.spec.cases import PackageModel, Setting, Statistic
from candle_mi_parity.spec.table import TableRow

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("the", "rose", "is", "red", "sky", "blue", "and", "in", "a", "of", "night", "day")


class Kind(StrEnum):
    """A generated ``tokenizer.json``; what matters here is how it spells a line break."""

    BYTES = "bytes"
    """BPE on bytes as GPT-2's, without special tokens; a line break is one token."""
    BYTES_WITH_BOS = "bytes-with-bos"
    """The same, with ``<s>`` before every text, as Llama 3's."""
    BYTES_WITH_ENDS = "bytes-with-ends"
    """The same, with two special tokens after every text, as XLNet's."""
    BYTES_TRIMMED = "bytes-trimmed"
    """As with ``<s>`` before, but the offsets of a word leave out the space before it, as those of Llama 3."""
    METASPACE = "metaspace"
    """BPE as Llama 2's: ``▁`` for a space, also before the text, so that a line break alone is two tokens."""
    WORDS = "words"
    """Whole words between spaces; a line break is no token."""


class ModelRow(TableRow):
    """A generated model with a tokenizer, or SmolLM2 with its own.

    :ivar config: ``config.json`` of a generated model; the weights are those of :mod:`generate`.
    :ivar weights: unusual statistics of them.
    """

    config: dict[str, Setting] = Field(default_factory=dict)
    weights: list[Annotated[Statistic, Field(strict=False)]] = Field(
        default_factory=list, exclude_if=lambda weights: not weights
    )
    tokenizer: Annotated[Kind | None, Field(strict=False)] = None
    package: PackageModel | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelRow:
        if bool(self.config) == (self.package is not None) or (self.tokenizer is not None and self.package):
            raise ValueError("give `config`, which may have a `tokenizer`, or `package`")
        return self

    def write(self, out: Path, cache: Path) -> None:
        """Write the directory of the model.

        :raises ModelError: the package is not installed.
        """
        if self.package is not None:
            out.symlink_to(model_directory(self.package, cache).resolve())
            return
        shutil.copytree(generated_model(dict(self.config), "hub", cache, statistics=self.weights), out)
        if self.tokenizer is not None:
            text = json.dumps(_TOKENIZERS[self.tokenizer](), ensure_ascii=False)
            (out / "tokenizer.json").write_text(text, encoding="utf-8")
            # Otherwise transformers takes the class of the model's type, which changes what the file says.
            (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


class DiffusionRow(TableRow):
    """A generated diffusion model, with weights as those of :mod:`generate`; none of them is 0.

    :ivar config: ``config.json``, whose ``model_type`` is ``mdlm`` or ``othello``.
    """

    config: dict[str, Setting]
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each weight, under the names of the checkpoints that the two authors published."""
        given: dict[str, Any] = dict(self.config)
        return _mdlm(given) if given["model_type"] == "mdlm" else _othello(given)

    def write(self, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        arrays = {name: tensor_values(name, shape, 0, self.seed) for name, shape in self.shapes().items()}
        save_file(arrays, directory / "model.safetensors")


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _mdlm(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, condition, vocabulary = (config[key] for key in ("hidden_dim", "cond_dim", "vocab_size"))
    found: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocabulary, width)}
    found |= _linear("sigma_map.mlp.0", 256, condition) | _linear("sigma_map.mlp.2", condition, condition)
    for layer in range(config["n_blocks"]):
        block = f"blocks.{layer}"
        found |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        found |= _linear(f"{block}.adaLN_modulation", condition, 6 * width)
        found |= _linear(f"{block}.attn_qkv", width, 3 * width, False) | _linear(
            f"{block}.attn_out", width, width, False
        )
        found |= _linear(f"{block}.mlp.0", width, 4 * width) | _linear(f"{block}.mlp.2", 4 * width, width)
    found |= {"output_layer.norm_final.weight": (width,)}
    found |= _linear("output_layer.adaLN_modulation", condition, 2 * width)
    found |= _linear("output_layer.linear", width, vocabulary)
    return {f"backbone.{name}": shape for name, shape in found.items()}


def _othello(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, vocabulary = config["n_embd"], config["vocab_size"]

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    found: dict[str, tuple[int, ...]] = {"tok_emb.weight": (vocabulary, width)}
    found |= {"pos_emb.weight": (config["block_size"], width)}
    if config.get("self_conditioning"):
        found |= {"self_cond_emb.weight": (vocabulary + 1, width)}
    for layer in range(config["n_layer"]):
        block = f"blocks.{layer}"
        found |= norm(f"{block}.ln1") | norm(f"{block}.ln2")
        found |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        found |= _linear(f"{block}.mlp.0", width, 4 * width) | _linear(f"{block}.mlp.2", 4 * width, width)
    return found | norm("ln_f") | _linear("head", width, vocabulary, False)


def _tokenizer(vocabulary: list[str], merges: list[tuple[str, str]], bos: bool, **parts: Any) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` of a BPE, with what it does before and after in ``parts``."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "vocab": {token: place for place, token in enumerate(vocabulary)},
        "merges": [f"{left} {right}" for left, right in merges],
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": "normalizer" in parts,
    }
    found = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    added = [{"id": place, "content": token} | special for place, token in enumerate(SPECIAL)]
    template = _template(before=["<s>"]) if bos else None
    return found | {"added_tokens": added, "post_processor": template, "model": model} | parts


def _template(before: Sequence[str] = (), after: Sequence[str] = ()) -> dict[str, Any]:
    """A post-processor that adds special tokens to a text."""
    first, last = ([{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (before, after))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, {"Sequence": {"id": "B", "type_id": 1}}, *last],
        "special_tokens": {
            token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]} for token in (*before, *after)
        },
    }


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printable, and otherwise one above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def _merges(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens and merges that make whole words of letters, from the left."""
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges = list(dict.fromkeys(pairs))
    return list(dict.fromkeys(left + right for left, right in merges)), merges


def _bytes(bos: bool) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made, merges = _merges([*WORDS])
    letters = _byte_letters()
    vocabulary = [*SPECIAL, *letters, *(token for token in made if token not in letters)]
    return _tokenizer(vocabulary, merges, bos, pre_tokenizer=level, decoder=level)


def _with_ends() -> dict[str, Any]:
    return _bytes(False) | {"post_processor": _template(after=["</s>", "<s>"])}


def _trimmed() -> dict[str, Any]:
    found = _bytes(True)
    parts = [found["decoder"] | {"trim_offsets": True}, found["post_processor"]]
    return found | {"post_processor": {"type": "Sequence", "processors": parts}}


def _metaspace() -> dict[str, Any]:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    made, merges = _merges([f"▁{word}" for word in WORDS])
    letters = ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [*SPECIAL, *raw, *letters, *made]
    return _tokenizer(vocabulary, merges, True, normalizer=before, decoder={"type": "Sequence", "decoders": decoders})


def _words() -> dict[str, Any]:
    found = _tokenizer([], [], False, pre_tokenizer={"type": "WhitespaceSplit"}, decoder=None)
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *WORDS])}
    return found | {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}


_TOKENIZERS: dict[Kind, Callable[[], dict[str, Any]]] = {
    Kind.BYTES: lambda: _bytes(False),
    Kind.BYTES_WITH_BOS: lambda: _bytes(True),
    Kind.BYTES_WITH_ENDS: _with_ends,
    Kind.BYTES_TRIMMED: _trimmed,
    Kind.METASPACE: _metaspace,
    Kind.WORDS: _words,
}
