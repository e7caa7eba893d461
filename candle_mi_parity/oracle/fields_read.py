"""The fields of ``config.json`` that transformers reads, recorded while a model is built and run.

Of a recurrent model, which transformers lacks, also those that :mod:`candle_mi_parity.models.rwkv` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from candle_mi_parity.files.cache import cached
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.quiet import quiet, transformers_runs
from candle_mi_parity.models.transformers_config import load_config
from candle_mi_parity.models.transformers_private import config_fields, import_model
from candle_mi_parity.oracle.provenance import PACKAGE, code_of, made_with
from candle_mi_parity.spec.counterfactual import ROTARY

LISTING = frozenset({"to_dict", "to_diff_dict", "dict_dtype_to_str", "validate_token_ids"})
"""Functions of transformers that visit every attribute without using it: they print or copy the config, or warn of a
``_token_id`` outside the vocabulary."""


def cached_fields_read(directory: Path, model_type: str, cache: Path) -> set[str]:
    """:func:`fields_read`, from the cache or recorded."""
    return set(cached(cache, "fields", _key(directory, model_type), lambda: sorted(fields_read(directory))))


def cached_fields_built(directory: Path, model_type: str, cache: Path) -> set[str]:
    """The fields that are read while a model is built without weights, which takes a second.

    :raises ModelError: transformers cannot build it.
    """
    key = ["built", *_key(directory, model_type)]
    return set(cached(cache, "fields", key, lambda: sorted(_fields_built(directory))))


def _key(directory: Path, model_type: str) -> list[object]:
    return [read_config(directory), made_with(model_type), code_of(Path(__file__).read_text(encoding="utf-8"))]


def _fields_built(directory: Path) -> set[str]:
    import torch
    import transformers

    with transformers_runs(directory):
        kind = type(config := load_config(directory))
        import_model(config)
    read: set[str] = set()
    with transformers_runs(directory), _recorded(kind, read), torch.device("meta"):
        config = load_config(directory)
        config._attn_implementation = "eager"  # whatever the config says
        transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name for name in read if _is_field(kind, name)}


def fields_read(directory: Path) -> set[str]:
    """Fields that transformers reads while it loads a model directory and runs it on eight tokens.

    These are attributes and keys of the rotary dictionary that transformers' code reads, and keys of ``config.json``
    of which configuration code leaves no attribute; without names with an underscore, members of the class (methods,
    parallel plans), and reads in :data:`LISTING`.
    """
    import torch

    from candle_mi_parity.oracle.hooks import forward, load_model

    config = read_config(directory)
    with quiet():
        kind = type(load_config(directory))
    read: set[str] = set()
    with quiet(), _recorded(kind, read):
        model: Any = load_model(directory)
        forward(model, torch.arange(8)[None])
    consumed = set(config) - set(vars(model.config)) - {"model_type"}
    return {name for name in read if _is_field(kind, name)} | consumed


@contextmanager
def _recorded(kind: type[Any], read: set[str]) -> Iterator[None]:
    """Record the names that transformers' code reads from configs of a class and their rotary dictionaries."""
    import transformers

    plain: Any = kind.__getattribute__
    places = (str(Path(str(transformers.__file__)).parent), str(PACKAGE / "models" / "rwkv"))

    def note(name: str, frame: Any) -> None:
        if frame.f_code.co_filename.startswith(places) and frame.f_code.co_name not in LISTING:
            read.add(name)

    class Rotary(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            note(f"{ROTARY}.{key}", sys._getframe(1))
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            note(f"{ROTARY}.{key}", sys._getframe(1))
            return super().get(key, default)

    def getattribute(self: object, name: str) -> Any:
        note(name, sys._getframe(1))
        value = plain(self, name)
        if name == ROTARY and type(value) is dict:
            value = plain(self, "__dict__")[name] = Rotary(value)
        return value

    kind.__getattribute__ = getattribute  # type: ignore[assignment]
    try:
        yield
    finally:
        del kind.__getattribute__


def _is_field(kind: type[Any], name: str) -> bool:
    """Whether a name is a declared field, a settable property, or not a member of the class."""
    if name.startswith("_"):
        return False
    if name in config_fields(kind) or not hasattr(kind, name) or "." in name:
        return True
    return getattr(getattr(kind, name), "fset", None) is not None
