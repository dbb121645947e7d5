"""The command line: what it prints, where, and how it fails."""

import base64
import io
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from mm1_mlx.apps.cli import main
from mm1_mlx.apps.common import note, print_answer, stop
from mm1_mlx.runtime import TINY

STAR = str(TINY / "red-star.png")
FOUR = str(TINY / "four-shapes.png")
HELP = Path(__file__).with_name("help")
COMMANDS = (
    *(
        "",
        "generate",
        "chat",
        "serve",
        "caption",
        "convert",
        "quantize",
        "fuse",
        "adapter",
        "adapter show",
        "adapter import",
        "adapter export",
        "export",
        "export coreml",
        "export mlxfn",
        "embed",
        "eval",
        "train",
        "train connector",
        "train sft",
        "train pretrain",
        "prefix",
        "prefix save",
        "prefix list",
        "prefix drop",
        "inspect",
        "verify",
        "bench",
        "doctor",
    ),
)


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_generate_prints_the_answer_alone(mm1):
    question = "What colour is the star?"
    assert mm1("generate", "-i", STAR, "-p", question) == (0, "red\n", "")


def test_generate_reads_picture_and_prompt_from_stdin(mm1):
    star = Path(STAR).read_bytes()
    code, out, _ = mm1("generate", "-i", "-", "-p", "What colour is it?", stdin=star)
    assert (code, out) == (0, "red\n")
    code, out, _ = mm1("generate", "-i", STAR, "-p", "-", stdin=b"What colour is it?")
    assert (code, out) == (0, "red\n")


def test_generate_json_is_one_object(mm1, embedded):
    code, out, err = mm1("generate", "--json", "-i", STAR, "-p", "What colour is it?")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["text"] == "red"
    assert answer["image_tokens"] == embedded.num_image_tokens
    assert answer["finish_reason"] == "stop"
    assert answer["prompt_tokens"] > answer["image_tokens"]
    assert len(answer["tokens"]) >= 1
    assert set(answer["timings"]) == {
        "encode",
        "prefill",
        "first_token",
        "total",
        "decode_rate",
    }


def test_generate_verbose_times_on_stderr(mm1, embedded):
    _, out, err = mm1("generate", "-v", "-i", STAR, "-p", "What colour is it?")
    assert out == "red\n"
    expected, took = err.splitlines()
    assert re.fullmatch(
        r"expected: \d+ prompt tokens, \S+ MB beside the weights; at least \S+ s to the "
        r"first token, \S+ s to token 256",
        expected,
    )
    shown = embedded.num_image_tokens
    assert f"prompt tokens ({shown} of pictures), first token after" in took


def test_guessed_tokens_have_no_least_time(mm1):
    question = ("-i", STAR, "-p", "What colour is it?")
    _, out, err = mm1("generate", "-v", "--prompt-lookup", *question)
    assert out == "red\n"
    assert err.splitlines()[0].endswith(" s to the first token")


def test_what_is_expected_is_said_before_it_is_refused(mm1, monkeypatch):
    # Enough for the weights, in float32, and little more.
    weights = 2 * (TINY / "model.safetensors").stat().st_size
    monkeypatch.setattr("mm1_mlx.budget.allowed", lambda: weights + 500_000)
    code, out, err = mm1("generate", "-v", "-i", STAR, "-i", FOUR, "-p", "What?")
    assert (code, out) == (1, "")
    expected, refused = err.splitlines()
    assert expected.startswith("expected: ")
    assert refused.startswith("error: the answer needs ")


def test_inspect_takes_the_environments_model(mm1, monkeypatch, tmp_path, embedded):
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MM1_MODEL", "somebody/llava")
    monkeypatch.setattr("mm1_mlx.hub.download", pytest.fail)
    monkeypatch.setattr("mm1_mlx.hub.download_small", pytest.fail)
    monkeypatch.setattr("mm1_mlx.hub.model_type", lambda _: "llava")
    check_error(mm1("inspect"), "'mm1 convert somebody/llava OUT'")
    shutil.copytree(TINY, tmp_path / "cache/somebody--llava")
    code, out, _ = mm1("inspect", "--json")
    assert code == 0
    assert json.loads(out)["image_tokens"] == embedded.num_image_tokens


def test_inspect_counts_the_embedded_model(mm1, embedded):
    _, out, _ = mm1("inspect", "--json")
    facts = json.loads(out)
    assert facts["image_tokens"] == embedded.num_image_tokens
    parameters = facts["parameters"]
    parts = parameters["vision"] + parameters["connector"] + parameters["decoder"]
    assert parts == parameters["total"] == parameters["active"]


def test_inspect_counts_a_preset_without_weights(mm1):
    _, out, _ = mm1("inspect", "mm1-3b-moe", "--json")
    parameters = json.loads(out)["parameters"]
    assert round(parameters["total"] / 1e9) in (64, 65)
    # 13 sparse layers, of whose 64 experts two are used.
    idle = 13 * 62 * 3 * 3072 * 8064
    assert parameters["active"] == parameters["total"] - idle
    code, out, _ = mm1("inspect", "mm1-7b")
    assert code == 0
    assert "144 per tile, 378 px, squash" in out
    assert "4-9x672: 1,440" in out
    _, out, _ = mm1("inspect", "MM1-7B")  # as the paper spells it
    assert "144 per tile, 378 px, squash" in out
    check_error(mm1("inspect", "mm1-8b"), "presets: mm1-1.2b, mm1-3b, mm1-7b")


def test_inspect_knows_the_papers_resolution_modes(mm1):
    _, out, _ = mm1("inspect", "mm1-3b", "--json")
    modes = json.loads(out)["modes"]
    assert next(iter(modes)) == "378"  # its own
    assert modes["672"] == 144
    assert modes["2x672"] == modes["2x896"] == 720
    assert modes["4-9x672"] == 1440


def test_verify_checks_every_digest(mm1, tmp_path):
    code, out, err = mm1("verify", str(TINY))
    assert (code, out) == (0, "")
    assert "files have the sha256 of the manifest" in err
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    check_error(mm1("verify", str(folder)), "does not have the sha256 of the manifest")


def test_verify_takes_the_models_that_the_other_commands_take(
    mm1, monkeypatch, tmp_path
):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    missing = "tokenizer_config.json is missing"
    # Without a name mm1-tiny, or what the environment names.
    monkeypatch.delenv("MM1_MODEL", raising=False)
    assert mm1("verify")[0] == 0
    monkeypatch.setenv("MM1_MODEL", str(folder))
    check_error(mm1("verify"), missing)
    # A repository in our format is downloaded; of one that was converted, the copy.
    monkeypatch.setenv("MM1_MODEL", str(TINY))
    monkeypatch.setattr("mm1_mlx.hub.model_type", lambda _: "mm1")
    monkeypatch.setattr("mm1_mlx.hub.download", lambda _: (folder, "mit"))
    check_error(mm1("verify", "somebody/model"), missing)
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "somebody--model")
    assert mm1("verify", "somebody/model", "--json")[0] == 0
    monkeypatch.setattr("mm1_mlx.hub.model_type", lambda _: "llama")
    check_error(mm1("verify", "somebody/llama"), "mm1 convert")


def test_verify_compares_on_a_picture_only_with_a_source(mm1):
    code, out, err = mm1("verify", str(TINY), "-i", STAR)
    assert (code, out) == (2, "")
    assert "give --against too" in " ".join(err.replace("│", " ").split())


def test_doctor_asks_the_embedded_model(mm1):
    code, out, _ = mm1("doctor")
    assert code == 0
    assert "answers 'red' about a red star" in out


def test_doctor_reports_a_model_that_does_not_answer(mm1, monkeypatch, tmp_path):
    monkeypatch.setattr("mm1_mlx.runtime.TINY", tmp_path / "gone")
    code, out, _ = mm1("doctor")
    assert code == 0
    assert "does not answer: model folder" in out


def test_inspect_reads_only_small_files_of_a_repository(
    mm1, monkeypatch, tmp_path, embedded
):
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mm1_mlx.hub.download", pytest.fail)
    small = tmp_path / "small"
    shutil.copytree(TINY, small, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("mm1_mlx.hub.download_small", lambda _: small)
    monkeypatch.setattr("mm1_mlx.hub.model_type", lambda _: "mm1")
    _, out, err = mm1("inspect", "--json", "somebody/tiny")
    assert err == ""
    assert json.loads(out)["image_tokens"] == embedded.num_image_tokens


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_answer("a\x1b[31mred\x07\tb\n")
    assert capsys.readouterr().out == "a[31mred\tb\n"


def damaged(folder: Path, change) -> Path:
    shutil.copytree(TINY, folder)
    change(folder)
    return folder


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def add_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"vision.surprise": tensors["decoder.norm.weight"]}, path)
    forget_size(folder, path)


def forget_size(folder: Path, path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def unknown_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["surprise"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (cut_weights, "the manifest says"),
        (add_tensor, "1 tensor(s) unknown, e.g. ['vision.surprise']"),
        (unknown_field, "VisionConfig: unknown field(s) ['surprise']"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the manifest says"),
    ],
)
def test_damaged_model_is_one_line(mm1, tmp_path, change, match):
    folder = damaged(tmp_path / "model", change)
    check_error(mm1("generate", "-m", folder, "-p", "Hello"), match)


def test_missing_picture_is_one_line(mm1):
    check_error(
        mm1("generate", "-i", "no.png", "-p", "What is it?"), "'no.png' was not found"
    )


def test_url_is_told_to_be_downloaded(mm1):
    result = mm1("generate", "-i", "https://example.org/a.png", "-p", "What is it?")
    check_error(
        result, "'https://example.org/a.png' is a URL, expected a file; download"
    )


def test_data_uri_comes_through_as_it_is(mm1):
    # Cut where its base64 has two slashes in a row, which a path would lose.
    for width in range(8, 200):
        data = io.BytesIO()
        Image.new("RGB", (width, width), "red").save(data, "BMP")
        text = base64.b64encode(data.getvalue()).decode()
        if "//" in text:
            break
    uri = f"data:image/bmp;base64,{text}"
    code, _, err = mm1("generate", "-i", uri, "-p", "What colour is it?")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("name", ["~backup.png", "~nobody-here/a.png"])
def test_tilde_of_nobody_is_a_name(mm1, name, tmp_path):
    check_error(mm1("generate", "-i", name, "-p", "Hi"), f"'{name}' was not found")
    code, _, err = mm1("chat", stdin=f"/image {name}\n".encode())
    assert code == 0
    assert "was not found" in err
    check_error(mm1("convert", name, tmp_path / "out"), "neither a folder nor a hub")


def test_prompt_that_is_not_utf8_is_one_line(mm1):
    check_error(mm1("generate", "-p", "-", stdin=b"na\xefve"), "is not valid UTF-8")
    check_error(mm1("generate", "-p", "na\udcefve"), "is not valid UTF-8")
    code, _, err = mm1("chat", stdin=b"na\xefve\n")
    assert code == 0
    assert "is not valid UTF-8" in err


def test_stdin_is_not_read_past_the_limit(mm1):
    result = mm1("generate", "-i", "-", "-p", "Hi", stdin=b"\0" * (2**25 + 4096))
    check_error(result, "picture 1 has more than 33554432 bytes")
    assert len(sys.stdin.buffer.read()) == 4095


def test_file_that_is_no_picture_is_one_line(mm1, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    result = mm1("generate", "-i", tmp_path / "text.png", "-p", "What is it?")
    check_error(result, "text.png' is not a PNG, JPEG, WEBP, GIF, BMP picture")


def test_too_large_picture_is_one_line(mm1, tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(path)
    result = mm1("generate", "-i", path, "-p", "What is it?")
    check_error(result, "large.png' has 9000 x 9000 pixels, expected")


def test_too_many_pictures_are_one_line(mm1):
    pictures = ["-i", STAR] * 25
    check_error(mm1("generate", *pictures, "-p", "What is it?"), "25 pictures")


def test_unknown_model_is_one_line(mm1):
    result = mm1("generate", "-m", "no model", "-p", "Hello")
    check_error(result, "model folder 'no model' does not exist")


def test_foreign_model_is_told_to_be_converted(mm1, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    result = mm1("generate", "-m", tmp_path, "-p", "Hello")
    check_error(result, f"convert it with 'mm1 convert {tmp_path} OUT'")


def test_convert_of_nothing_is_one_line_and_leaves_nothing(mm1, tmp_path):
    result = mm1("convert", tmp_path / "no", tmp_path / "out")
    check_error(result, f"'{tmp_path / 'no'}' is neither a folder nor a hub")
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_data_writes_no_escape_sequence(capsys):
    with pytest.raises(SystemExit):
        stop("rows.tar:a\x1b[2J: bad\nrow")
    note("passed over: rows.tar:a\x9b2J: bad")
    assert capsys.readouterr().err == (
        "error: rows.tar:a[2J: bad row\npassed over: rows.tar:a2J: bad\n"
    )


def test_convert_refuses_to_overwrite(mm1, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = mm1("convert", "--preset", "mm1-3b", out)
    check_error(result, "already exists")


# Tells when a tensor is written, and waits.
SLOW = """
import json, sys, time
from mm1_mlx.apps.cli import main
from mm1_mlx.writer import CheckpointWriter
from mm1_mlx.config import MM1Config
from mm1_mlx.presets import PRESETS

def add(self, name, tensor):
    print(name, flush=True)
    time.sleep(60)

CheckpointWriter.add = add
PRESETS["small"] = MM1Config.from_dict(json.loads(sys.argv.pop(1)))
main()
"""


def test_a_conversion_that_is_terminated_leaves_nothing(make_config, tmp_path):
    config = json.dumps(make_config().to_dict())
    out = tmp_path / "deep/out"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, config, "convert", "--preset", "small", out],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline()
    assert list(out.parent.iterdir())
    child.terminate()
    _, err = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM
    # Said before anything is written.
    assert re.fullmatch(r"writing \d+\.\d kB of initialised weights\n", err)
    assert list(tmp_path.iterdir()) == []


def test_convert_takes_a_folder_named_without_a_slash(mm1, tmp_path, monkeypatch):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    check_error(mm1("convert", "llava", "out"), "llava has no safetensors weights")
    result = mm1("convert", "llava", "out", "--connector", "surprise")
    check_error(result, "connector 'surprise' is none of linear")


@pytest.mark.parametrize("name", ["some/my--model", "some/model.git"])
def test_a_name_that_the_hub_does_not_allow_is_one_line(mm1, tmp_path, name):
    match = f"model folder '{name}' does not exist"
    check_error(mm1("generate", "-m", name, "-p", "Hello"), match)
    check_error(mm1("inspect", name), match)
    result = mm1("convert", name, tmp_path / "out")
    check_error(result, f"'{name}' is neither a folder nor a hub repository")


def test_inspect_takes_brackets_in_a_path_as_they_are(mm1, tmp_path, monkeypatch):
    # The title is as wide as the table, and a longer path would be wrapped.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "x[" / "red]")
    code, out, _ = mm1("inspect", "x[/red]")
    assert code == 0
    assert "x[/red]" in out


@pytest.mark.parametrize("source", [None, [1], {"needs_training": [1]}])
def test_inspect_survives_a_foreign_manifest(mm1, tmp_path, source):
    folder = shutil.copytree(TINY, tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"] = source
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert mm1("inspect", folder)[0] == 0


def test_stdin_is_read_once(mm1):
    assert mm1("generate", "-i", "-", "-p", "-")[0] == 2
    assert mm1("generate", "-i", "-", "-i", "-", "-p", "Hello")[0] == 2


def check_error(result, match: str) -> None:
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert match in err


def test_usage_error_is_exit_2(mm1):
    assert mm1("generate")[0] == 2
    assert mm1("generate", "-p", "x", "--temperature", "9")[0] == 2
    assert mm1("convert", "one")[0] == 2
    assert mm1("nonsense")[0] == 2


def test_version(mm1):
    from mm1_mlx import __version__

    assert mm1("--version") == (0, f"mm1-mlx {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_reviewed(command):
    """To accept a change: MM1_UPDATE_HELP=1 pytest tests/apps, then read the diff."""
    import os

    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    run = subprocess.run(
        [Path(sys.executable).with_name("mm1"), *command.split(), "--help"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    text = "\n".join(line.rstrip() for line in run.stdout.strip().splitlines()) + "\n"
    path = HELP / f"{command.replace(' ', '-') or 'mm1'}.txt"
    if os.environ.get("MM1_UPDATE_HELP"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert run.stderr == ""


def work(*commands: list[str], rounds: int) -> list[float]:
    """Each command's least seconds of processor time.

    They take turns, so that what else the machine does meets all of them.
    """

    def seconds(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

    turns = [[seconds(command) for command in commands] for _ in range(rounds)]
    return [min(column) for column in zip(*turns, strict=True)]


@pytest.mark.slow
def test_help_is_quick():
    """Beside what of it is not ours: machines differ in that by more."""
    mm1 = Path(sys.executable).with_name("mm1")
    library, help_ = work(
        [sys.executable, "-c", "import typer, typer.rich_utils"],
        [str(mm1), "--help"],
        rounds=5,
    )
    assert help_ < 2 * library + 0.1


@pytest.mark.slow
def test_first_answer_is_quick():
    mm1 = Path(sys.executable).with_name("mm1")
    library, answer = work(
        [sys.executable, "-c", "from transformers import AutoTokenizer"],
        [str(mm1), "generate", "-i", STAR, "-p", "What colour is it?"],
        rounds=2,
    )
    assert answer < 1.3 * library + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "3"], "--frames needs --video"),
        (["--shot-style", "vqa"], "--shot-style needs --shots"),
        (["-i", "-", "--video", "-"], "stdin can be read once"),
    ],
)
def test_options_that_would_do_nothing_are_usage_errors(mm1, arguments, message):
    code, out, err = mm1("generate", "-p", "What?", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_an_empty_video_is_an_error(mm1):
    check_error(mm1("generate", "-p", "a", "--video", ""), "the video's path is empty")


def test_pictures_leave_fewer_frames_of_a_video(mm1, tmp_path, embedded):
    for number in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    command = ["generate", "-p", "What?", "--video", str(tmp_path), "--json"]
    _, out, _ = mm1(*command, "-i", STAR)
    assert json.loads(out)["image_tokens"] == 24 * embedded.num_image_tokens
    _, out, _ = mm1(*command, "--frames", "3")
    assert json.loads(out)["image_tokens"] == 3 * embedded.num_image_tokens
