"""A foreign config section, read strictly: what is not understood is refused by name.

A field that is ignored may change what the model computes, so every field is either
read, or listed as harmless, or switched off.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mm1_mlx.errors import ConfigError

from .harmless import HARMLESS

# What callers may multiply: Python's own numbers have no end, but floats and prints do.
LARGEST = 10**12
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


class Fields:
    """The fields of one section of a foreign config.json.

    Args:
        values: the section as parsed.
        where: what to call it in errors.
        defaults: values of fields that the writer may leave out.
    """

    def __init__(
        self, values: Any, where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, got {values!r}")
        self.values = {**(defaults or {}), **values}
        self.where = where
        self.seen: set[str] = set()

    def get(self, key: str) -> Any:
        """The field's value, None if it is absent or null."""
        self.seen.add(key)
        return self.values.get(key)

    def require(self, key: str) -> Any:
        """The field's value.

        Raises:
            ConfigError: it is absent or null.
        """
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self.where}: field {key!r} is missing")
        return value

    def integer(self, key: str) -> int:
        """The field's value, a whole number.

        Raises:
            ConfigError: it is absent or something else.
        """
        value = self.require(key)
        if type(value) is not int:
            raise ConfigError(f"{self.where}.{key}: expected an integer, got {value!r}")
        if abs(value) > LARGEST:
            raise ConfigError(
                f"{self.where}.{key}: {value!r:.20}... is larger than any model's"
            )
        return value

    def boolean(self, key: str) -> bool:
        """The field's value, False if it is absent or null.

        Raises:
            ConfigError: it is neither true nor false.
        """
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise ConfigError(
                f"{self.where}.{key}: expected true or false, got {value!r:.80}"
            )
        return bool(value)

    def activation(self, key: str) -> str:
        """The field's activation by the name our configs have for it.

        Raises:
            ConfigError: the activation is not one of ours.
        """
        name = self.require(key)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ConfigError(
                f"{self.where}.{key}: activation {name!r} is not supported; "
                f"supported: {sorted(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def expect(self, key: str, *allowed: Any) -> None:
        """Pass only if the field is absent, null or one of the allowed values.

        Raises:
            ConfigError: it has another value.
        """
        value = self.get(key)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"{self.where}.{key}: {value!r} is not supported; supported: "
                f"{', '.join(repr(v) for v in allowed) or 'leaving it out'}"
            )

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Pass only if every field was read, is harmless, or is switched off.

        Raises:
            ConfigError: names the fields that this program does not know.
        """
        known = self.seen | HARMLESS | set(ignored)
        unknown = sorted(k for k, v in self.values.items() if v and k not in known)
        if unknown:
            raise ConfigError(
                f"{self.where}: field(s) {unknown[:5]} are not known here and may "
                "change the model; delete them from the source's config.json if not"
            )
