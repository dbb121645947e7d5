"""Where the parts of a model come from, and which need training, for its manifest.

What is made of a model of ours goes on saying what that model's manifest says.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from .detect import name_of
from .initialise import SEED
from .origins import PARTS, Origin
from .place import recorded
from .upcycle import ROUTER

# What is recorded by itself and goes where the other goes.
FOLLOWERS = {ROUTER: "decoder"}


@dataclass(frozen=True)
class Lineage:
    """By part, its origin; and the parts that need training, a router included."""

    parts: Mapping[str, Mapping[str, Any]]
    needs_training: tuple[str, ...]

    @classmethod
    def of(cls, sourced: Mapping[str, Origin], initialised: Collection[str]) -> Self:
        """That of a model with these parts from sources and those from nowhere."""
        parts: dict[str, Mapping[str, Any]] = {}
        untrained = set(initialised)
        for part in (*PARTS, *FOLLOWERS):
            if part in initialised:
                parts[part] = {"initialised": True, "seed": SEED}
            elif origin := sourced.get(FOLLOWERS.get(part, part)):
                before = recorded(origin.source.folder)
                known = before.get("parts")
                record = known.get(part) if isinstance(known, dict) else None
                if isinstance(record, dict):
                    parts[part] = record
                elif part in sourced:
                    parts[part] = _record(origin)
                listed = before.get("needs_training")
                if isinstance(listed, list) and part in listed:
                    untrained.add(part)
        order = (x for x in (*PARTS, *FOLLOWERS) if x in untrained)
        return cls(parts, tuple(order))

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it, of a model that was not yet compared with its source."""
        return {
            "parts": {part: dict(record) for part, record in self.parts.items()},
            "needs_training": list(self.needs_training),
            "parity_checked": False,
        }


def _record(origin: Origin) -> dict[str, Any]:
    return {
        "source": origin.name,
        "format": name_of(origin.format),
        "licence": origin.source.licence,
    }
