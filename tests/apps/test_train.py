"""``mm1 train``: what it makes is used, what it cannot do is said, and it goes on."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from datetime import date

import mlx.core as mx
import pytest
from PIL import Image

import mm1_mlx.fuse as fusing
from mm1_mlx.apps.cli import main
from mm1_mlx.apps.train import _bar
from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.quantize import quantize
from mm1_mlx.recipe import find_recipe
from mm1_mlx.resolution import with_resolution
from mm1_mlx.runtime import TINY
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.pace import Moment
from mm1_mlx.train.trainer import Trainer

COLOURS = ("red", "blue", "lime", "white")
QUICK = (
    "--steps",
    "3",
    "--batch-size",
    "2",
    "--micro-batches",
    "2",
    "--log-every",
    "1",
)


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(12):
        Image.new("RGB", (96, 96), COLOURS[i % 4]).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is all of it?"},
            {"from": "gpt", "value": COLOURS[i % 4]},
        ]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def log(out):
    return [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]


def test_a_held_out_loss_that_is_no_number_is_said(capfd):
    with _bar(
        TrainConfig(steps=2, learning_rate=1.0, warmup_steps=0, decay_steps=2)
    ) as bar:
        bar.report({"step": 1, "valid_loss": None})
    assert capfd.readouterr().err == "step 1  held out loss is no finite number\n"


def test_sft_makes_an_adapter_that_answers(mm1, rows, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", rows, *QUICK, "--valid-share", "0.3", "--eval-every", "2")
    code, printed, said = mm1("train", "sft", TINY, out, *flags)
    assert (code, printed) == (0, f"{out / 'adapter'}\n")
    assert re.match(
        r"3 steps of 4 examples, 1\.\d+ passes over the data\n"
        r"4 rows are held out; for rows that 'mm1 eval' can take too, split the data and "
        r"give --valid\n"
        r"a step of \d+ tokens takes [\d.]+ MB of the [\d.,]+ GB that are",
        said,
    )
    assert said.count("tokens/s") == 3
    assert said.count("held out loss") == 2
    # What comes next, in words that can be copied.
    assert f"\nthe curve is {out / 'loss.png'}\n" in said
    adapted = f"-m {TINY} --adapter {out / 'adapter'}"
    assert f"mm1 generate {adapted} -i PICTURE" in said
    assert f"mm1 eval TASK DATA {adapted}\n" in said
    assert f"mm1 fuse {TINY} NEW --adapter {out / 'adapter'}\n" in said
    # A run's folder, an adapter and a model are not each other.
    for arguments, message in [
        (("-m", out), f"and '--adapter {out / 'adapter'}'"),
        (
            ("-m", out / "adapter"),
            "is an adapter, no model; give the model that it was",
        ),
        (("-m", TINY, "--adapter", out), f"give the adapter in it, {out / 'adapter'}"),
        (("-m", TINY, "--adapter", TINY), "is a model, no adapter"),
    ]:
        code, _, wrong = mm1("generate", *arguments, "-p", "Hm?")
        assert (code, wrong.count("\n")) == (1, 1), wrong
        assert message in wrong
    assert [x["step"] for x in log(out)] == [0, 1, 2, 2, 3]
    assert Image.open(out / "loss.png").size == (960, 540)
    question = ("-p", "What colour is it?", "-i", TINY / "red-star.png")
    code, answer, _ = mm1(
        "generate", "-m", TINY, "--adapter", out / "adapter", *question
    )
    assert (code, answer) == (0, "red\n")
    # At its end there is nothing to do, and longer it goes on.
    assert mm1("train", "sft", TINY, out, *flags)[:2] == (0, printed)
    assert len(log(out)) == 5
    code, _, said = mm1("train", "sft", TINY, out, *flags, "--steps", "4")
    assert code == 0, said
    assert [x["step"] for x in log(out)] == [0, 1, 2, 2, 3, 4, 4]


def test_the_connector_alone_makes_a_model_whose_rest_is_as_it_was(mm1, rows, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", rows, *QUICK, "--warmup-steps", "0", "--json")
    code, printed, said = mm1("train", "connector", TINY, out, *flags)
    assert code == 0
    assert json.loads(printed) == {"out": str(out / "model"), "steps": 3}
    assert f"mm1 generate -m {out / 'model'} -i PICTURE" in said
    assert f"mm1 train sft {out / 'model'} RUN --data DATA\n" in said
    code, _, wrong = mm1("generate", "-m", out, "-p", "Hm?")
    assert (code, wrong) == (
        1,
        f"error: {out} is the folder of a training run; give the model in it, "
        f"{out / 'model'}\n",
    )
    made, base = load_model(out / "model").tensors(), load_model(TINY).tensors()
    assert made.keys() == base.keys()
    moved = {name for name in made if not mx.array_equal(made[name], base[name])}
    assert moved
    assert all(name.startswith("connector.") for name in moved)
    assert {name: x.dtype for name, x in made.items()} == {
        name: x.dtype for name, x in base.items()
    }
    manifest = json.loads((out / "model/manifest.json").read_text())
    assert manifest["source"]["name"] == "mm1-tiny"
    assert manifest["source"]["trained"]["stage"] == "connector"
    question = ("-p", "What colour is it?", "-i", TINY / "red-star.png")
    assert mm1("generate", "-m", out / "model", *question)[0] == 0


def test_a_packed_model_learns_adapters_and_nothing_else(mm1, rows, tmp_path):
    packed = tmp_path / "packed"
    quantize(TINY, packed, find_recipe("8bit"), measured=False)
    flags = ("--data", rows, *QUICK)
    code, _, said = mm1("train", "sft", packed, tmp_path / "run", *flags)
    assert code == 0, said
    adapter = mx.load(str(tmp_path / "run/adapter/adapter.safetensors"))
    assert {name.rpartition(".")[2] for name in adapter} >= {"lora_a", "lora_b"}
    code, _, said = mm1("train", "pretrain", packed, tmp_path / "other", *flags)
    assert code == 1
    assert re.search(
        r"^error: \d+ of the modules to train in full are packed, e.g. \[.*\]; train "
        r"adapters beside them \(--adapter lora\), or the model that was quantized$",
        said,
        re.MULTILINE,
    )


def test_a_dry_run_says_what_would_be_and_does_nothing(mm1, rows, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", rows, "--valid-share", "0.25", "--dry-run")
    code, printed, said = mm1("train", "sft", TINY, out, *flags)
    assert (code, said) == (0, "")
    assert re.search(
        r"^connector +150,912 of +150,912 parameters are trained$", printed, re.M
    )
    assert re.search(r"^vision +0 of +1,035,136 parameters are trained$", printed, re.M)
    assert "\n100 steps of 16 examples, 200 passes over the data\n" in printed
    assert "\n4 rows are held out; for rows" in printed
    assert "\nadamw, learning rate 0.0001, float32\n" in printed
    assert re.search(
        r"a step of [\d,]+ tokens takes .* that are free, and [\d.e-]+ s", printed
    )
    assert "ASSISTANT:[[ " in printed
    assert not out.exists()
    code, printed, _ = mm1("train", "sft", TINY, out, *flags, "--json")
    outlook = json.loads(printed)
    assert outlook["parameters"]["vision"] == {"trained": 0, "all": 1_035_136}
    assert outlook["config"]["adapter"] == "lora"
    assert outlook["held_out"] == 4
    assert outlook["step"]["bytes"] > 1e6


def test_the_paper_s_fine_tuning_and_its_laws(mm1, rows, tmp_path):
    def outlook(*flags):
        run = ("train", *flags, TINY, tmp_path / "run", "--data", rows)
        return json.loads(mm1(*run, "--dry-run", "--json")[1])

    full = outlook("sft", "--full")
    assert full["config"]["optimizer"] == "adafactor"
    assert full["config"]["learning_rate"] == 1e-5
    assert full["config"]["final_fraction"] == 0
    parameters = full["parameters"].values()
    assert all(part["trained"] == part["all"] for part in parameters)
    whole = outlook("pretrain")["config"]
    # exp(-0.4214 ln N - 0.5535) of the decoder's 1,550,560 without its table.
    assert whole["learning_rate"] == pytest.approx(
        1_550_560**-0.4214 * 0.574934, rel=1e-4
    )
    assert whole["weight_decay"] == 0.1


def test_a_record_is_a_config_and_flags_win(mm1, rows, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    flags = ("--data", rows, *QUICK, "--learning-rate", "0.002", "--seed", "5")
    assert mm1("train", "sft", "--full", TINY, out, *flags)[0] == 0
    code, _, said = mm1(
        *("train", "sft", TINY, again, "--config", out / "run.json", "--seed", "6")
    )
    assert code == 0, said
    first, second = (
        json.loads((x / "run.json").read_text())["config"] for x in (out, again)
    )
    assert second == first | {"seed": 6}
    # Also where the record says the length in steps.
    longer = ("--config", out / "run.json", "--epochs", "3", "--dry-run", "--json")
    code, printed, said = mm1("train", "sft", TINY, tmp_path / "third", *longer)
    assert code == 0, said
    found = json.loads(printed)["config"]
    assert (found["epochs"], found["steps"], found["seed"]) == (3.0, 9, 5)
    # The run itself goes on by its record.
    assert mm1("train", "sft", TINY, out, "--config", out / "run.json")[0] == 0
    code, _, said = mm1("train", "pretrain", TINY, out, "--config", out / "run.json")
    assert code == 1
    assert "run.json is of 'mm1 train sft', not of 'mm1 train pretrain'" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere.jsonl"), "error: 1 of 1 data sets were not found, e.g. ["),
        ((), "error: no data is named; give files, folders or a mixture"),
        (
            ("--data", "{rows}", "--learning-rate", "0"),
            "error: --learning-rate: 0.0 is not above 0",
        ),
        (("--data", "{empty}"), "has no rows to learn"),
        (("--data", "{silent}"), "silent.jsonl:1: "),
        (
            ("--data", "{rows}", "--wandb", "x"),
            "error: the package wandb is not installed",
        ),
        (
            ("--data", "{rows}", "--trained", "eyes"),
            "'eyes' names nothing of the",
        ),
        (
            ("--data", "{rows}", "--micro-batches", "0"),
            "--micro-batches: 0 is not above 0",
        ),
        (
            ("--data", "{rows}", "--adapter-targets", "ears"),
            "error: --adapter-targets: 'ears' is not one of ['connector', 'decoder', ",
        ),
        (
            ("--data", "{rows}", "--max-length", "9"),
            "allow longer examples (--max-length), or have them cut (--truncate)",
        ),
        (("--data", "{rows}", "--seed", "-1"), "error: --seed: -1 is below 0"),
        (
            ("--data", "{rows}", "--vision-learning-rate", "1e-3"),
            "error: --vision-learning-rate: nothing of the part vision is trained, only",
        ),
        (
            ("--data", "{rows}", "--full", "--adapter", "lora"),
            "would get adapters too, e.g. ['decoder.layers.0.",
        ),
        (
            ("--data", "{rows}", "--valid", "{rows}", "--valid-share", "0.5"),
            "error: --valid-share: 0.5 keeps rows of the data to measure the loss on, and",
        ),
    ],
)
def test_what_cannot_be_is_one_line(flags, message, mm1, rows, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    silent = {"conversations": [{"from": "human", "value": "Is anybody there?"}]}
    (tmp_path / "silent.jsonl").write_text(json.dumps(silent) + "\n")
    places = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "silent")}
    given = [flag.format(rows=rows, **places) for flag in flags]
    code, printed, said = mm1("train", "sft", TINY, tmp_path / "run", *given)
    assert (code, printed) == (1, "")
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not list(tmp_path.glob("run/step-*"))


def test_a_kind_of_adapter_is_no_adapter(mm1, rows, tmp_path):
    run = ("train", "sft", TINY, tmp_path / "run", "--data", rows)
    code, _, said = mm1(*run, "--adapter", "run/adapter")
    assert code == 2
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())
    assert "'run/adapter' is not one of none, lora, dora" in words
    assert "fuse it first ('mm1 fuse MODEL NEW --adapter PATH')" in words


def test_adapters_without_a_connector_are_taken_together(mm1, rows, tmp_path):
    """As the connector is trained by default it is in both, and not the same."""
    matrices = [tmp_path / "one", tmp_path / "two"]
    for seed, out in enumerate(matrices):
        flags = ("--data", rows, *QUICK, "--seed", seed, "--trained", "none")
        code, _, said = mm1("train", "sft", TINY, out, *flags)
        assert code == 0, said
    names = mx.load(str(matrices[0] / "adapter/adapter.safetensors"))
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    # It goes on as it was begun.
    code, _, said = mm1("train", "sft", TINY, matrices[0], "--steps", "4")
    assert code == 0, said
    both = [x for out in matrices for x in ("--adapter", out / "adapter")]
    code, _, said = mm1("generate", "-m", TINY, *both, "-p", "Hm?")
    assert code == 0, said


def test_an_adapter_keeps_the_resolution_that_it_learned_from(
    mm1, rows, tmp_path, caplog, monkeypatch
):
    seen = []
    for name, real in (("ask", fusing.ask), ("measure", fusing.measure)):

        def told(model, *arguments, real=real):
            seen.append(model.config.image)
            return real(model, *arguments)

        monkeypatch.setattr(fusing, name, told)
    out, fused = tmp_path / "run", tmp_path / "fused"
    flags = ("--data", rows, *QUICK, "--resolution", "2x64")
    assert mm1("train", "sft", TINY, out, *flags)[0] == 0
    adapter = out / "adapter"
    shown = json.loads(mm1("adapter", "show", adapter, "--json")[1])
    assert shown["training"]["resolution"] == "2x64"
    assert mm1("fuse", TINY, fused, "--adapter", adapter, "--count", "4")[0] == 0
    image = with_resolution(load_config(TINY), "2x64").image
    assert load_config(fused).image == image
    # All three models that are measured: others would join the tiles as they do theirs.
    assert seen == [image] * 3
    question = ("-v", "-p", "What colour is it?", "-i", TINY / "red-star.png")
    adapted = ("-m", TINY, "--adapter", adapter)
    tile = load_config(TINY).num_image_tokens
    for model, pictures in [
        (("-m", TINY), tile),
        (adapted, 5 * tile),
        (("-m", fused), 5 * tile),
        ((*adapted, "--resolution", "96"), tile),
    ]:
        code, _, said = mm1("generate", *model, *question)
        assert code == 0, said
        assert f"({pictures} of pictures)" in said
    assert "was trained at resolution 2x64, not 96" in caplog.text


def test_a_model_without_a_prompt_format_is_refused(mm1, rows, tmp_path, make_config):
    from mm1_mlx.models import MM1
    from mm1_mlx.writer import CheckpointWriter

    model = MM1(make_config(prompt=None))
    with CheckpointWriter(
        tmp_path / "model", model.config, {"name": "a test's"}
    ) as writer:
        for name, tensor in model.tensors().items():
            writer.add(name, tensor)
    code, _, said = mm1(
        "train", "sft", tmp_path / "model", tmp_path / "run", "--data", rows
    )
    assert code == 1
    assert "the model has no prompt format, so it cannot be trained" in said


def test_other_data_and_damage_are_said(mm1, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows.read_bytes())
    flags = ("--data", data, *QUICK, "--save-every", "1", "--image-folder", rows.parent)
    out = tmp_path / "run"
    assert mm1("train", "sft", TINY, out, *flags)[0] == 0
    state = out / "step-000003/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    code, _, said = mm1("train", "sft", TINY, out, *flags)
    assert code == 0
    assert (
        "step-000003 is damaged (its digest is another); going on from step 2" in said
    )
    with data.open("a") as file:
        file.write(data.read_text().splitlines()[0] + "\n")
    code, _, said = mm1("train", "sft", TINY, out, *flags)
    assert code == 1
    assert (
        "holds a run of another data; choose another folder, or get back what" in said
    )


def test_what_a_run_has_made_is_not_overwritten(mm1, rows, tmp_path):
    """Its checkpoints were removed for their room: it would begin again."""
    out = tmp_path / "run"
    run = ("train", "sft", TINY, out, "--data", rows, *QUICK)
    assert mm1(*run)[0] == 0
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    made = (out / "adapter/adapter.safetensors").read_bytes()
    code, _, said = mm1(*run, "--seed", "4")
    assert (code, said.count("\n")) == (1, 1)
    assert (
        f"error: {out / 'adapter'} stands, and no checkpoint to go on from: a" in said
    )
    assert (out / "adapter/adapter.safetensors").read_bytes() == made
    assert len(log(out)) == 3
    (out / "adapter").rename(tmp_path / "adapter")
    assert mm1(*run, "--seed", "4")[0] == 0


@pytest.mark.parametrize("name", ["log.jsonl", "run.json", "loss.png"])
def test_what_somebody_else_has_made_is_not_overwritten(mm1, rows, tmp_path, name):
    """Of data that lie in OUT, of an evaluation."""
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text('{"mine": 1}\n')
    run = ("train", "sft", TINY, out, "--data", rows, *QUICK)
    code, _, said = mm1(*run)
    assert (code, said.count("\n")) == (1, 1)
    assert f"error: {out / name} stands, and is of no training run: one would" in said
    assert (out / name).read_text() == '{"mine": 1}\n'


def test_a_run_goes_on_with_the_day_that_its_prompts_say(
    mm1, rows, tmp_path, monkeypatch
):
    """As Llama 3's template has it: else the next day would have other tokens."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
    template += "{{ '[' + m.role + ']' + m.content }}"
    template += "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    config = json.loads((model / "config.json").read_text())
    config["prompt"]["template"] = "checkpoint"
    path, record = model / "config.json", model / "manifest.json"
    path.write_text(json.dumps(config))
    manifest = json.loads(record.read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    record.write_text(json.dumps(manifest))
    out = tmp_path / "run"
    run = ("train", "sft", model, out, "--data", rows, *QUICK)
    written = []
    encode = Tokenizer.encode

    def noted(self, text, **options):
        written.append(text[:11])
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    code, _, said = mm1(*run, "--date", "2024-02-29")
    assert code == 0, said
    assert set(written) == {"29 Feb 2024"}
    assert mm1(*run, "--steps", "4")[0] == 0
    assert set(written) == {"29 Feb 2024"}
    code, _, said = mm1(*run, "--steps", "4", "--date", "2024-03-01")
    assert (code, "date '2024-02-29', not '2024-03-01'" in said) == (1, True)
    code, _, said = mm1(*run, "--date", "yesterday")
    assert (code, "'yesterday' is no day, expected one like" in said) == (1, True)
    # Without the flag it is the day on which a run begins.
    again = ("train", "sft", model, tmp_path / "again", "--data", rows, *QUICK)
    assert mm1(*again)[0] == 0
    record = json.loads((tmp_path / "again/run.json").read_text())
    assert date.fromisoformat(record["config"]["date"]) <= date.today()
    # A template that says none leaves none.
    plain = ("train", "sft", TINY, tmp_path / "plain", "--data", rows, *QUICK)
    assert mm1(*plain)[0] == 0
    record = json.loads((tmp_path / "plain/run.json").read_text())
    assert record["config"]["date"] is None


def test_what_is_no_line_of_the_log_is_passed_over(mm1, rows, tmp_path):
    out = tmp_path / "run"
    run = ("train", "sft", TINY, out, "--data", rows, *QUICK)
    assert mm1(*run)[0] == 0
    with (out / "log.jsonl").open("a") as file:
        file.write('{"note": "mine"}\n7\n')
    code, _, said = mm1(*run, "--steps", "4")
    assert code == 0, said
    assert [x["step"] for x in log(out)] == [1, 2, 3, 4]


def settings(out):
    return json.loads((out / "run.json").read_text())


def test_a_run_goes_on_longer_by_what_was_given(mm1, rows, tmp_path):
    """Forty steps warm up for two, a hundred for five: the run's own stay."""
    out, other = tmp_path / "run", tmp_path / "other"
    flags = ("--batch-size", "1", "--micro-batches", "1", "--resolution", "96")
    begin = ("train", "connector", TINY, out, "--data", rows, *flags)
    assert mm1(*begin, "--steps", "40")[0] == 0
    assert settings(out)["config"]["warmup_steps"] == 2
    code, _, said = mm1("train", "connector", TINY, out, "--steps", "42")
    assert code == 0, said
    longer = settings(out)["config"]
    assert (longer["warmup_steps"], longer["decay_steps"]) == (2, 40)
    code, _, said = mm1("train", "connector", TINY, out, "--steps", "30")
    assert code == 1
    assert "stands at step 42, beyond the 30 that are asked for; give --steps" in said
    assert settings(out)["config"] == longer
    # Another run by its record: what was not given is made for it.
    record = ("--config", out / "run.json")
    code, printed, _ = mm1(
        *("train", "connector", TINY, other, *record, "--steps", "200"),
        *("--dry-run", "--json"),
    )
    config = json.loads(printed)["config"]
    assert (config["warmup_steps"], config["decay_steps"]) == (10, 190)
    assert config["resolution"] == "96"


def test_passes_over_the_data_say_how_long(mm1, rows, tmp_path):
    flags = ("--data", rows, "--dry-run", "--batch-size", "2")
    run = ("train", "sft", TINY, tmp_path / "run", *flags)
    _, printed, _ = mm1(*run, "--epochs", "3")
    assert "\n5 steps of 8 examples, 3.33 passes over the data\n" in printed
    code, _, said = mm1(*run, "--epochs", "3", "--steps", "7")
    assert code == 1
    assert "error: steps 7 and epochs 3 both say how long to train; give one" in said


def test_a_bad_row_is_passed_over_where_the_run_stands(mm1, rows, tmp_path):
    lines = rows.read_text().splitlines()
    bad = json.loads(lines[5]) | {"image": "nowhere.png"}
    (rows.parent / "bad.jsonl").write_text("\n".join([*lines[:5], json.dumps(bad)]))
    out = tmp_path / "run"
    flags = ("--data", rows.parent / "bad.jsonl", "--steps", "6", "--seed", "4")
    flags += ("--log-every", "1", "--save-every", "100")
    run = ("train", "sft", TINY, out, *flags, "--batch-size", "1")
    code, _, said = mm1(*run, "--micro-batches", "1")
    assert code == 1
    (step,) = (int(path.name[5:]) for path in out.glob("step-*"))
    assert 0 < step < 6
    assert re.search(
        rf"error: .*bad.jsonl:6: .*nowhere.png.*; the checkpoint of step {step} stands; "
        r"put back what is missing, or leave such rows out \(--skip-bad\)",
        said,
    )
    code, _, said = mm1(*run, "--micro-batches", "1", "--skip-bad")
    assert code == 0, said
    assert "passed over: " in said
    assert [x["step"] for x in log(out)] == list(range(1, 7))


def test_held_out_rows_are_looked_at_first(mm1, rows, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"messages": [{"role": "user", "content": "Hm?"}]}))
    out = tmp_path / "run"
    run = ("train", "sft", TINY, out, "--data", rows, *QUICK, "--valid", held)
    for flags in (("--dry-run",), ()):
        code, _, said = mm1(*run, *flags)
        assert code == 1
        assert "held.jsonl:1: " in said
    assert not log(out)


def test_rows_that_are_learned_say_nothing_held_out(mm1, rows, tmp_path):
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text().splitlines()[0])
    told = "what is held out is what is learned"
    run = ("train", "sft", TINY, tmp_path / "run", *QUICK, "--dry-run", "--data")
    for held, is_told in ((rows, 1), (other, 0)):
        code, _, said = mm1(*run, rows, "--valid", held)
        assert code == 0, said
        assert " ".join(said.split()).count(told) == is_told


def test_a_run_goes_on_wherever_its_model_and_data_lie(mm1, rows, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(TINY, model)
    manifest = json.loads((model / "manifest.json").read_text())
    del manifest["source"]["name"]
    (model / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(rows.parent, data)
    out = tmp_path / "run"
    flags = (*QUICK, "--data")
    code, _, said = mm1("train", "sft", model, out, *flags, data / "rows.jsonl")
    assert code == 0, said
    model.rename(tmp_path / "renamed")
    data.rename(tmp_path / "moved")
    moved = (*flags, tmp_path / "moved/rows.jsonl", "--steps", "4")
    code, _, said = mm1("train", "sft", tmp_path / "renamed", out, *moved)
    assert code == 0, said
    assert [x["step"] for x in log(out)] == [1, 2, 3, 4]


def test_paths_in_a_config_may_begin_at_home(mm1, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(rows.parent.parent))
    at_home = f"~/{rows.parent.name}"
    config = tmp_path / "config.json"
    given = {"data": [f"{at_home}/rows.jsonl"], "image_folder": at_home}
    # Which says that they are left to the default.
    given |= {"steps": None, "learning_rate": None, "valid": None}
    config.write_text(json.dumps(given))
    flags = ("--config", config, "--dry-run")
    code, printed, said = mm1("train", "sft", TINY, tmp_path / "run", *flags)
    assert code == 0, said
    assert "100 steps of 16 examples" in printed


def test_a_run_elsewhere_begins_with_the_first_step_and_stays_one(
    mm1, rows, tmp_path, monkeypatch
):
    """The package's own functions, as its documentation has them."""
    begun, logged = [], []

    class Follower:
        def log(self, line, step):
            assert line["step"] == step
            logged.append(step)

        def finish(self, exit_code):
            logged.append(f"finished {exit_code}")

    def init(**options):
        begun.append(options)
        return Follower()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    out = tmp_path / "run"
    run = ("train", "sft", TINY, out, *QUICK, "--wandb", "photos")
    assert mm1(*run, "--data", tmp_path / "nowhere.jsonl")[0] == 1
    assert mm1(*run, "--data", rows, "--trained", "eyes")[0] == 1
    assert not begun
    assert mm1(*run, "--data", rows)[0] == 0
    assert logged == [1, 2, 3, "finished 0"]
    assert mm1(*run, "--data", rows, "--steps", "4")[0] == 0
    assert logged[4:] == [4, "finished 0"]
    first, second = begun
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert (first["project"], first["config"]["steps"]) == ("photos", 3)
    # What ends the run ends it there too.
    code, _, said = mm1(*run, "--data", rows, "--steps", "3")
    assert code == 1
    assert "stands at step 4, beyond the 3" in said
    assert logged[6:] == ["finished 1"]
    # Without the flag nobody is told, nor need the package be there.
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, said = mm1("train", "sft", TINY, out, "--steps", "5")
    assert code == 0, said


def test_a_follower_that_fails_is_a_line(mm1, rows, tmp_path, monkeypatch):
    class Follower:
        def log(self, *_, **__):
            raise ConnectionError("no route")

    def init(**options):
        if options["project"] == "theirs":
            raise PermissionError("No API key configured.\nUse `wandb login`")
        return Follower()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = ("train", "sft", TINY, tmp_path / "run", "--data", rows, *QUICK, "--wandb")
    code, _, said = mm1(*run, "theirs")
    assert code == 1
    assert said.splitlines()[-1].startswith(
        "error: Weights & Biases cannot be logged to (No API key configured. Use `wandb "
    )
    code, _, said = mm1(*run, "ours")
    assert code == 0, said
    assert said.count("Weights & Biases is told nothing more (no route)") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_moves_between_log_lines_and_while_it_measures(monkeypatch):
    config = TrainConfig(steps=1000, learning_rate=1.0, warmup_steps=0, decay_steps=0)
    line = {"step": 20, "loss": 2.5, "tokens_per_second": 99.0, "peak_bytes": 10**9}

    def shown(tell):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("COLUMNS", "120")
        with _bar(config) as bar:
            tell(bar)
        return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", sys.stderr.getvalue())

    assert "held-out batch 12 of 64" in shown(lambda bar: bar.watch(Moment(0, 12, 64)))

    def tell(bar):
        bar.report(line)
        bar.watch(Moment(37, seconds_left=7200))

    said = shown(tell)
    assert "37/1000" in said
    assert "loss 2.5000  99 tokens/s  1.0 GB  2.0 h left" in said


def test_the_curve_is_there_while_a_run_goes_on_and_where_it_fails(
    mm1, rows, tmp_path, monkeypatch
):
    drawn = []

    def step(self, real=Trainer.train_step):
        drawn.append((self.folder / "loss.png").is_file())
        if self.step == 3:
            (self.folder / "loss.png").unlink()
            raise RuntimeError("[malloc] Unable to allocate 68719476736 bytes.")
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    out = tmp_path / "run"
    flags = ("--data", rows, *QUICK, "--steps", "4", "--save-every", "2")
    code, _, said = mm1("train", "sft", TINY, out, *flags)
    assert code == 1
    assert "error: step 4 finds no memory beyond the " in said
    assert "; the checkpoint of step 3 stands; close other programs, or add" in said
    # Behind the checkpoint of step 2; and in the end.
    assert drawn == [False, False, True, True]
    assert (out / "loss.png").is_file()


def test_a_disk_without_room_for_checkpoints_is_said_before_the_run(
    mm1, rows, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    run = ("train", "sft", TINY, out, "--data", rows, *QUICK)
    room = types.SimpleNamespace(free=4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    code, _, said = mm1(*run)
    assert code == 1
    assert re.search(
        r"error: '.*run' needs ([\d.]+) MB \(3 checkpoints of ([\d.]+) MB, and [\d.]+ .B of "
        r"the adapter itself\), but its disk has 4.0 MB free; free some room, name a",
        said,
    )
    assert not list(out.glob("step-*"))
    room.free = 10**8
    assert mm1(*run)[0] == 0
    # What stands of them is room.
    held = sum(path.stat().st_size for path in out.glob("step-*/*"))
    need = float(re.search(r"needs ([\d.]+) MB", said)[1]) * 1e6
    room.free = int(need) + 60_000 - held
    assert mm1(*run, "--steps", "4")[0] == 0


def test_a_dry_run_is_judged_by_the_longest_row_that_it_looks_at(mm1, rows, tmp_path):
    lines = rows.read_text().splitlines()
    turns = [{"from": "human", "value": "hm " * 90}, {"from": "gpt", "value": "so"}]
    data = tmp_path / "rows.jsonl"
    flags = ("--data", data, "--image-folder", rows.parent, "--batch-size", "1")
    run = ("train", "sft", TINY, tmp_path / "run", *flags, "--dry-run", "--json")

    def tokens(extra):
        data.write_text("\n".join([*lines, *extra]) + "\n")
        code, printed, said = mm1(*run)
        assert code == 0, said
        return json.loads(printed)["step"]["tokens"]

    short = tokens([])
    assert tokens([json.dumps({"conversations": turns})]) > 2 * short


@pytest.mark.slow
def test_the_first_interrupt_saves_and_the_command_goes_on(rows, tmp_path):
    out = tmp_path / "run"
    program = "from mm1_mlx.apps.cli import main; main()"
    command = [sys.executable, "-c", program, "train", "sft", str(TINY), str(out)]
    command += ["--data", str(rows), *QUICK, "--steps", "2000", "--save-every", "2000"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    while run.poll() is None and not (out / "log.jsonl").is_file():
        time.sleep(0.1)
    # Another run of the folder waits for its turn elsewhere.
    other = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert other.returncode == 1
    assert f"another run is at work in {str(out)!r}" in other.stderr
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "stopping behind this step, with a checkpoint; again to stop at once" in said
    stopped = re.search(
        r"stopped at step ([\d,]+) of 2,000; the same command goes", said
    )
    step = int(stopped[1].replace(",", ""))
    assert [path.name for path in out.glob("step-*")] == [f"step-{step:06}"]
    assert log(out)[-1]["step"] == step
    assert not (out / "adapter").exists()
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and log(out)[-1]["step"] <= step:
        time.sleep(0.1)
    # At once: the second of two.
    run.send_signal(signal.SIGINT)
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 130
    assert [x["step"] for x in log(out)][: step + 1] == list(range(1, step + 2))
