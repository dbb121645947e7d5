"""The same weights, the same machine, one run: this project beside its peers.

    python -m benchmarks.peers.compare --mm1 PYTHON --vlm PYTHON [--torch PYTHON] OUT.json

Every PYTHON is that of an environment that holds the peer and not torch, but for torch's
own. Rounds are interleaved, the order within a round alternates, and what is said of a
ratio is the median of the rounds' ratios and the lower bound of its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import fixture
from benchmarks.peers.machine import check_installed, machine
from benchmarks.peers.rows import Row, interleave, table

HERE = Path(__file__).parent
ROUNDS = 7
# Times as many where both are as fast as memory is read, and near each other.
CLOSE = 3
TOKENS = 128
QUESTION = "what is in this picture"
COPY = "repeat ASSISTANT: " + " ".join(str(n) for n in range(300, 420))


# Peers find their own packages, not those of this folder.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Peer:
    """A process that holds one runtime, from ``worker.py``."""

    def __init__(
        self, python: str, script: str, model: Path, options: tuple[str, ...] = ()
    ) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [python, str(HERE / script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=ENVIRONMENT,
        )
        self("open", model_path=str(model))

    def __call__(self, task: str, **options: Any) -> Any:
        """What a task returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"task": task, **options}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read()[-4000:]
            raise RuntimeError(f"{self.process.args} ended at {task}:\n{said}")
        return json.loads(line)

    def close(self) -> int:
        """End it; the most bytes it ever held."""
        held = int(self("peak"))
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()
        return held


class Bench:
    """The models, the pictures, and the environments of a comparison."""

    def __init__(self, folder: Path, pythons: dict[str, str], rounds: int) -> None:
        # Rows that are learned lie elsewhere, and name its pictures.
        self.folder = folder.resolve()
        self.pythons = pythons
        self.rounds = rounds
        self.hf = self.folder / "hf"
        self.ours = self.folder / "ours"
        self.pictures = self._pictures()

    def prepare(self) -> None:
        """Make the model, and convert and pack it for everybody."""
        if not (self.hf / "config.json").is_file():
            fixture.write(self.hf)
        mm1, vlm = Path(self.pythons["mm1"]).parent, self.pythons["vlm"]
        for source, out, options in (
            (self.hf, self.ours, []),
            (self.hf / "decoder", self.folder / "ours-decoder", []),
        ):
            self._convert(mm1, source, out, options)
        quantized = self.folder / "lm-4bit"
        if not quantized.is_dir():
            _run(vlm, "-m", "mlx_lm", "convert", "--hf-path", self.hf / "decoder",
                 "--mlx-path", quantized, "-q", "--dtype", "float32")  # fmt: skip
        # The same packed numbers.
        self._convert(mm1, quantized, self.folder / "ours-decoder-4bit", [])
        quantized = self.folder / "vlm-4bit"
        if not quantized.is_dir():
            _run(vlm, "-m", "mlx_vlm", "convert", "--hf-path", self.hf,
                 "--mlx-path", quantized, "-q", "--dtype", "float32")  # fmt: skip
        self._convert(mm1, quantized, self.folder / "ours-4bit", [])

    def _convert(self, mm1: Path, source: Path, out: Path, options: list[str]) -> None:
        if not out.is_dir():
            _run(mm1 / "mm1", "convert", source, out, *options)

    def _pictures(self) -> list[str]:
        """Different pictures of one photograph, on disk."""
        from PIL import Image
        from skimage.data import astronaut

        made = []
        for i in range(48):
            path = self.folder / f"picture-{i}.png"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.roll(astronaut(), 7 * i, axis=0)).save(path)
            made.append(str(path))
        return made

    def peer(self, name: str, model: Path | str, *options: str) -> Peer:
        """A process of a peer with a model of ``folder``."""
        script = f"peer_{name}.py"
        return Peer(self.pythons[name], script, self.folder / model, options)

    def ask(self, peer: Peer, i: int, tokens: int) -> Any:
        """What a peer says of a round's own picture, and how long it took."""
        images = [self.pictures[i + 1]]
        return peer("ask", prompt=QUESTION, images=images, tokens=tokens)


def decode_against_lm(bench: Bench, bits: str) -> list[Row]:
    """Decoding of the decoder alone, and what that holds in memory."""
    suffix = f"-{bits}" if bits else ""
    kind = bits or "fp32"
    ours = bench.peer("mm1", f"ours-decoder{suffix}")
    lm = bench.peer("lm", f"lm{suffix}" if bits else "hf/decoder")
    row = Row(f"decode {kind}, mlx-lm", "higher", "tokens/s")
    prompt = "USER: 300 301 302 what is it ASSISTANT:"
    said: dict[str, Any] = {}

    def rate(name: str, peer: Peer, text: str) -> float:
        result = peer("ask", prompt=text, tokens=TOKENS)
        said[name] = result["tokens"]
        return float(result["rate"])

    interleave(
        bench.rounds * (1 if bits else CLOSE),
        row,
        lambda _: rate("ours", ours, "300 301 302 what is it"),
        lambda _: rate("lm", lm, prompt),
    )
    row.note = _equal(said["ours"], said["lm"])
    if bits:
        row.note += f"; {UNPACKED}"
    held = Row(f"peak memory, decode {kind}, mlx-lm", "lower", "bytes")
    held.ours, held.peer = [ours.close()], [lm.close()]
    held.note = ONE_READING
    return [row, held]


ONE_READING = "one reading, of the process that all rounds asked"


UNPACKED = "ours unpacked to float32 once, as a small model's are on a CPU"


def _equal(ours: list[int], theirs: list[int]) -> str:
    """How many of the first tokens are equal."""
    pairs = zip(ours, theirs, strict=False)
    least = min(len(ours), len(theirs))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), least)
    return f"first {same} of {len(ours)} tokens equal"


def whole_model(bench: Bench, bits: str) -> list[Row]:
    """Decoding, first token and second question beside mlx-vlm."""
    suffix = f"-{bits}" if bits else ""
    ours = bench.peer("mm1", f"ours{suffix}")
    vlm = bench.peer("vlm", f"vlm{suffix}" if bits else "hf")
    kind = bits or "fp32"
    rows = []
    picture = bench.pictures
    both: dict[str, Any] = {}

    rows.append(
        interleave(
            bench.rounds,
            Row(f"first token, one picture, {kind}, mlx-vlm", "lower", "s"),
            lambda i: float(bench.ask(ours, i, 1)["first"]),
            lambda i: float(bench.ask(vlm, i, 1)["first"]),
        )
    )

    def rate(peer: Peer, name: str) -> float:
        result = peer("ask", prompt=QUESTION, images=[picture[0]], tokens=TOKENS)
        both[name] = result["tokens"]
        return float(result["rate"])

    rows.append(
        interleave(
            bench.rounds * (1 if bits else CLOSE),
            Row(f"decode {kind}, whole model, mlx-vlm", "higher", "tokens/s"),
            lambda _: rate(ours, "ours"),
            lambda _: rate(vlm, "vlm"),
        )
    )
    rows[-1].note = _equal(both["ours"], both["vlm"])

    def second(peer: Peer, i: int, **options: Any) -> float:
        for question in (QUESTION, "describe it"):
            result = peer(
                "ask", prompt=question, images=[picture[i + 1]], tokens=1, **options
            )
            options.pop("fresh", None)
            options |= {"fresh": False} if peer is ours else {}
        return float(result["first"])

    rows.append(
        interleave(
            bench.rounds,
            Row(
                f"second question, same picture, {kind}, mlx-vlm by hand", "lower", "s"
            ),
            lambda i: second(ours, i, fresh=True),
            lambda i: second(vlm, i, keep=True),
        )
    )
    held = Row(f"peak memory, {kind}, mlx-vlm", "lower", "bytes", note=ONE_READING)
    held.ours, held.peer = [ours.close()], [vlm.close()]
    rows.append(held)
    if bits:
        for row in rows:
            row.note = "; ".join(filter(None, (row.note, UNPACKED)))
    return rows


def same_heap(bench: Bench) -> list[Row]:
    """With the heap under mlx-vlm that this project sets up for itself."""
    ours, vlm = bench.peer("mm1", "ours"), bench.peer("vlm", "hf", "--our-heap")
    ask = bench.ask
    rows = [
        interleave(
            bench.rounds,
            Row("first token, one picture, fp32, mlx-vlm on our heap", "lower", "s"),
            lambda i: float(ask(ours, i, 1)["first"]),
            lambda i: float(ask(vlm, i, 1)["first"]),
        ),
        interleave(
            bench.rounds,
            Row("decode fp32, mlx-vlm on our heap", "higher", "tokens/s"),
            lambda i: float(ask(ours, i, TOKENS)["rate"]),
            lambda i: float(ask(vlm, i, TOKENS)["rate"]),
        ),
    ]
    ours.close()
    vlm.close()
    return rows


def against_torch(bench: Bench) -> list[Row]:
    """First token and decoding beside transformers on torch.

    It says when an answer ends, not when its tokens come: decoding is what all of them
    take longer than one.
    """
    if "torch" not in bench.pythons:
        return []
    ours, torch = bench.peer("mm1", "ours"), bench.peer("torch", "hf")
    ask = bench.ask
    said: dict[str, Any] = {}

    def rate(peer: Peer, name: str, i: int) -> float:
        one = ask(peer, i, 1)["total"]
        many = ask(peer, i, TOKENS)
        said[name] = many["tokens"]
        return (len(many["tokens"]) - 1) / float(many["total"] - one)

    rows = [
        interleave(
            bench.rounds,
            Row("first token, one picture, fp32, torch", "lower", "s"),
            lambda i: float(ask(ours, i, 1)["first"]),
            lambda i: float(ask(torch, i, 1)["first"]),
        ),
        interleave(
            bench.rounds,
            Row("decode fp32, whole model, torch", "higher", "tokens/s"),
            lambda i: rate(ours, "ours", i),
            lambda i: rate(torch, "torch", i),
        ),
    ]
    rows[-1].note = _equal(said["ours"], said["torch"])
    ours.close()
    torch.close()
    return rows


def prompt_lookup(bench: Bench) -> list[Row]:
    """Guessing from the prompt, on a copying task."""
    ours = bench.peer("mm1", "ours")
    said: dict[bool, Any] = {}

    def copy(lookup: bool) -> float:
        result = ours(
            "ask",
            prompt=COPY,
            images=bench.pictures[:1],
            tokens=TOKENS,
            prompt_lookup=lookup,
            fresh=False,
        )
        said[lookup] = result["tokens"]
        return float(result["rate"])

    row = interleave(
        bench.rounds,
        Row("prompt lookup, copying, fp32, without", "higher", "tokens/s"),
        lambda _: copy(True),
        lambda _: copy(False),
    )
    row.note = f"tokens {'equal' if said[True] == said[False] else 'DIFFER'}"
    ours.close()
    return [row]


def remembering(bench: Bench) -> list[Row]:
    """What this project saves itself that the caller does not keep."""
    ours = bench.peer("mm1", "ours")
    picture = bench.pictures

    def second(i: int, fresh: bool) -> float:
        image = [picture[i + 1]]
        if not fresh:
            ours("ask", prompt=QUESTION, images=image, tokens=1)
        result = ours("ask", prompt="describe it", images=image, fresh=fresh)
        return float(result["first"])

    rows = [
        interleave(
            bench.rounds,
            Row("second question, same picture, fp32, own first", "lower", "s"),
            lambda i: second(i, False),
            lambda i: second(i, True),
        )
    ]
    examples = [[path, "what is it", str(i)] for i, path in enumerate(picture[:8])]

    def shown(i: int, fresh: bool, image: str | None = None) -> float:
        result = ours(
            "shots",
            examples=examples,
            prompt=f"what is it {i}",
            image=image,
            fresh=fresh,
        )
        return float(result["first"])

    name = "after 8 shots with pictures, fp32, own first"
    rounds = min(5, bench.rounds)
    rows += [
        interleave(
            rounds,
            Row(f"query {name}", "lower", "s"),
            lambda i: shown(2 * i + 2, False),
            lambda i: shown(2 * i + 3, True),
        ),
        interleave(
            rounds,
            Row(f"query about another picture {name}", "lower", "s"),
            lambda i: shown(100 + 2 * i, False, picture[10 + 2 * i]),
            lambda i: shown(101 + 2 * i, True, picture[11 + 2 * i]),
        ),
    ]
    ours.close()
    return rows


def batches(bench: Bench) -> list[Row]:
    """Eight answers at once and one after the other."""
    ours = bench.peer("mm1", "ours")
    prompts = [[f"{QUESTION} {i}", bench.pictures[i]] for i in range(8)]
    said: dict[str, Any] = {}

    def together() -> float:
        result = ours("batch", prompts=prompts, tokens=TOKENS)
        said["together"] = result["tokens"]
        return float(result["rate"])

    def apart() -> float:
        singles = [
            ours("ask", prompt=prompt, images=[image], tokens=TOKENS)
            for prompt, image in prompts
        ]
        said["apart"] = [single["tokens"] for single in singles]
        return float(8 / sum(1 / single["rate"] for single in singles))

    row = interleave(
        min(5, bench.rounds),
        Row("batch of 8 with pictures, fp32, eight single runs", "higher", "tokens/s"),
        lambda _: together(),
        lambda _: apart(),
    )
    row.note = f"tokens {'equal' if said['together'] == said['apart'] else 'DIFFER'}"
    ours.close()
    return [row]


def encoding(bench: Bench) -> list[Row]:
    """Pictures per second of the encoder and the connector."""
    rows = []
    for name, label in (("vlm", "mlx-vlm"), ("torch", "torch")):
        if name not in bench.pythons:
            continue
        ours, peer = bench.peer("mm1", "ours"), bench.peer(name, "hf")
        images = bench.pictures[:4]

        def speed(process: Peer, images: list[str] = images) -> float:
            return len(images) / float(process("encode", images=images))

        rows.append(
            interleave(
                bench.rounds,
                Row(f"encode, fp32, {label}", "higher", "pictures/s"),
                lambda _, ours=ours: speed(ours),
                lambda _, peer=peer: speed(peer),
            )
        )
        ours.close()
        peer.close()
    return rows


def training(bench: Bench, kind: str) -> list[Row]:
    """Steps of LoRA beside mlx-lm on text, or beside mlx-vlm on pictures and text.

    Of every process the first step warms up. Rows are as long in all of them; tokens are
    positions, image tokens among them. Beside mlx-lm all of a row is learned, beside
    mlx-vlm its answer.
    """
    peer = "mlx-lm" if kind == "lm" else "mlx-vlm"
    batch, steps, length = LEARNED[kind]
    texts = [
        " ".join(str(300 + (7 * i + j) % 200) for j in range(2 * length))
        for i in range(batch * (steps + 1))
    ]
    options = {"batch": batch, "rank": 8, "length": length, "scale": 2.0}
    speed = Row(f"training step, fp32, {peer}", "higher", "tokens/s")
    memory = Row(f"peak memory of training, fp32, {peer}", "lower", "bytes")
    if kind == "lm":
        # Longer than a row, and cut to it by both.
        mine: list[Any] = [{"text": text} for text in texts]
        theirs: dict[str, Any] = {"texts": texts}
        models = "ours-decoder", "hf/decoder"
    else:
        answer = answered(texts[0])
        mine = [
            {
                "messages": [
                    {"role": "user", "content": f"<image>\n{QUESTION}"},
                    {"role": "assistant", "content": answer},
                ],
                "images": [bench.pictures[i % len(bench.pictures)]],
            }
            for i in range(len(texts))
        ]
        theirs = {
            "rows": [
                {
                    "messages": [
                        {"role": "user", "content": QUESTION},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": row["images"],
                }
                for row in mine
            ]
        }
        models = "ours", "hf"

    def once(name: str, model: str, held: list[float], i: int, **data: Any) -> float:
        process = bench.peer(name, model)
        seconds = process("train", **data, **options)
        peak = process.close()
        if i >= 0:
            held.append(peak)
        return batch * length / float(np.median(seconds[1:]))

    interleave(
        max(2, bench.rounds // 2),
        speed,
        lambda i: once("mm1", models[0], memory.ours, i, rows=mine),
        lambda i: once(kind, models[1], memory.peer, i, **theirs),
    )
    return [speed, memory]


def answered(text: str) -> str:
    """The beginning of a text that makes an answer about a picture a row of full length."""
    return " ".join(text.split()[:ANSWERED])


# Rows of a step, steps, and a row's positions: mlx-vlm pads to multiples of 32.
LEARNED = {"lm": (4, 5, 257), "vlm": (1, 5, 704)}
ANSWERED = 116


def counted(bench: Bench) -> list[Row]:
    """What a first token about one picture computes, whatever the machine."""
    ours, vlm = bench.peer("mm1", "ours"), bench.peer("vlm", "hf")
    mine, theirs = (p("count", size=fixture.IMAGE, text=11) for p in (ours, vlm))
    ours.close()
    vlm.close()
    names = {
        "matmul_flops": "first token, matrix products",
        "softmax_elements": "first token, softmax elements",
    }
    return [
        Row(f"{name}, mlx-vlm", "lower", "count", [mine[key]], [theirs[key]])
        for key, name in names.items()
    ]


def spawned(bench: Bench) -> list[Row]:
    """From spawning the command to its first byte on stdout, and its peak memory."""
    mm1 = Path(bench.pythons["mm1"]).parent / "mm1"
    ours = [mm1, "generate", "-m", bench.ours, "-p", QUESTION, "--max-tokens", "8"]
    vlm = [
        bench.pythons["vlm"], "-c", SPAWNED_VLM, bench.hf, QUESTION,
    ]  # fmt: skip

    memory = Row("peak memory of a command, fp32, mlx-vlm", "lower", "bytes")

    def first_byte(command: list[Any], i: int, flag: str, held: list[float]) -> float:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in [*command, flag, bench.pictures[i + 1]]],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{command[:3]} ended with status {status}")
        if i >= 0:
            held.append(usage.ru_maxrss * 1024.0)
        return seconds

    seconds = interleave(
        2 * bench.rounds,
        Row("spawn to first byte, fp32, mlx-vlm", "lower", "s"),
        lambda i: first_byte(ours, i, "-i", memory.ours),
        lambda i: first_byte(vlm, i, "--image", memory.peer),
    )
    return [seconds, memory]


# Its command, with OpenBLAS under it as under ours; what it prints before is not counted.
SPAWNED_VLM = """
import ctypes, sys
try:
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
except OSError:
    pass
from mlx_vlm import load, stream_generate
from mlx_vlm.prompt_utils import apply_chat_template
path, question, _, image = sys.argv[1:]
model, processor = load(path)
prompt = apply_chat_template(processor, model.config, question, num_images=1)
for piece in stream_generate(
    model, processor, prompt, image=[image], max_tokens=8, temperature=0.0
):
    print(piece.text, end="", flush=True)
"""


def _run(*command: Any) -> None:
    subprocess.run(
        [str(part) for part in command],
        check=True,
        stdout=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--mm1", required=True, help="python with mm1-mlx, without torch"
    )
    parser.add_argument("--vlm", required=True, help="python with mlx-vlm and mlx-lm")
    parser.add_argument("--torch", help="python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="where models are kept")
    parser.add_argument("--only", nargs="*", choices=MEASURES, default=[*MEASURES])
    options = parser.parse_args()
    check_installed(options.mm1)
    pythons = {"mm1": options.mm1, "vlm": options.vlm, "lm": options.vlm}
    if options.torch:
        pythons["torch"] = options.torch
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mm1-peers-"))
    bench = Bench(folder, pythons, options.rounds)
    bench.prepare()
    results: dict[str, Any] = {"parts": {}}
    if options.out.is_file():
        # Parts that are not measured now stay, each with what it belongs to.
        results["parts"] = json.loads(options.out.read_text())["parts"]
    for part in options.only:
        print(f"{part} ...", file=sys.stderr, flush=True)
        here = machine(pythons)
        made = [row.to_dict() for row in MEASURES[part](bench)]
        results["parts"][part] = {"machine": here, "rows": made}
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        print(table(made), flush=True)
    if not options.folder:
        shutil.rmtree(folder)


MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    "count": counted,
    "decode": lambda bench: decode_against_lm(bench, ""),
    "decode-4bit": lambda bench: decode_against_lm(bench, "4bit"),
    "vlm": lambda bench: whole_model(bench, ""),
    "heap": same_heap,
    "torch": against_torch,
    "vlm-4bit": lambda bench: whole_model(bench, "4bit"),
    "lookup": prompt_lookup,
    "memory": remembering,
    "batch": batches,
    "encode": encoding,
    "spawn": spawned,
    "train-lm": lambda bench: training(bench, "lm"),
    "train-vlm": lambda bench: training(bench, "vlm"),
}


if __name__ == "__main__":
    main()
