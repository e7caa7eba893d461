"""A case prepared on this machine: model directory, token ids, captures, SAE file, and their digests."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candle_mi_parity.errors import CaseTableError, ModelError
from candle_mi_parity.files.cache import cached
from candle_mi_parity.files.digest import digest_files, file_digest
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.versions import version
from candle_mi_parity.models.checkpoint import given_files, model_digest, read_config, weight_files, weight_tensors
from candle_mi_parity.models.dequantize import plain_model, quantization_of, quantized_names
from candle_mi_parity.models.generate import seeded_words
from candle_mi_parity.models.quiet import transformers_runs
from candle_mi_parity.models.resolve import model_directory, pickled_directory
from candle_mi_parity.models.sae import sae_files, sae_path
from candle_mi_parity.models.saelens import own_hook
from candle_mi_parity.models.transcoder import transcoder_path
from candle_mi_parity.models.transformers_config import load_config
from candle_mi_parity.spec import edits
from candle_mi_parity.spec.cases import Case, Download, HubModel, RandomTokens, SaeFile, SaePlace
from candle_mi_parity.spec.families import RECURRENT, family_of, is_bidirectional, transformers_type
from candle_mi_parity.spec.hook_points import hook_names

CONFIG_CHECK = 1
"""Part of the key of :func:`_check_config`'s cached answers; raise it when that function changes."""
MOST_WEIGHTS = 1 << 24
"""Numbers in quantised weights that are compared one by one; of a larger model, the forward pass alone is."""
SPECIAL = 3
"""Ids 0, 1 and 2 are padding, BOS and EOS in the families here."""


@dataclass(frozen=True)
class SpecialIds:
    """Special token ids as transformers reads them from the config."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None


@dataclass(frozen=True)
class PreparedCase:
    """The input of oracle and candidate for one case.

    :ivar model_dir: what the oracle reads.
    :ivar quantized: the weights that ``given_dir`` stores quantised; empty where they are too many to compare one by
        one.
    :ivar captures: hook names in execution order, without ``logits``.
    :ivar given_dir: the same weights in other files, pickled or quantised, for the candidate; None for ``model_dir``.
    :ivar transcoders: directories of the edits' transcoders.
    :ivar digest: over everything that decides the numbers; the case's id is not part of it.
    :ivar downloads: files from the hub.
    """

    case: Case
    model_dir: Path
    model_type: str
    tokens: list[list[int]]
    captures: list[str]
    sae_file: Path | None
    model_digest: str
    sae_digest: str | None
    digest: str
    downloads: tuple[Download, ...] = ()
    special: SpecialIds = SpecialIds()
    given_dir: Path | None = None
    quantized: tuple[str, ...] = ()
    transcoders: tuple[Path, ...] = ()

    @property
    def given(self) -> Path:
        """The model directory for the candidate."""
        return self.given_dir or self.model_dir

    @property
    def given_digest(self) -> str:
        """The digest of :attr:`given`."""
        return self.model_digest if self.given_dir is None else model_digest(self.given_dir)

    @property
    def quantized_dir(self) -> Path | None:
        """The quantised checkpoint that the candidate is given; None for plain weights."""
        return self.given_dir if self.given_dir and quantization_of(self.given_dir) else None


def prepare(case: Case, cache: Path, loaded: Any = None) -> PreparedCase:
    """Prepare a row of the case table.

    :param loaded: transformers' config of the model, if it was loaded before.
    :raises ParityError: one line on what is missing or malformed.
    """
    stored = model_directory(case.model, cache)
    quantized = quantization_of(stored) is not None
    model_dir = plain_model(stored, cache) if quantized else stored
    config = read_config(model_dir)
    # Before transformers reads it: for a model_type that transformers lacks, a config may name code of its own.
    family_of(str(config.get("model_type")))
    _check_sizes(config, model_dir)
    if loaded is None:
        special = _check_config(model_dir, file_digest(model_dir / "config.json"), cache)
    else:
        special = SpecialIds(*_special_ids(loaded, model_dir))
    tokens = _token_ids(case, model_dir, config, cache)
    vocabulary = _whole_number(config, "vocab_size", model_dir)
    if not tokens[0]:
        whose = "" if case.text is None else f", as the tokenizer of {model_dir} gives none for the text"
        raise CaseTableError(f"{case.id}: there is no token{whose}; nothing would be compared")
    if outside := [token for token in tokens[0] if not 0 <= token < vocabulary]:
        raise CaseTableError(f"{case.id}: token {outside[0]} is outside the vocabulary of {vocabulary}")
    n_layers = _whole_number(config, "num_hidden_layers", model_dir)
    width = _whole_number(config, "hidden_size", model_dir)
    sae_file = sae_path(case.sae, width, cache) if case.sae else None
    if case.sae and case.sae.layer >= n_layers:
        raise CaseTableError(f"{case.id}: SAE layer {case.sae.layer}, but the model has {n_layers} layers")
    if case.sae and sae_file and sae_file.is_dir() and (own := own_hook(sae_file)) not in (None, case.sae.hook):
        raise CaseTableError(
            f"{case.id}: the row places its SAE at {case.sae.hook}, and the SAE's own cfg.json places it at "
            f"{one_line(str(own))}"
        )
    weights = model_digest(model_dir)
    sae_digest = digest_files(sae_files(sae_file)) if sae_file else None
    content: dict[str, object] = {
        "model": weights,
        "tokens": tokens,
        "sae": _sae_content(case.sae, sae_digest) if case.sae else None,
        "dtype": case.dtype,
    }
    recurrent = config.get("model_type") in RECURRENT
    captures = hook_names(n_layers, recurrent)
    if case.edits:
        n_heads = 0 if recurrent else _whole_number(config, "num_attention_heads", model_dir)
        sae_hook = case.sae.hook if case.sae else None
        edits.check(case.edits, captures, len(tokens[0]), n_heads, sae_hook, not is_bidirectional(config))
        content["edits"] = [edit.model_dump() for edit in case.edits]
    if case.recurrent is not None:
        if fault := case.recurrent.fault(n_layers, len(tokens[0])):
            raise CaseTableError(f"{case.id}: recurrent: {fault}")
        content["recurrent"] = case.recurrent.model_dump()
    if case.loader != "hf" or case.features:
        content["loader"] = [case.loader, *case.features]
    given = stored if quantized else pickled_directory(case.model, cache)
    if given is not None:
        content["given"] = model_digest(given) if quantized else [path.name for path in given_files(given)]
    return PreparedCase(
        case=case,
        model_dir=model_dir,
        model_type=str(config.get("model_type")),
        tokens=tokens,
        captures=captures,
        sae_file=sae_file,
        model_digest=weights,
        sae_digest=sae_digest,
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        downloads=_downloads(case),
        special=special,
        given_dir=given,
        quantized=tuple(_compared_weights(stored, model_dir)) if quantized else (),
        transcoders=tuple(
            transcoder_path(edit.transcoder, n_layers, width, cache)
            for edit in case.edits
            if isinstance(edit, edits.CltInject)
        ),
    )


def _compared_weights(quantized_dir: Path, model_dir: Path) -> list[str]:
    """The quantised weights, unless there are more than :data:`MOST_WEIGHTS` numbers."""
    names, stored = quantized_names(quantized_dir), weight_tensors(model_dir)
    return names if sum(math.prod(stored[name].shape) for name in names) <= MOST_WEIGHTS else []


def _downloads(case: Case) -> tuple[Download, ...]:
    """The files of a case that come from the hub; by now they are in the cache of this process."""
    found = []
    if isinstance(case.model, HubModel):
        from candle_mi_parity.models.hub import fetch_model

        found.append(fetch_model(case.model)[1])
    if isinstance(case.sae, SaeFile) and case.sae.repo:
        from candle_mi_parity.models.hub import fetch_sae

        found.append(fetch_sae(case.sae)[1])
    return tuple(found)


def _sae_content(sae: SaePlace, digest: str | None) -> list[object]:
    """The SAE's part of a case's digest; the default hook point is not written out."""
    return [digest, sae.layer, *([] if sae.point == "hook_resid_post" else [sae.point])]


def _check_config(model_dir: Path, digest: str, cache: Path) -> SpecialIds:
    """Check that transformers accepts the config, without running code that lies beside it.

    The answer is cached for each content of the file and version of transformers, which then is not imported.

    :param digest: sha256 of the file.
    :raises ModelError: transformers refuses the config or reads it as another class.
    """
    key = [CONFIG_CHECK, digest, version("transformers")]
    return SpecialIds(*cached(cache, "configs", key, lambda: _ask_transformers(model_dir)))


def _ask_transformers(model_dir: Path) -> list[int | None]:
    """The fields of :class:`SpecialIds`."""
    with transformers_runs(model_dir):
        config = load_config(model_dir)
    return _special_ids(config, model_dir)


def _special_ids(config: Any, model_dir: Path) -> list[int | None]:
    """The fields of :class:`SpecialIds` of transformers' config.

    :raises ModelError: it is a config of another class than the file says.
    """
    raw = read_config(model_dir)
    if config.model_type != transformers_type(str(written := raw.get("model_type"))):
        why = " because of its `layer_types`" if written == "mistral" and "layer_types" in raw else ""
        raise ModelError(
            f"transformers loads {model_dir}/config.json as another class{why}: model_type is "
            f"{one_line(repr(written))}, and the model that it makes is a {config.model_type!r}"
        )
    eos = config.eos_token_id  # one id or a list
    eos = eos[0] if isinstance(eos, list) and eos else eos
    ids = (config.pad_token_id, config.bos_token_id, eos)
    return [value if isinstance(value, int) else None for value in ids]


def _check_sizes(config: dict[str, object], model_dir: Path) -> None:
    """Refuse sizes that the weights cannot have, before anything of these sizes is allocated."""
    tensors = len(weight_tensors(model_dir))
    there = sum(file.stat().st_size for file in weight_files(model_dir))
    sizes = stated_sizes(config, model_dir)
    if sizes[0] * sizes[1] > there or sizes[2] > tensors:
        raise ModelError(
            f"{model_dir}/config.json: a vocabulary of {sizes[0]}, width {sizes[1]} and {sizes[2]} layers are more "
            f"than {tensors} tensors in {there} bytes of weights can hold"
        )


def stated_sizes(config: dict[str, object], model_dir: Path) -> list[int]:
    """The vocabulary, the width and the number of layers, for which transformers would take its defaults.

    :raises ModelError: the config lacks one.
    """
    return [_whole_number(config, key, model_dir) for key in ("vocab_size", "hidden_size", "num_hidden_layers")]


def _whole_number(config: dict[str, object], key: str, model_dir: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{model_dir}/config.json: {key} is {one_line(repr(value))}, expected a positive whole number"
        )
    return value


def _token_ids(case: Case, model_dir: Path, config: dict[str, object], cache: Path) -> list[list[int]]:
    if isinstance(case.tokens, RandomTokens):
        return random_tokens(case.tokens, _whole_number(config, "vocab_size", model_dir))
    if case.tokens is not None:
        return [list(case.tokens)]
    assert case.text is not None
    # A tokenizer may read any file but the weights.
    files = [path for path in model_dir.iterdir() if path.is_file() and path not in weight_files(model_dir)]
    key = [case.text, digest_files(files), version("transformers"), version("tokenizers")]
    return [cached(cache, "tokens", key, lambda: text_ids(model_dir, str(case.text)))]


def random_tokens(wanted: RandomTokens, vocabulary: int) -> list[list[int]]:
    """Token ids [B][T], the same on every machine.

    :raises ModelError: the vocabulary holds only special ids.
    """
    if vocabulary <= SPECIAL:
        raise ModelError(f"vocab_size is {vocabulary}, and ids 0 to {SPECIAL - 1} are not drawn")
    seeds = [f"tokens:{wanted.seed}", *(f"tokens:{wanted.seed}:{i}" for i in range(1, wanted.batch))]
    rows = [seeded_words(seed, wanted.random - 1) for seed in seeds]
    return [[1, *(SPECIAL + int(word) % (vocabulary - SPECIAL) for word in words)] for words in rows]


NO_TOKENIZER = ("config.json", "generation_config.json"), (".index.json", ".safetensors", ".bin", ".md")
"""Names of files, and their ends, from which alone an older transformers makes a tokenizer with no vocabulary."""


def tokenizer(model_dir: Path) -> Any:
    """The Hugging Face tokenizer of a model directory.

    :raises ModelError: it cannot be loaded.
    """
    import transformers

    names, ends = NO_TOKENIZER
    if all(path.name in names or path.name.endswith(ends) for path in model_dir.iterdir()):
        raise ModelError(f"no usable tokenizer in {model_dir}: there is no file of one")
    try:
        return transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises many kinds
        raise ModelError(
            f"no usable tokenizer in {model_dir}: {one_line(str(error)) or type(error).__name__}"
        ) from error


def text_ids(model_dir: Path, text: str) -> list[int]:
    """The ids that the Hugging Face tokenizer of a model directory gives for a text.

    :raises ModelError: it cannot be loaded, or refuses the text.
    """
    known = tokenizer(model_dir)
    try:
        return list(known(text)["input_ids"])
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ModelError(
            f"the tokenizer of {model_dir} refuses {one_line(ascii(text), 60)}: {one_line(str(error))}"
        ) from error
