"""Ways in which a folder of functions can be wrong, and what must be said of each."""

import hashlib
import json
import re

from mm1_mlx.checkpoint import load_config
from mm1_mlx.mlxfn.sidecar import SIDECAR
from mm1_mlx.runtime import TINY

DECODER = "decoder.mlxfn"


def change(**fields):
    """Fields of the sidecar."""

    def damage(folder):
        _rewrite(folder, lambda values: values | fields)

    return damage


def _rewrite(folder, function):
    path = folder / SIDECAR
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


def text(old, new):
    """Text of the sidecar, everywhere."""

    def damage(folder):
        path = folder / SIDECAR
        before = path.read_text()
        after = re.sub(old, new, before)
        assert after != before
        path.write_text(after)

    return damage


def cut(folder):
    path = folder / DECODER
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / DECODER
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(folder):
    """Not functions at all, but with the digest of what it is."""
    content = b"\x7f" * 5000
    (folder / DECODER).write_bytes(content)
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def listed(values):
        files = [
            file | digest if file["name"] == DECODER else file
            for file in values["files"]
        ]
        return values | {"files": files}

    _rewrite(folder, listed)


def one_shape(folder):
    """A cache's shape at one place, so that the sidecar contradicts itself."""

    def changed(values):
        values["functions"][-1]["inputs"][4]["shape"][2] += 1
        return values

    _rewrite(folder, changed)


def no_digest(folder):
    def without(values):
        kept = [file for file in values["files"] if file["name"] != DECODER]
        return values | {"files": kept}

    _rewrite(folder, without)


def within(section, **fields):
    """Fields of a section of the sidecar."""
    return lambda folder: _rewrite(
        folder, lambda values: values | {section: values[section] | fields}
    )


# The embedded model's cache.
DECODER_CONFIG = load_config(TINY).decoder
HEADS = DECODER_CONFIG.num_key_value_heads
CACHE = rf"\[\s*1,\s*{HEADS},\s*1024,\s*32\s*\]"
# Each with what the Python loader says, and the C++ program where that is not the same.
CASES = {
    "other version": (change(mlx="0.31.1"), r"exported with mlx .0\.31\.1. and this is (mlx )?0"),
    "other format": (change(format="safetensors"), "does not describe exported functions"),
    "newer format": (change(format_version=2), "format version"),
    "no sidecar": (lambda folder: (folder / SIDECAR).unlink(), r"mlxfn\.json"),
    "no JSON": (lambda folder: (folder / SIDECAR).write_text("{"), "is not valid JSON"),
    "cut file": (cut, r"decoder\.mlxfn has .* bytes, expected"),
    "changed byte": (flip, r"decoder\.mlxfn is not what was exported \(its sha256 differs"),
    "missing file": (
        lambda folder: (folder / DECODER).unlink(), r"decoder\.mlxfn does not exist",
    ),
    "missing tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"tokenizer\.json does not exist",
    ),
    "no digest": (no_digest, r"gives no digest of .?decoder\.mlxfn"),
    "name outside": (text(r'"decoder\.mlxfn"', '"../decoder.mlxfn"'), "is not allowed"),
    "foreign file": (foreign, r"decoder\.mlxfn cannot be read by mlx"),
    "wrong capacity": (
        text(CACHE, f"[1, {HEADS}, 512, 32]"),
        r"shapes or types of (embed|run)|run does not take the shapes",
    ),
    "wrong shape": (one_shape, r"shapes or types of run|run does not take the shapes"),
    "more capacity": (
        change(capacity=4096), r"shapes or types of (embed|run)",
    ),
    "crop from less": (
        within("image", crop_from=8), "crop_from|image.size",
    ),
    "more image tokens": (
        within("prompt", image_tokens=37), "shapes or types of encode",
    ),
    "wrong heads": (
        text(CACHE, f"[1, {2 * HEADS}, 1024, 32]"), "run does not take the shapes",
    ),
    "wrong vocabulary": (
        text(rf"\[\s*1,\s*{DECODER_CONFIG.vocab_size}\s*\]", "[1, 500]"), "run does not give the shapes",
    ),
    "wrong type": (
        text('"float32"', '"float16"'),
        "shapes or types of encode|encode does not (take|give) the shapes",
    ),
    "missing field": (
        text('"image_tokens"', '"image_token"'), r"image_tokens?",
    ),
    "buckets": (change(buckets=[8, 1, 32]), "buckets"),
    "other device": (change(device="gpu"), "exported on a GPU.*there is none here"),
}  # fmt: skip
