"""Answers of mm1-tiny with adapters: through the runtime, its caches and the command line."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from mm1_mlx import generate, load
from mm1_mlx.adapters import load as load_adapter
from mm1_mlx.apps.cli import main
from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.errors import PromptError
from mm1_mlx.memory.named import Prefix
from mm1_mlx.quantize import find_recipe, quantize
from mm1_mlx.runtime import TINY

PICTURE = TINY / "four-shapes.png"
QUESTION = "What do you see?"
DECODER = load_config(TINY).decoder


@pytest.fixture(scope="module")
def sees(keep):
    """An adapter of the image encoder."""
    return keep(TINY, where=("vision",), scale=4.0)[0]


@pytest.fixture(scope="module")
def speaks(keep):
    """An adapter of the decoder."""
    return keep(TINY, where=("decoder",), scale=8.0)[0]


def ask(**options):
    with load(**options) as runtime:
        return generate(runtime, QUESTION, [PICTURE], max_tokens=12).tokens


@pytest.fixture(scope="module")
def plain():
    return ask()


@pytest.mark.parametrize("which", ["sees", "speaks"])
def test_an_adapter_changes_the_answer_and_a_scale_how_much(request, which, plain):
    name = request.getfixturevalue(which)
    assert ask(adapters=[name]) != plain
    assert ask(adapters=[(name, 1e-6)]) == plain


def test_pictures_seen_without_an_adapter_are_not_taken_for_those_seen_with_it(
    sees, plain, tmp_path
):
    alone = ask(adapters=[sees])
    twice = ask(adapters=[(sees, 2.0)])
    assert alone != plain
    for _ in range(2):
        assert ask(features=tmp_path) == plain
        assert ask(features=tmp_path, adapters=[sees]) == alone
        assert ask(features=tmp_path, adapters=[(sees, 2.0)]) == twice
    # Each kept its own, and kept it once.
    kept = {path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == len(list(tmp_path.iterdir())) == 3


def test_a_prefix_belongs_to_the_adapters_it_was_read_with(
    speaks, tmp_path, monkeypatch
):
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    prefix = Prefix("page", None, (PICTURE,), (), "auto")
    with load(adapters=[speaks]) as runtime:
        runtime.save_prefix(prefix)
        reused = generate(runtime, QUESTION, prefix="page", max_tokens=2)
    with load(adapters=[speaks]) as runtime:
        again = generate(runtime, QUESTION, prefix="page", max_tokens=2)
    assert reused.tokens == again.tokens
    assert again.cached_tokens > 0
    with (
        load() as runtime,
        pytest.raises(PromptError, match="or with other adapters, and asked of"),
    ):
        generate(runtime, QUESTION, prefix="page", max_tokens=2)


def test_runtimes_side_by_side_have_their_own(sees, speaks, plain):
    """Nothing is kept but in the runtime: four answer at once, as each alone."""
    options = [{}, {"adapters": [sees]}, {"adapters": [speaks]}, {}]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda given: ask(**given), options))
    assert found == [plain, ask(adapters=[sees]), ask(adapters=[speaks]), plain]


def mm1(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_the_command_line_takes_several_with_scales(sees, speaks, monkeypatch, capsys):
    with load(adapters=[(sees, 0.5), speaks]) as runtime:
        expected = generate(runtime, QUESTION, [PICTURE], max_tokens=12).text
    flags = ("--adapter", f"{sees}:0.5", "--adapter", speaks, "--max-tokens", 12)
    status, out, err = mm1(
        monkeypatch, capsys, "generate", "-i", PICTURE, "-p", QUESTION, *flags
    )
    assert (status, out.strip(), err) == (0, expected.strip(), "")


def test_another_base_is_one_line_on_stderr(keep, tmp_path):
    """In a process of its own: what prints a warning there is Python itself."""
    out, _ = keep(TINY)
    other = tmp_path / "other"
    quantize(TINY, other, find_recipe("8bit"), measured=False)
    command = [Path(sys.executable).with_name("mm1"), "generate", "-m", other]
    run = subprocess.run(
        [*command, "--adapter", out, "-p", QUESTION, "--max-tokens", "2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.fullmatch(
        r"adapter '.*adapter' was trained on 'mm1-tiny' \(\w{12}\), not on 'mm1-tiny, "
        r"8bit' \(\w{12}\): its shapes fit, what it has learned may not\n",
        run.stderr,
    )


def test_a_missing_adapter_is_one_line(monkeypatch, capsys, tmp_path):
    status, out, err = mm1(
        monkeypatch, capsys, "generate", "-p", "x", "--adapter", tmp_path / "none"
    )
    assert (status, out) == (1, "")
    assert err.startswith("error: adapter ")
    assert err.count("\n") == 1


def test_it_is_shown_how_one_was_made(keep, rewrite, monkeypatch, capsys):
    out, _ = keep(TINY)

    def shown(**training):
        rewrite(out, training=training)
        status, lines, err = mm1(monkeypatch, capsys, "adapter", "show", out)
        assert (status, err) == (0, "")
        head, *rest = lines.splitlines()
        adapted = 7 * DECODER.num_hidden_layers
        assert re.match(
            rf"LoRA, rank 4, scale 2: {adapted} layers, .*, for 'mm1-tiny' \(", head
        )
        return rest

    made = {"stage": "sft", "steps": 100, "learning_rate": 1e-4, "data": ["a.jsonl"]}
    assert shown(**made) == [
        "resolution: the model's own",
        "stage: sft",
        "steps: 100",
        "learning rate: 0.0001",
        'data: ["a.jsonl"]',
    ]
    assert shown(**made, resolution="2x64")[0] == "resolution: 2x64"
    assert shown() == ["training: it says nothing of it"]
    # Somebody else may have written it: a terminal would act on what is said so.
    assert shown(stage="\x1b[2J") == [
        "resolution: the model's own",
        r"stage: \u001b[2J",
    ]


def test_an_adapter_is_small(keep):
    out, _ = keep(TINY, rank=8)
    width, inner = DECODER.hidden_size, DECODER.intermediate_size
    queries = DECODER.num_attention_heads * DECODER.head_dim
    keys = DECODER.num_key_value_heads * DECODER.head_dim
    # q and o, k and v, gate, up and down.
    ends = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner)
    nbytes = load_adapter(out).nbytes
    assert nbytes == DECODER.num_hidden_layers * 8 * ends * mx.float32.size
    assert nbytes < (out / "adapter.safetensors").stat().st_size < 1.04 * nbytes
    assert load_model(TINY).decoder.norm.weight.dtype == mx.float16
