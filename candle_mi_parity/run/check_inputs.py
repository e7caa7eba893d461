"""The inputs of ``check``: prompts, an SAE with its hook point, and interventions."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from candle_mi_parity.errors import CaseTableError, ParityError, SaeError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_bytes
from candle_mi_parity.models.checkpoint import local_path
from candle_mi_parity.models.generate import seeded_words
from candle_mi_parity.spec.cases import BELOW, SaeFile, SaePlace
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.forecast import LENGTHS
from candle_mi_parity.spec.table import MAX_TOML_BYTES, TableRow

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PROMPTS_BYTES = 16 << 20
LONGEST = 256
"""Largest number of tokens of a built-in prompt; a longer one costs minutes."""


class PromptError(ParityError):
    """A prompt, or a file of prompts, cannot be used."""


class Prompt(TableRow):
    """:ivar id: a plain name, which is used in file names."""

    id: str
    text: str | None = None
    tokens: list[int] | None = None


def prompts_of(texts: list[str], file: Path | None, tokens: list[str]) -> list[Prompt]:
    """The prompts of a command line; those without an id are called ``p1``, ``p2``, …

    :param tokens: lists of token ids, as ``1,2,3``.
    :raises PromptError: an unreadable file, an invalid line, a duplicate id.
    """
    found: list[tuple[str, dict[str, Any]]] = [("--prompt", {"text": text}) for text in texts]
    found += list(_lines(file)) if file else []
    for text in tokens:
        if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
            raise PromptError(f"--tokens {one_line(text, 60)}: expected token ids such as 1,450,7483")
        found.append(("--tokens", {"tokens": [int(token) for token in text.split(",")]}))
    prompts = []
    for number, (where, row) in enumerate(found, 1):
        try:
            prompt = Prompt.model_validate({"id": f"p{number}"} | row)
        except ValidationError as error:
            raise PromptError(f"{where}: {_wrong(str(error.errors()[0]['loc'][0]))}") from error
        if (prompt.text is None) == (prompt.tokens is None):
            raise PromptError(f"{where}: give exactly one of `text` and `tokens`")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt.text or ""):
            raise PromptError(
                f"{where}: {one_line(ascii(prompt.text), 60)} is not valid Unicode; expected UTF-8 text"
            )
        if not re.match(BELOW, prompt.id):
            raise PromptError(f"{where}: the id {prompt.id!a} is not a plain name")
        prompts.append(prompt)
    ids = [prompt.id for prompt in prompts]
    if doubled := sorted({id for id in ids if ids.count(id) > 1}):
        raise PromptError(f"prompt ids given twice: {', '.join(doubled)}")
    return prompts


def _wrong(key: str) -> str:
    """What is wrong with a key of a prompt."""
    expected = {"id": "a string", "text": "a string", "tokens": "a list of token ids"}
    if key in expected:
        return f"`{key}` must be {expected[key]}"
    return f"there is no key {one_line(key, 60)!r}; a prompt has {', '.join(expected)}"


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and content of each prompt of a file.

    ``*.jsonl`` has ``id``, ``text`` or ``tokens``; any other file has one text a line.
    """
    try:
        lines = read_bytes(file, MAX_PROMPTS_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise PromptError(f"{file}: {_why(error)}") from error
    if not any(line.strip() for line in lines):
        raise PromptError(f"{file}: holds no prompt")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield f"{file}:{number}", {"text": line}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{file}:{number}: not JSON: {one_line(str(error))}") from error
        if not isinstance(row, dict):
            raise PromptError(f'{file}:{number}: expected an object such as {{"id": "a", "text": "…"}}')
        yield f"{file}:{number}", row


def built_in(config: dict[str, Any], has_tokenizer: bool, edited: bool) -> list[Prompt]:
    """The default prompts, which exceed the lengths in a config.

    :param edited: whether there are interventions, whose positions a short prompt does not have.
    :raises PromptError: the config has no vocabulary size.
    """
    vocabulary, limit = config.get("vocab_size"), config.get("max_position_embeddings")
    if type(vocabulary) is not int or vocabulary < 1:
        raise PromptError("config.json has no vocab_size, so that no prompt can be made: give --tokens or --prompt")
    limit = min(LONGEST, limit) if type(limit) is int and limit > 0 else LONGEST
    scaling = config.get("rope_scaling")
    lengths = [config.get(key) or (scaling.get(key) if isinstance(scaling, dict) else None) for key in LENGTHS]
    beyond = [length + 8 for length in lengths if type(length) is int and 0 < length <= limit - 8]

    def drawn(name: str, length: int) -> Prompt:
        words = seeded_words(f"check:{length}", length)
        return Prompt(id=name, tokens=[int(word) % vocabulary for word in words])

    prompts = [drawn("random", min(24, limit))]
    prompts += [drawn(f"beyond-{length - 8}", length) for length in dict.fromkeys(beyond)]
    if edited:
        return prompts
    if has_tokenizer:
        prompts.insert(0, Prompt(id="text", text="The capital of France is Paris, and the capital of Japan is"))
        prompts.insert(1, Prompt(id="non-ascii", text="Zürich, 東京 und Москва: naïve café 🌍"))
    return [*prompts, drawn("one-token", 1)]


def sae_of(text: str, hook: str | None) -> SaeFile:
    """An SAE: an NPZ, a directory of SAELens, or ``REPO[@REVISION][:FILE_OR_FOLDER]`` of the hub.

    :param hook: its hook point; where the SAE's config has one too, they must agree.
    :raises SaeError: there is no SAE, no hook point, or two different ones.
    :raises HubError: the download failed.
    """
    from candle_mi_parity.models.hub import fetch_sae
    from candle_mi_parity.models.saelens import own_hook

    path = local_path(text, SaeError)
    if path.exists() or text.startswith((".", "/", "~")) or "/" not in text:
        if not path.exists():
            raise SaeError(f"SAE {text} does not exist")
        if path.is_dir() and not (path / "cfg.json").is_file():
            raise SaeError(f"SAE {text} has no cfg.json; expected a directory as SAELens saves one, or an NPZ")
        if path.is_file() and path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise SaeError(
                f"SAE {text}: expected an NPZ, or the directory in which SAELens saved weights and cfg.json"
            )
        file, there = {"path": str(path.resolve())}, path
    else:
        repo, _, inner = text.partition(":")
        name, _, revision = repo.partition("@")
        file = {"path": inner or ".", "repo": name, "revision": revision or "main"}
        there = fetch_sae(SaeFile.model_validate({"layer": 0} | file))[0]
    own = own_hook(there) if there.is_dir() else None
    if hook and own and hook != own:
        raise SaeError(f"SAE {text}: its own config places it at {one_line(own)}, and --hook says {hook}")
    if not (hook or own):
        raise SaeError(f"SAE {text} does not say where it reads: give --hook, as blocks.12.hook_resid_post")
    return SaeFile.model_validate(_place(hook or str(own), text) | file)


def _place(hook: str, text: str) -> dict[str, Any]:
    points = get_args(SaePlace.model_fields["point"].annotation)
    found = re.fullmatch(rf"blocks\.(\d{{1,4}})\.({'|'.join(points)})", hook)
    if found is None:
        raise SaeError(
            f"SAE {text}: {one_line(hook)} is not a place for an SAE; expected blocks.LAYER.{{{','.join(points)}}}"
        )
    return {"layer": int(found[1]), "point": found[2]}


def read_edits(path: Path) -> list[Edit]:
    """``[[edits]]`` rows as in ``fixtures/cases.toml``.

    ``replace``, ``add`` and ``patch_at`` may take a vector [d] from ``file`` (safetensors, relative to the TOML) and
    ``key``.

    :raises CaseTableError: unreadable, an unknown key, no such vector.
    """
    try:
        found = tomllib.loads(read_bytes(path, MAX_TOML_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CaseTableError(f"{path}: {_why(error)}") from error
    rows = found.get("edits")
    if set(found) != {"edits"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CaseTableError(f"{path}: expected [[edits]] rows alone, found {one_line(str(sorted(found)))}")
    return edits_of(rows, str(path), path.parent)


def edits_of(rows: list[dict[str, Any]], where: str, directory: Path) -> list[Edit]:
    """Rows as interventions.

    :param where: start of error messages.
    :param directory: to which ``file`` is relative.
    :raises CaseTableError: an unknown key, no such vector.
    """
    given = [dict(row) for row in rows]
    for row in given:
        if "file" in row:
            row["values"] = _vector(directory / str(row.pop("file")), str(row.pop("key", "vector")))
    try:
        return TypeAdapter(list[Edit]).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CaseTableError(f"{where}: edits.{one_line(place)}: {one_line(first['msg'])}") from error


def _vector(path: Path, key: str) -> list[float]:
    try:
        file = TensorFile(path)
        if key not in file.keys():  # noqa: SIM118 -- safetensors' own, not a dict's
            raise CaseTableError(f"{path}: no tensor {key!a}; it holds {one_line(', '.join(sorted(file.keys())))}")
        vector = file.tensor(key).astype(np.float64).reshape(-1) if file.kind(key)[0] != "BF16" else None
    except (OSError, SafetensorError) as error:
        raise CaseTableError(f"{path}: not readable safetensors: {_why(error)}") from error
    if vector is None or not np.isfinite(vector).all():
        raise CaseTableError(f"{path}: {key} holds NaN or Inf, or is bfloat16; save a finite float32 vector")
    return [float(value) for value in vector]


def _why(error: Exception) -> str:
    return one_line((isinstance(error, OSError) and error.strerror) or str(error))
