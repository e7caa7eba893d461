"""What inputs are drawn from: ``fixtures/hunt.toml``, the config keys that either library reads, and the possible
weights, files, tokens, formats, SAEs and edits.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.hunt.edits import drawn_edit, drawn_recurrence, drawn_recurrent_edit, places_of
from candle_mi_parity.hunt.genes import Genes, case_of, entries_of
from candle_mi_parity.spec.cases import Layout, SaeStatistic, Statistic
from candle_mi_parity.spec.families import MAPPED, RECURRENT, is_bidirectional, transformers_type
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml

LENGTHS = ("sliding_window", "original_max_position_embeddings", "max_position_embeddings", "attention_chunk_size")
"""Config keys that hold a number of tokens, at which behaviour may change."""
LONGEST = 70
"""Longest prompt that a boundary asks for."""
_SUBKEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("partial_rotary_factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "su": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
KINDS = {"config": 54, "rotary": 12, "weights": 9, "layout": 3, "dtype": 4, "sae": 10, "edit": 8, "recurrent": 3}
"""What is added to an input, and how often."""
RECURRENT_KINDS = {"config": 40, "weights": 18, "layout": 3, "dtype": 4, "sae": 8, "edit": 20, "layers": 7}
"""The same of a model without attention; one of two layers alone has more than the first layer does."""
COUNTS, RECURRENT_COUNTS = (1, 2, 3, 5, 6, 8, 9), (1, 2, 3, 5, 8, 13, 20, 33)
"""Numbers of tokens where the config has no length; a recurrence is over all positions before."""
SAE_POINTS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
"""Where an SAE is placed now and then."""
PAIR_TRIES = 12
"""Pairs that are drawn to find one that was not drawn before."""
_RARE = 0.12
"""How often a sub-key of a rotary block is left out, and how often one is added that its type does not need."""


class Menu(TableRow):
    """``fixtures/hunt.toml``."""

    format: Literal[1]
    skip: list[str]
    shape: dict[str, list[Any]]
    values: dict[str, list[Any]]
    rotary: dict[str, list[Any]]
    sae: dict[str, list[Any]]


def load_menu(path: Path = FIXTURES / "hunt.toml") -> Menu:
    """:raises CaseTableError: the file is malformed."""
    return read_toml(path, Menu, CaseTableError)


Weight = Callable[[str, str], float]
"""Family and entry of the menu → how often it is drawn, relative to others."""


@dataclass
class Grammar:
    """Draws inputs of some families.

    :ivar keys: family → config keys that a library reads.
    :ivar defaults: family → config key → values at which a library takes it as if it were not there.
    """

    families: list[str]
    keys: Mapping[str, set[str]]
    defaults: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)
    menu: Menu = field(default_factory=load_menu)
    _genes: dict[str, tuple[list[str], list[tuple[str, str, list[Any]]]]] = field(default_factory=dict)

    def draw(
        self, rng: random.Random, corpus: list[tuple[str, Genes]], weight: Weight, pairs: set[str]
    ) -> tuple[str, Genes]:
        """A family and the genes of one input, which fit together.

        Half of the inputs are pairs of config entries with a prompt at a length of the config, each pair once; a
        quarter starts from what reached something new; the others are free combinations.

        :param corpus: inputs that reached something new.
        :param weight: of an entry of the menu in a family, by which config keys and their values are drawn.
        :param pairs: digests of the pairs that were drawn before, to which this one is added.
        """
        while True:
            family, genes = self._drawn(rng, corpus, weight, pairs)
            try:
                case_of(family, genes)
            except CaseTableError:  # as an edit that is not possible at its hook
                continue
            return family, genes

    def _drawn(
        self, rng: random.Random, corpus: list[tuple[str, Genes]], weight: Weight, pairs: set[str]
    ) -> tuple[str, Genes]:
        chance, genes = rng.random(), Genes()
        if chance < 0.5:
            return self._pair(rng, weight, pairs)
        if corpus and chance < 0.75:
            family, parent = rng.choice(corpus)
            genes = {slot: value for slot, value in parent.items() if rng.random() < 0.8}
            count = rng.choice([0, 1, 1, 2])
        else:
            family = rng.choice(self.families)
            count = rng.choice([1, 2, 3, 3, 3, 4])
        for _ in range(count):
            genes |= self._added(rng, family, genes, weight)
        self._tokens(rng, family, genes)
        return family, genes

    def _pair(self, rng: random.Random, weight: Weight, pairs: set[str]) -> tuple[str, Genes]:
        """Two config entries that were not drawn together before at this place of the prompt."""
        family, genes = "", Genes()
        for _ in range(PAIR_TRIES):
            family = rng.choice(self.families)
            (one, slot, value), (other, slot2, value2) = rng.choices(
                listed := self._config_genes(family), [weight(family, name) for name, _, _ in listed], k=2
            )
            if slot == slot2:
                continue
            genes = {slot: self._expanded(rng, slot, value), slot2: self._expanded(rng, slot2, value2)}
            lengths = [length for length in lengths_of(family, genes) if 1 <= length <= LONGEST]
            own = [length for length in lengths if length not in lengths_of(family, {})]
            count = max(1, rng.choice(own) + rng.choice([-1, 0, 1])) if own else rng.choice([2, 6])
            genes["tokens"] = {"random": count}
            key = f"{family}|{'|'.join(sorted((one, other)))}|{count if own else ''}"
            digest = hashlib.blake2b(key.encode(), digest_size=5).hexdigest()
            if digest not in pairs:
                pairs.add(digest)
                break
        return family, genes

    def _added(self, rng: random.Random, family: str, genes: Genes, weight: Weight) -> Genes:
        """Genes to add to those that an input has."""
        kinds = RECURRENT_KINDS if family in RECURRENT else KINDS
        kind = rng.choices([*kinds], [*kinds.values()])[0]
        if kind == "config":
            slot, value = self._config(rng, family, weight)
            return {slot: value}
        if kind == "rotary":
            return {f"config.{rng.choice(['rope_scaling', 'rope_parameters'])}": ["set", self._rotary(rng, family)]}
        if kind == "weights":
            return _statistic(rng, family, genes)
        if kind == "layout":
            return _layout(rng, family)
        if kind == "dtype":
            return {"dtype": rng.choice(["bfloat16", "float16"])}
        if kind == "recurrent":
            return {"recurrent": drawn_recurrence(rng)}
        if kind == "layers":
            return {"layers": 2}
        if kind == "sae":
            return self._sae(rng, family, genes)
        if family in RECURRENT:
            return drawn_recurrent_edit(rng, genes)
        return drawn_edit(rng, genes, is_bidirectional(config_of(family, genes)))

    def _config(self, rng: random.Random, family: str, weight: Weight) -> tuple[str, list[Any]]:
        genes = self._config_genes(family)
        weights = [weight(family, name) for name, _, _ in genes]
        _, slot, value = rng.choices(genes, weights)[0]
        return slot, self._expanded(rng, slot, value)

    def _expanded(self, rng: random.Random, slot: str, value: list[Any]) -> list[Any]:
        """A value as it is written, now and then in another JSON type, which transformers refuses of a shape."""
        if value == ["set", "layers"]:
            types = ["full_attention", "sliding_attention"]
            return ["set", [rng.choice(types), rng.choice(types)]]
        if value[0] == "set" and slot.removeprefix("config.") not in self.menu.shape and rng.random() < _RARE:
            return ["set", other_type(rng, value[1])]
        return list(value)

    def _config_genes(self, family: str) -> list[tuple[str, str, list[Any]]]:
        """Entry, slot and value of each gene of ``config.json``.

        Of every key that a library reads: the values of the menu, the defaults of both libraries, null, and absent.
        """
        keys = sorted(self.keys[family] - {*self.menu.skip})
        if family not in self._genes or self._genes[family][0] != keys:
            self._genes[family] = (
                keys,
                [
                    (next(iter(entries_of({slot: value}))), slot, value)
                    for key in keys
                    for slot, value in ((f"config.{key}", value) for value in self._values(family, key))
                ],
            )
        return self._genes[family][1]

    def _values(self, family: str, key: str) -> list[list[Any]]:
        base = base_config(family)
        listed = [*self.menu.values.get(key, []), *self.menu.shape.get(key, [])]
        values = [*listed, *([] if key in self.menu.shape else self.defaults.get(family, {}).get(key, []))]
        values = values or [value for value in (base.get(key),) if value is not None] or [True, 2, 0.5, "gelu"]
        different = {json.dumps(value): value for value in values}.values()
        return [["null"], *([["absent"]] if key in base else []), *(["set", value] for value in different)]

    def _rotary(self, rng: random.Random, family: str) -> dict[str, Any]:
        menu = self.menu.rotary
        kind = rng.choice(menu["types"])
        block: dict[str, Any] = {"rope_type" if rng.random() < 0.7 else "type": kind}
        if rng.random() < 0.5:
            block["rope_theta"] = rng.choice(menu["rope_theta"])
        spare = [key for key in menu if key not in ("types", "rope_theta")]
        keys = [*_SUBKEYS[kind], *(key for key in spare if rng.random() < _RARE / 2)]
        half = head_dim(family) // 2
        for key in keys:
            if key in ("short_factor", "long_factor"):
                step = 0.1 if key == "short_factor" else 0.5
                block[key] = [1.0 + step * place for place in range(half)]
            else:
                block[key] = rng.choice(menu[key])
        return {key: value for key, value in block.items() if rng.random() > _RARE}

    def _sae(self, rng: random.Random, family: str, genes: Genes) -> Genes:
        if "sae.npz" in genes or rng.random() < 0.1:
            return {"sae.npz": rng.choice([1e-6, 0.1, 1.0, 100.0])}
        more: Genes = {}
        for _ in range(rng.choice([1, 2, 3])):
            kind = rng.choices(
                ("cfg", "threshold", "weights", "statistics", "point", "scaling"), (60, 10, 8, 14, 5, 3)
            )[0]
            if kind == "cfg":
                key = rng.choice([*self.menu.sae])
                absent = rng.random() < 0.2
                more[f"sae.cfg.{key}"] = ["absent"] if absent else ["set", rng.choice(self.menu.sae[key])]
                if more[f"sae.cfg.{key}"] == ["set", "topk"] and rng.random() < 0.8:
                    more["sae.cfg.activation_fn_kwargs"] = ["set", {"k": rng.choice([1, 4, 31, 32])}]
            elif kind == "threshold":
                more["sae.threshold"] = rng.choice([-2.0, -0.5, 0.0, 1e-30, 0.25, 4.0])
                more["sae.cfg.architecture"] = ["set", "jumprelu"]
            elif kind == "weights":
                more["sae.weights"] = rng.choice(["float64", "bfloat16"])
            elif kind == "statistics":
                more[f"sae.statistics.{rng.choice([*SaeStatistic])}"] = True
            elif kind == "point":
                there = hook_names(1, family in RECURRENT)
                more["sae.point"] = rng.choice([point for point in SAE_POINTS if f"blocks.0.{point}" in there])
            else:
                more["sae.scaling_factor"] = True
        return more

    def _tokens(self, rng: random.Random, family: str, genes: Genes) -> None:
        """Mostly a short prompt; where the config has a length, often one at, below or above it."""
        if "tokens" in genes and rng.random() < 0.5:
            return
        lengths = [length for length in lengths_of(family, genes) if 1 <= length <= LONGEST - 2]
        count = rng.choice(RECURRENT_COUNTS if family in RECURRENT else COUNTS)
        if lengths and rng.random() < 0.7:
            count = max(1, rng.choice(lengths) + rng.choice([-1, 0, 1, 2]))
        kind = rng.random()
        changes = [edit for slot, edit in genes.items() if slot.startswith("edit.") or slot == "recurrent"]
        edited = bool(changes)
        if edited:
            places = [place for change in changes for place in places_of(change)]
            count = max([count, *(place + 1 for place in places)])
        if kind < 0.08 and not edited:
            genes["tokens"] = {"random": count, "batch": rng.choice([2, 3])}
        elif kind < 0.14:
            genes["tokens"] = [rng.choice([0, 1, 2])] * count
        else:
            genes["tokens"] = {"random": count} | ({"seed": rng.randrange(4)} if rng.random() < 0.3 else {})


@cache
def _base_text(family: str) -> str:
    return (FIXTURES / f"models/{family}.json").read_text(encoding="utf-8")


def base_config(family: str) -> dict[str, Any]:
    """The config of ``fixtures/models`` that a family's inputs start from."""
    found: dict[str, Any] = json.loads(_base_text(transformers_type(family)))
    return found | {"model_type": family}


def config_of(family: str, genes: Genes) -> dict[str, Any]:
    """The config of an input."""
    config = base_config(family)
    for slot, value in genes.items():
        key = slot.removeprefix("config.")
        if key != slot and value[0] == "absent":
            config.pop(key, None)
        elif key != slot:
            config[key] = value[1] if value[0] == "set" else None
    return config


def head_dim(family: str) -> int:
    """Width of a head of the plain config."""
    config = base_config(family)
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def other_type(rng: random.Random, value: Any) -> Any:
    """The same value in another JSON type."""
    if isinstance(value, bool):
        return rng.choice([int(value), str(value).lower()])
    if isinstance(value, int):
        return rng.choice([float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([int(value) if value == int(value) else value, str(value)])
    return value


def lengths_of(family: str, genes: Genes) -> list[int]:
    """The numbers of tokens in an input's config, also those in a rotary block."""
    config = config_of(family, genes)
    blocks = [config, *(held for held in config.values() if isinstance(held, dict))]
    found = {block.get(key) for block in blocks for key in LENGTHS}
    return sorted(length for length in found if type(length) is int)


def _statistic(rng: random.Random, family: str, genes: Genes) -> Genes:
    """A statistic of weights that the family's plain config has."""
    config = base_config(family)
    recurrent = family in RECURRENT
    possible = [one for one in Statistic if recurrent or not one.of_recurrence]
    if config["tie_word_embeddings"] and genes.get("config.tie_word_embeddings") != ["set", False]:
        possible.remove(Statistic.HEAD_EQUAL)
    biased = recurrent or transformers_type(family) in ("qwen2", "starcoder2")
    if not biased and genes.get("config.attention_bias") != ["set", True]:
        possible.remove(Statistic.BIAS_LARGE)
    return {f"weights.{rng.choice(possible)}": True}


def _layout(rng: random.Random, family: str) -> Genes:
    if rng.random() < 0.3:
        return {"shards": rng.choice([2, 3])}
    if rng.random() < 0.2:
        return {"loader": "pretrained"} | ({"layout.pickle": True} if rng.random() < 0.3 else {})
    possible = [each for each in Layout if each not in (Layout.PICKLE, Layout.SHARDS_BESIDE, Layout.TOKENIZER)]
    if family in RECURRENT:
        possible = [each for each in possible if each not in (Layout.NO_PREFIX, Layout.MISSING_NORM)]
    if not base_config(family)["tie_word_embeddings"]:
        possible.remove(Layout.STORED_HEAD)
    return {f"layout.{rng.choice(possible)}": True}


def all_families(glob: str) -> list[str]:
    """The families whose name matches a glob.

    :raises CaseTableError: there is none.
    """
    import fnmatch

    there = (*MAPPED, *RECURRENT)
    found = [name for name in there if fnmatch.fnmatchcase(name, glob)]
    if not found:
        raise CaseTableError(f"no family matches {glob!r}; there are {', '.join(there)}")
    return found
