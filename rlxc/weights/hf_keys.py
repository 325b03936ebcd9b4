"""Typed access to the keys of a JSON object, so that no key goes unnoticed.

The counterpart, for Hugging Face's configurations, of what `rlxc.models.config` does for GGUF metadata: a key that
nobody reads may change the arithmetic, and is refused by name. ``null`` means that a key is absent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlxc.errors import ModelError, Problems, UnsupportedError
from rlxc.weights.gguf_header import quote


class Keys:
    """The keys of one object in a file, remembering which were read.

    Args:
        values: the object.
        source: the file, for error messages.
        where: what leads to the object within the file, such as ``rope_scaling.``.
    """

    def __init__(self, values: Mapping[str, Any], source: Path, where: str = "") -> None:
        self.values, self.source, self.where = values, source, where
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer in ``low..high``; without default it must be there.

        Raises:
            ModelError: it is missing, no integer, or out of range.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, not {quote(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, which is outside {low}..{high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; without default it must be there.

        Raises:
            ModelError: it is missing, or no such number.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
            raise self.error(key, f"must be a positive number, not {quote(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ModelError: it is neither.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {quote(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without default it must be there.

        Raises:
            ModelError: it is missing or no string.
        """
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {quote(value)}")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None if the key is absent.

        Raises:
            ModelError: it is something else.
        """
        if not self.has(key):
            return None
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"must be a list of strings, not {quote(value)}")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of so many positive finite numbers.

        Raises:
            ModelError: it is missing or something else.
        """
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"must be a list of {count} numbers, not {quote(value)}")
        return [Keys({key: number}, self.source, self.where).number(key) for number in value]

    def group(self, key: str) -> Keys | None:
        """The object under a key, or None if it is absent or empty.

        Raises:
            ModelError: it is no object.
        """
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {quote(value)}")
        return Keys(value, self.source, f"{self.where}{key}.") if value else None

    def only(self, key: str, *values: object) -> None:
        """Accept a key that is absent or has one of these values.

        Raises:
            UnsupportedError: it has another.
        """
        if not self.has(key):
            return
        found = self._value(key, None)
        # 1 == True, but a flag is no number.
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values):
            expected = " or ".join(map(repr, values))
            raise self.unsupported(key, f"only {expected} is")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuse what was not read; ``harmless`` keys do not change the arithmetic.

        Raises:
            UnsupportedError: with a part for each of them.
        """
        problems = Problems()
        for key in sorted(key for key in self.values if key not in self._read and key not in harmless):
            if self.has(key):
                problems.add(
                    self.unsupported(key, "it may change the model's arithmetic, so it is not ignored")
                )
        if problems.found:
            raise problems.error()

    def error(self, key: str, problem: str) -> ModelError:
        """The error that a key ``is`` or ``must be`` something."""
        return ModelError(f"{self.where}{key} {problem}", source=self.source)

    def unsupported(self, key: str, remedy: str) -> UnsupportedError:
        """The error that the value of a key is not implemented."""
        return UnsupportedError(
            f"{self.where}{key} = {quote(self.values.get(key))} is not implemented",
            source=self.source,
            remedy=remedy,
        )

    def _value(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value
