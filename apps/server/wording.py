"""What pydantic finds wrong with a field, in words for people.

Source: https://docs.pydantic.dev/latest/errors/validation_errors/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .fields import PATTERNS

# What a value is not, by the kind of the fault.
KINDS = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
}
# What it is too little or too much of: the words, and the name of the bound.
BOUNDS = {
    "greater_than": ("more than {}", "gt"),
    "greater_than_equal": ("at least {}", "ge"),
    "less_than_equal": ("at most {}", "le"),
    "string_too_long": ("at most {} characters", "max_length"),
    "string_too_short": ("at least {} character", "min_length"),
    "too_long": ("at most {} items", "max_length"),
    "too_short": ("at least {} item", "min_length"),
}


def is_unused(fault: Any) -> bool:
    """Whether the field is there only to be null or empty."""
    kind, most = fault["type"], fault.get("ctx", {}).get("max_length")
    return kind == "none_required" or (kind == "too_long" and most == 0)


def expected(faults: Sequence[Any]) -> str:
    """What was expected in the place where all of these faults lie.

    A field that may be of several kinds, and is none of them, has a fault for each.
    """
    return " or ".join(dict.fromkeys(_expected(fault) for fault in faults))


def _expected(fault: Any) -> str:
    kind, said = fault["type"], fault.get("ctx", {})
    if kind in KINDS:
        return KINDS[kind]
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        # pydantic has floats for the bounds of numbers.
        return words.format(f"{int(said[bound]):,}")
    if kind == "string_pattern_mismatch":
        return PATTERNS[said["pattern"]]
    if kind == "literal_error":
        return str(said["expected"])
    if kind == "union_tag_invalid":
        *others, last = said["expected_tags"].split(", ")
        return f"{', '.join(others)} or {last}" if others else str(last)
    return str(fault["msg"])
