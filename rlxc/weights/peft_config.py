"""``adapter_config.json`` of a PEFT folder: every key is understood, known to change nothing, or refused.

Facts from PEFT's ``LoraConfig`` and from how ``LoraModel`` uses it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlxc.errors import FormatError, UnsupportedError
from rlxc.weights.files import parse_json, read_bytes
from rlxc.weights.gguf_header import DAMAGED, quote
from rlxc.weights.lora import lora_scale

Number = TypeVar("Number", int, float)

_UNDERSTOOD = frozenset(
    "alora_invocation_tokens alpha_pattern base_model_name_or_path bias ensure_weight_tying fan_in_fan_out "
    "init_lora_weights lora_alpha modules_to_save peft_type r rank_pattern target_modules use_dora use_rslora".split()
)
# Names and versions; what only training reads; and what chooses the modules, which the tensors name themselves.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping corda_config eva_config exclude_modules inference_mode layers_pattern layers_to_transform "
    "loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config "
    "task_type velora_config".split()
)
_SOUND_INITS = (True, False, None, "eva", "gaussian", "mica", "orthogonal")
"""Initial values of a and b that leave the base model as it is; the others take a part out of it."""

_MOST_STEPS = 10**5
"""What matching a pattern of module names may cost; names have at most 100 letters or so."""


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a PEFT LoRA that change its arithmetic.

    Attributes:
        path: the file.
        sha256: of its bytes.
        base_model: name or path of the base model, as a note; None if there is none.
        rank: of modules without a pattern of their own.
        alpha: likewise.
        rank_pattern: rank by pattern of module names; the first that matches counts.
        alpha_pattern: likewise.
        rank_stabilised: whether scales are ``alpha / sqrt(rank)``.
        uses_dora: whether every pair has a magnitude.
        ties_weights: whether what is done to the embedding is done to a tied output as well.
        targets: names of the adapted modules, or their ends; None if the file gives a pattern.
        saved: names of modules that are stored whole, or their ends.
        invocation_tokens: those of an activated LoRA.
    """

    path: Path
    sha256: bytes
    base_model: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    uses_dora: bool
    ties_weights: bool
    targets: tuple[str, ...] | None
    saved: tuple[str, ...]
    invocation_tokens: tuple[int, ...]
    _patterns: dict[str, re.Pattern[str]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in {**self.rank_pattern, **self.alpha_pattern}:
            self._patterns[pattern] = _compiled(pattern, self.path)

    def rank_of(self, module: str) -> int:
        """The rank of a module, given by its name in the base model."""
        return self._first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return self._first_match(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What the product of a module's b and a is multiplied with."""
        return lora_scale(self.alpha_of(module), self.rank_of(module), rank_stabilised=self.rank_stabilised)

    def is_target(self, module: str) -> bool:
        """Whether the module may be adapted."""
        return self.targets is None or any(f".{module}".endswith(f".{name}") for name in self.targets)

    def stores_whole(self, module: str) -> bool:
        """Whether the module, or one that it is part of, is stored whole."""
        return any(saves(name, module) for name in self.saved)

    def _first_match(self, by_pattern: Mapping[str, Number], module: str, default: Number) -> Number:
        return next((by_pattern[key] for key in by_pattern if self._patterns[key].match(module)), default)


def saves(name: str, module: str) -> bool:
    """Whether an entry of modules_to_save means the module: the name of it, or of what it is part of, ends so."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def read_peft_config(path: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        FormatError: it is missing or damaged, or a value is of the wrong type.
        UnsupportedError: it asks for something that is not implemented, or has an unknown key.
    """
    raw = read_bytes(path)
    fields = _Fields(path, parse_json(raw, path))
    fields.refuse_the_rest()
    targets = fields.values.get("target_modules")
    return PeftConfig(
        path=path,
        sha256=hashlib.sha256(raw).digest(),
        base_model=fields.text("base_model_name_or_path"),
        rank=fields.rank("r", fields.values.get("r", 8)),
        alpha=fields.number("lora_alpha", fields.values.get("lora_alpha", 8)),
        rank_pattern={key: fields.rank("rank_pattern", value) for key, value in fields.table("rank_pattern")},
        alpha_pattern={
            key: fields.number("alpha_pattern", value) for key, value in fields.table("alpha_pattern")
        },
        rank_stabilised=fields.flag("use_rslora"),
        uses_dora=fields.flag("use_dora"),
        ties_weights=fields.flag("ensure_weight_tying"),
        targets=None if targets is None or isinstance(targets, str) else fields.names("target_modules"),
        saved=fields.names("modules_to_save"),
        invocation_tokens=fields.tokens("alora_invocation_tokens"),
    )


@dataclass(frozen=True)
class _Fields:
    """Typed access to the keys of the file; an absent key has PEFT's default."""

    path: Path
    values: Mapping[str, Any]

    def error(self, key: str, wanted: str) -> FormatError:
        return FormatError(
            f"{key} is {quote(self.values.get(key))}, not {wanted}", source=self.path, remedy=DAMAGED
        )

    def unsupported(self, key: str, remedy: str) -> UnsupportedError:
        return UnsupportedError(f"{key} is {quote(self.values.get(key))}", source=self.path, remedy=remedy)

    def refuse_the_rest(self) -> None:
        if self.values.get("peft_type") != "LORA":
            raise self.unsupported("peft_type", "only 'LORA' is implemented")
        if self.flag("fan_in_fan_out"):
            raise self.unsupported("fan_in_fan_out", "weights stored as [in, out] are not implemented")
        if self.values.get("bias", "none") != "none":
            raise self.unsupported("bias", "trained biases are not implemented: only 'none' is")
        init = self.values.get("init_lora_weights", True)
        if isinstance(init, (dict, list)) or init not in _SOUND_INITS:
            raise self.unsupported(
                "init_lora_weights",
                "it changes the base model too: save the adapter converted to the original base model",
            )
        if self.values.get("target_parameters"):
            raise self.unsupported(
                "target_parameters", "adapters of modules are implemented, not of parameters such as experts"
            )
        for key, value in self.values.items():
            # Every release of PEFT adds keys: one that is off changes nothing.
            if key not in _UNDERSTOOD | _WITHOUT_EFFECT and value not in (None, False, 0, "", [], {}):
                raise UnsupportedError(
                    f"{quote(key)} is {quote(value)}",
                    source=self.path,
                    remedy="this option is not implemented, and may change the arithmetic",
                )

    def flag(self, key: str) -> bool:
        value = self.values.get(key) or False
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
            raise self.error(key, "a finite number")
        return float(value)

    def rank(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.error(key, "a positive integer")
        return value

    def table(self, key: str) -> list[tuple[str, Any]]:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return list(value.items())

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, "a list of module names")
        return tuple(value)

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value
        ):
            raise self.error(key, "a list of token ids")
        return tuple(value)


def _compiled(pattern: str, path: Path) -> re.Pattern[str]:
    """A pattern as PEFT reads it: it matches a whole name, or the end of one after a dot.

    Patterns come from the file: one that could take for ever to match is refused.
    """
    repeats = sum(pattern.count(sign) for sign in "*+{")
    choices = sum(pattern.count(sign) for sign in "|?")
    nested = any(group in pattern for group in (")*", ")+", "){"))
    if nested or len(pattern) > 500 or 100**repeats * 2**choices > _MOST_STEPS:
        raise UnsupportedError(
            f"pattern {quote(pattern)} of module names is too complex",
            source=path,
            remedy="write it with fewer repetitions and alternatives, or name the modules",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise FormatError(
            f"pattern {quote(pattern)} of module names is no sound regular expression: {error}",
            source=path,
            remedy=DAMAGED,
        ) from None
