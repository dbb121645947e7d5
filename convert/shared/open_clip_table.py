"""What open_clip knows of a model by its repository's name alone.

https://github.com/mlfoundations/open_clip/blob/89fb801/src/open_clip/pretrained.py

Old configs leave out ``quick_gelu`` and how pictures become square. They are looked up for a
repository, for a folder called as one, and for one in the hub's cache. **A folder of any
other name is read as open_clip reads a model that is not in its table: with gelu, and the
shortest edge cropped.** Where that is wrong, add ``"quick_gelu": true`` to ``model_cfg`` and
``"resize_mode": "squash"`` to ``preprocess_cfg`` before the conversion.
"""

from ..source import Source

# By the last part of a repository's name.
QUICK_GELU = {
    *("DFN2B-CLIP-ViT-B-16", "DFN2B-CLIP-ViT-L-14"),
    *("DFN5B-CLIP-ViT-H-14", "DFN5B-CLIP-ViT-H-14-378"),
}
SQUASHED = {"DFN5B-CLIP-ViT-H-14", "DFN5B-CLIP-ViT-H-14-378"}


def has_quick_gelu(source: Source) -> bool:
    """Whether the model has it where its config leaves it out."""
    return not _names(source).isdisjoint(QUICK_GELU)


def is_squashed(source: Source) -> bool:
    """Whether its pictures are squashed where its config leaves it out."""
    return not _names(source).isdisjoint(SQUASHED)


def _names(source: Source) -> set[str]:
    """What the source's repository may be called, without its owner."""
    folder = source.folder.resolve()
    names = {source.name.rstrip("/").rpartition("/")[2], folder.name}
    if folder.parent.name == "snapshots":
        # The hub's cache: models--OWNER--NAME/snapshots/REVISION.
        names.add(folder.parents[1].name.rpartition("--")[2])
    return names
