"""The kinds of value a configuration key can hold, each with its check and the words that describe it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Annotated, Any, TypeAlias, cast

from pydantic import PlainValidator

_DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
}


class Mismatch(ValueError):
    """A value is not what its key takes: `expected` describes what is, `hint` says what to type instead."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.hint = hint


def nearest(word: str, known: list[str]) -> str | None:
    """Return the entry of `known` that `word` is most likely meant to be, or None."""
    by_plain = {plain(name): name for name in known}
    if plain(word) in by_plain:
        return by_plain[plain(word)]
    close = get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.6)
    return next(name for name in known if name.lower() == close[0]) if close else None


def plain(word: str) -> str:
    """Return `word` in lower case without punctuation: what two spellings of one key have in common."""
    return "".join(character for character in word.lower() if character.isalnum())


def _number_hint(value: object) -> str:
    if isinstance(value, bool):
        return "true and false are no numbers"
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f"write {int(number) if number.is_integer() else number} without quotes"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def to_whole(value: Any, minimum: int, expected: str) -> int:
    """Return `value` as an int; floats such as 5e8 count when they have no fraction. Raises Mismatch."""
    if not _is_number(value):
        raise Mismatch(expected, _number_hint(value))
    if not math.isfinite(value) or value != int(value) or value < minimum:
        raise Mismatch(expected)
    return int(value)


def whole(minimum: int) -> PlainValidator:
    """Check for a whole number that is not below `minimum`."""
    return PlainValidator(lambda value: to_whole(value, minimum, f"a whole number >= {minimum}"))


def number(minimum: float = -math.inf, maximum: float = math.inf, *, above: float = -math.inf) -> PlainValidator:
    """Check for a finite number in [minimum, maximum] and greater than `above`."""
    expected = "a number"
    if above > -math.inf:
        expected += f" > {above:g}"
    elif minimum > -math.inf:
        expected += f" >= {minimum:g}"
    if maximum < math.inf:
        expected += f" and <= {maximum:g}"

    def check(value: Any) -> float:
        if not _is_number(value):
            raise Mismatch(expected, _number_hint(value))
        if not math.isfinite(value) or not minimum <= value <= maximum or value <= above:
            raise Mismatch(expected)
        return float(value)

    return PlainValidator(check)


def choice(*options: str) -> PlainValidator:
    """Check for one of `options`, in any case; the value is the option as written here."""
    expected = "one of " + ", ".join(f'"{option}"' for option in options)

    def check(value: Any) -> str:
        for option in options:
            if isinstance(value, str) and value.lower() == option.lower():
                return option
        meant = nearest(value, list(options)) if isinstance(value, str) else None
        raise Mismatch(expected, f'write "{meant}"' if meant else "")

    return PlainValidator(check)


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        raise Mismatch("true or false", f"write {value.lower()} without quotes")
    if value in (0, 1):
        raise Mismatch("true or false", f"write {str(bool(value)).lower()}")
    raise Mismatch("true or false")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch("a text in quotes")
    return value


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise Mismatch("a path in quotes")
    return str(value)


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise Mismatch("a list of texts in quotes")
    return list(texts)


def _counts(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or not all(_is_number(item) and item == int(item) for item in value):
        raise Mismatch("a list of whole numbers")
    return [int(item) for item in value]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Mismatch("an object { }")
    return dict(value)


def _steps_or_never(value: Any) -> int | None:
    if isinstance(value, float) and value == math.inf:
        return None
    return to_whole(value, 1, "a whole number >= 1, or inf for never")


def _dtype(value: Any) -> str:
    name = str(value).lower().removeprefix("torch.")  # torch.dtype objects come from Python callers
    if name not in _DTYPES:
        raise Mismatch('one of "fp32", "fp16", "bf16"')
    return _DTYPES[name]


def per_group(check: PlainValidator) -> PlainValidator:
    """Check for one value, or a list with one value a parameter group."""
    one = cast("Callable[[Any], Any]", check.func)

    def check_all(value: Any) -> Any:
        return [one(item) for item in value] if isinstance(value, (list, tuple)) else one(value)

    return PlainValidator(check_all)


Count: TypeAlias = Annotated[int, whole(0)]
PositiveCount: TypeAlias = Annotated[int, whole(1)]
StepsOrNever: TypeAlias = Annotated[int | None, PlainValidator(_steps_or_never)]
Number: TypeAlias = Annotated[float, number()]
Rate: TypeAlias = Annotated[float, number(0)]
PositiveRate: TypeAlias = Annotated[float, number(above=0)]
Fraction: TypeAlias = Annotated[float, number(0, 1)]
Flag: TypeAlias = Annotated[bool, PlainValidator(_flag)]
Text: TypeAlias = Annotated[str, PlainValidator(_text)]
FilePath: TypeAlias = Annotated[str, PlainValidator(_path)]
Texts: TypeAlias = Annotated[list[str], PlainValidator(_texts)]
Counts: TypeAlias = Annotated[list[int], PlainValidator(_counts)]
Object: TypeAlias = Annotated[dict[str, Any], PlainValidator(_object)]
Dtype: TypeAlias = Annotated[str, PlainValidator(_dtype)]
