"""Converting a 6 GB checkpoint beside mlx-vlm: seconds, and the memory it takes.

    python -m benchmarks.peers.conversion --mm1 PYTHON --vlm PYTHON OUT.json [--folder DIR]

The checkpoint is a LLaVA of 3 billion random float16 weights in three shards, in Hugging
Face's layout; both write what they answer from. Turns are interleaved; memory is the most
anonymous memory of the process, sampled, and the most it ever held in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.peers import fixture
from benchmarks.peers.compare import ENVIRONMENT
from benchmarks.peers.machine import check_installed, machine
from benchmarks.peers.rows import Row, table

WIDTH, INTERMEDIATE, LAYERS, HEADS = 2560, 6912, 36, 20
SHARDS = 3
SAMPLES_PER_SECOND = 100


def write(out: Path) -> Path:
    """Write the checkpoint, a shard at a time."""
    random = np.random.default_rng(0)
    out.mkdir(parents=True)
    shapes = _shapes()
    names = sorted(shapes)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[shard::SHARDS]
        tensors = {
            name: random.standard_normal(shapes[name], np.float32).astype(np.float16)
            for name in mine
        }
        save_file(tensors, out / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    text = fixture.TEXT_CONFIG | {
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "torch_dtype": "float16",
    }
    for name, values in {
        "config.json": fixture.CONFIG | {"text_config": text, "torch_dtype": "float16"},
        "preprocessor_config.json": fixture.PREPROCESSOR,
        "processor_config.json": fixture.PROCESSOR,
        "tokenizer_config.json": fixture.TOKENIZER,
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
    }.items():
        (out / name).write_text(json.dumps(values))
    fixture.tokenizer().save(str(out / "tokenizer.json"))
    return out


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        name: tensor.shape
        for name, tensor in fixture.vision(np.random.default_rng(0)).items()
        if not name.startswith("multi_modal_projector")
    }
    root = "multi_modal_projector"
    shapes |= {
        f"{root}.linear_1.weight": (WIDTH, fixture.VISION_WIDTH),
        f"{root}.linear_1.bias": (WIDTH,),
        f"{root}.linear_2.weight": (WIDTH, WIDTH),
        f"{root}.linear_2.bias": (WIDTH,),
        "language_model.model.embed_tokens.weight": (fixture.VOCAB, WIDTH),
        "language_model.model.norm.weight": (WIDTH,),
        "language_model.lm_head.weight": (fixture.VOCAB, WIDTH),
    }
    for i in range(LAYERS):
        block = f"language_model.model.layers.{i}."
        for x in "qkvo":
            shapes[f"{block}self_attn.{x}_proj.weight"] = (WIDTH, WIDTH)
        for x in ("gate", "up"):
            shapes[f"{block}mlp.{x}_proj.weight"] = (INTERMEDIATE, WIDTH)
        shapes[f"{block}mlp.down_proj.weight"] = (WIDTH, INTERMEDIATE)
        for x in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{x}.weight"] = (WIDTH,)
    return shapes


def run(command: list[Any]) -> tuple[float, int, int]:
    """Seconds of a command, its most anonymous memory, and its most in all, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, env=ENVIRONMENT
    )
    status = Path(f"/proc/{process.pid}/status")
    anonymous = resident = 0
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        sizes = {k: v.split() for k, _, v in (line.partition(":") for line in lines)}
        if "RssAnon" in sizes:
            anonymous = max(anonymous, int(sizes["RssAnon"][0]) * 1024)
            resident = max(resident, int(sizes["VmHWM"][0]) * 1024)
        time.sleep(1 / SAMPLES_PER_SECOND)
    if process.wait():
        raise RuntimeError(f"{command[1:4]} ended with status {process.returncode}")
    return time.perf_counter() - start, anonymous, resident


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--mm1", required=True, help="python with mm1-mlx, without torch"
    )
    parser.add_argument("--vlm", required=True, help="python with mlx-vlm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept")
    options = parser.parse_args()
    check_installed(options.mm1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mm1-conversion-"))
    source = folder / "llava-6gb"
    if not source.is_dir():
        write(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rows = [
        Row(f"converting {size / 1e9:.1f} GB, mlx-vlm", "lower", "s"),
        Row("converting, most anonymous memory, mlx-vlm", "lower", "bytes"),
        Row("converting, most memory in all, mlx-vlm", "lower", "bytes"),
    ]
    here = machine({"mm1": options.mm1, "vlm": options.vlm})
    out = folder / "converted"
    mm1 = [Path(options.mm1).with_name("mm1"), "convert", source, out]
    vlm = [options.vlm, "-m", "mlx_vlm", "convert", "--hf-path", source]
    vlm += ["--mlx-path", out, "--dtype", "float16"]
    for i in range(options.rounds):
        pair = [("ours", mm1), ("peer", vlm)]
        for side, command in pair if i % 2 else reversed(pair):
            shutil.rmtree(out, ignore_errors=True)
            # What the one before wrote is not to be waited for by the next.
            os.sync()
            for row, value in zip(rows, run(command), strict=True):
                getattr(row, side).append(float(value))
    shutil.rmtree(out, ignore_errors=True)
    made = [row.to_dict() for row in rows]
    result = {"machine": here, "bytes": size, "rows": made}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(made))
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
