"""``mm1 embed``: vectors of pictures and texts, and classes without training."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from .common import AsJson, Images, Yes, picture, print_json


def embed(
    image: Images = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="a text, several times; - reads stdin", show_default=False),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="names of classes between commas: print how likely each is",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="the text of a class, {} standing for its name (default: a photo of "
            "a {}.)",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="CLIP model: folder or hub repository (default: "
            "$MM1_MODEL)",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:  # fmt: skip
    """Embed pictures and texts with a CLIP model, or classify pictures by names."""
    sources, texts = image or [], text or []
    names = [x for name in (classes or "").split(",") if (x := name.strip())]
    _check(sources, texts, names, classes)
    if template is not None and classes is None:
        raise typer.BadParameter("--template is how --classes are written; give both")
    texts = [sys.stdin.read().rstrip("\n") if t == "-" else t for t in texts]
    pictures = [picture(source) for source in sources]
    embedder = _open(model, yes)
    if names:
        from mm1_mlx.embed import TEMPLATE, classify

        template = TEMPLATE if template is None else template
        probabilities = classify(embedder, pictures, names, template).tolist()
        if as_json:
            _print_classes(sources, names, probabilities)
        else:
            _print_table(sources, names, probabilities)
    else:
        _print_vectors(embedder, sources, pictures, texts)


def _check(
    sources: list[str], texts: list[str], names: list[str], classes: str | None
) -> None:
    if [*sources, *texts].count("-") > 1:
        raise typer.BadParameter("stdin can be read once; give '-' once")
    if classes is None:
        if not sources and not texts:
            raise typer.BadParameter("give --image or --text, several times")
    elif not names:
        raise typer.BadParameter("--classes is empty; name them, between commas")
    elif texts:
        raise typer.BadParameter("give --text or --classes, not both")
    elif not sources:
        raise typer.BadParameter("--classes needs an --image to choose for")


def _open(model: str | None, yes: bool) -> Any:
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.embed import load_embedder
    from mm1_mlx.runtime import MODEL_VARIABLE

    from .cached import resolve

    # mm1-tiny, which other commands take without a name, has no space to embed into.
    if not (model or os.environ.get(MODEL_VARIABLE)):
        raise typer.BadParameter(f"name a CLIP model by -m, or by ${MODEL_VARIABLE}")
    return load_embedder(resolve(model, yes))


def _print_vectors(
    embedder: Any, sources: list[str], pictures: list[str | bytes], texts: list[str]
) -> None:
    from mm1_mlx.embed import embed_images, embed_texts

    images: Any = embed_images(embedder, pictures) if pictures else []
    written: Any = embed_texts(embedder, texts) if texts else []
    # In a line: a vector's numbers one below the other help nobody.
    print_json(
        {
            "images": [
                {"image": name, "embedding": _numbers(vector)}
                for name, vector in zip(sources, images, strict=True)
            ],
            "texts": [
                {"text": name, "embedding": _numbers(vector)}
                for name, vector in zip(texts, written, strict=True)
            ],
        },
        indent=None,
    )


def _numbers(vector: Any) -> list[float]:
    # The shortest decimals that are the same float32.
    return [float(str(x)) for x in vector]


def _print_classes(
    sources: list[str], names: list[str], probabilities: list[list[float]]
) -> None:
    rows = zip(sources, probabilities, strict=True)
    images = [{"image": name, "probabilities": row} for name, row in rows]
    print_json({"classes": names, "images": images}, indent=None)


def _print_table(
    sources: list[str], names: list[str], probabilities: list[list[float]]
) -> None:
    """A picture's classes, the likeliest first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("picture", "class", "probability")
    for source, row in zip(sources, probabilities, strict=True):
        ranked = sorted(zip(row, names, strict=True), key=lambda pair: -pair[0])
        for place, (probability, name) in enumerate(ranked):
            # As Text: square brackets in a name are no markup.
            first = Text("" if place else source)
            table.add_row(first, Text(name), f"{probability:.1%}")
        table.add_section()
    Console().print(table)
