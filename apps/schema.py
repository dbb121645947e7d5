"""A JSON schema in a file, that answers are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

SchemaFile = Annotated[
    Path | None,
    typer.Option(
        "--schema",
        help="a file with a JSON schema that the answer is held to",
        show_default=False,
    ),
]


def read_schema(path: Path | None) -> Any:
    """The schema in a file, None without one.

    Raises:
        MM1Error: it is no JSON, or none that answers can be held to.
    """
    if path is None:
        return None
    from mm1_mlx.files import read_json
    from mm1_mlx.folders import user_path
    from mm1_mlx.grammar import check_schema

    schema = read_json(user_path(str(path)))
    check_schema(schema)
    return schema
