"""Dataclasses whose fields have a help text and limits, and are checked."""

import dataclasses
import operator
import types
import typing
from typing import Any

COUNT = {"above": 0, "below": 2**31}
# The largest float32 is 3.4e38.
POSITIVE = {"above": 0, "below": 3e38}
NOT_NEGATIVE = {"at least": 0, "below": 3e38}

_BOUNDS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt}


def setting(help: str, limits: dict | None = None, **default: Any) -> Any:
    """Returns a dataclass field with the help text of its flag.

    Args:
        help: string, the help text.
        limits: dictionary, as for `check`.
        **default: `default`, the default value. A field without a default is required.
            A new field of an existing class needs a default, for older runs to resume.
    """
    return dataclasses.field(metadata={"help": help, "limits": limits or {}}, **default)


def check(name: str, value: Any, kind: Any, limits: dict) -> None:
    """Raises `ValueError` unless a value has the right type and is within limits.

    Args:
        name: string, the name of the value.
        value: the value.
        kind: type, one of `int`, `float`, `bool`, `str`, `tuple[kind, ...]` and
            `kind | None`.
        limits: dictionary of bounds, at the keys `"above"`, `"at least"` and `"below"`,
            or of all possible values, at the key `"options"`. In a tuple, they hold for
            each element.
    """
    if isinstance(kind, types.UnionType):
        kind, _ = typing.get_args(kind)
        if value is None:
            return
    is_list = typing.get_origin(kind) is tuple
    if is_list:
        kind, _ = typing.get_args(kind)
    options = limits.get("options")
    bounds = {word: limits[word] for word in limits if word in _BOUNDS}
    if options:
        wanted = f"one of {', '.join(map(str, options))}"
    elif kind in (int, float):
        wanted = f"a number {' and '.join(f'{w} {bounds[w]}' for w in bounds)}"
        wanted += ", an integer" if kind is int else ""
    else:
        wanted = {bool: "true or false", str: "a string"}[kind]

    def possible(element):
        # `bool` is a subclass of `int`, and an int stands for a float.
        return (
            type(element) in (kind, int if kind is float else kind)
            and (not options or element in options)
            and all(_BOUNDS[word](element, bounds[word]) for word in bounds)
        )

    elements = value if is_list and isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != is_list or not all(map(possible, elements)):
        wanted = f"a list, each element {wanted}" if is_list else wanted
        raise ValueError(f"{name}={value!r}: use {wanted}.")


class Settings:
    """Base class of dataclasses whose fields are made by `setting`, and checked."""

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for field in self.settings():
            limits = field.metadata["limits"]
            check(field.name, getattr(self, field.name), kinds[field.name], limits)

    def require(self, field: str, condition: Any, change: str) -> None:
        """Raises `ValueError` with what to change, unless a condition is met."""
        if not condition:
            raise ValueError(f"{field}={getattr(self, field)!r}: {change}.")

    @classmethod
    def settings(cls) -> list[dataclasses.Field]:
        """Returns the fields made by `setting`, so without the parts of a recipe."""
        return [field for field in dataclasses.fields(cls) if field.metadata]

    @classmethod
    def from_json(cls, content: dict) -> "Settings":
        """Returns the instance whose fields a JSON object has.

        A missing field has its default: the object may be older than the field.

        Raises:
            ValueError: a field is unknown, has an impossible value, or is missing and
                has no default.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for name in content.keys() - fields:
            raise ValueError(f"this version has no field {name!r}")
        for name, default in fields.items():
            if default is dataclasses.MISSING and name not in content:
                raise ValueError(f"the field {name!r} is missing")
        tuples = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
        return cls(**content | tuples)
