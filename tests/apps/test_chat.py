"""``mm1 chat``: what is asked, kept, saved, taken back and stopped."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm1_mlx.answer import Piece
from mm1_mlx.apps.chat import archive
from mm1_mlx.apps.chat.conversation import Conversation, Exchange
from mm1_mlx.apps.chat.pictures import read_picture
from mm1_mlx.apps.chat.session import Session, interrupts
from mm1_mlx.apps.cli import main
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.runtime import TINY, load

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
MM1 = Path(sys.executable).with_name("mm1")


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


def test_a_pipe_keeps_the_conversation(mm1):
    lines = f"/image {STAR}\nWhat colour is it?\n/clear\n/help\n/nonsense\n/exit\nno\n"
    code, out, err = mm1("chat", stdin=lines.encode())
    assert (code, out) == (0, "red\n")
    assert "picture 1:" in err
    assert "forgotten" in err
    assert "/image PATH" in err
    assert "unknown command '/nonsense'" in err


def test_what_the_command_line_names_is_there_or_an_error(mm1, tmp_path):
    for arguments in (["-i", "missing.png"], ["--load", tmp_path / "missing.json"]):
        code, out, err = mm1("chat", *arguments, stdin=b"What is this?\n")
        assert (code, out) == (1, "")
        assert "missing" in err.splitlines()[-1]
    code, _, err = mm1("chat", "--load", "a.json", "--system", "Be brief.")
    assert code == 2
    assert "--load brings its own" in err
    code, _, err = mm1("chat", "--top-p", "0")
    assert code == 2
    assert "0 leaves nothing to choose" in err


def test_pictures_are_named_on_the_command_line_too(mm1):
    code, out, err = mm1("chat", "-i", STAR, stdin=b"What colour is it?\n")
    assert (code, out) == (0, "red\n")
    assert "picture 1:" in err


def test_several_pictures_with_spaces_in_their_names(mm1, tmp_path):
    spaced = shutil.copy(STAR, tmp_path / "my red star.png")
    lines = f"/image {FOUR} '{spaced}'\nDescribe them.\nAnd again?\n"
    code, out, err = mm1("chat", stdin=lines.encode())
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "picture 2:" in err


def test_a_picture_that_is_none_is_survived(mm1, tmp_path):
    lines = f"/image {tmp_path / 'no.png'}\n/image {STAR}\nWhat colour is it?\n"
    code, out, err = mm1("chat", stdin=lines.encode())
    assert (code, out) == (0, "red\n")
    assert "no.png' was not found" in err


def test_a_conversation_holds_so_many_pictures(mm1):
    lines = f"/image {' '.join([str(STAR)] * 25)}\n/clear\n/image {STAR}\n"
    code, _, err = mm1("chat", stdin=lines.encode())
    assert code == 0
    assert "error: a conversation holds 24 pictures; /clear starts a new one" in err
    assert "picture 1: " in err.splitlines()[-1]


def test_a_full_context_names_the_way_out(mm1):
    lines = "What shape is a star?\n" + "star " * 1100 + "\n/clear\nHello\n"
    code, out, err = mm1("chat", stdin=lines.encode())
    assert code == 0
    assert out.count("\n") == 2
    assert "context holds 1,024" in err
    assert "/clear starts a new conversation" in err


class Lines:
    """A reader of nothing, and who says yes or no."""

    says = False

    def read(self, waiting):
        raise AssertionError(waiting)

    def confirm(self, question):
        assert "write over it?" in question
        return self.says


class Heard:
    """A view that remembers."""

    def __init__(self):
        self.texts = []
        self.shown = []
        self.took_ = []
        self.read = []

    @contextmanager
    def answer(self):
        self.texts.append("")
        yield self

    def add(self, text):
        self.texts[-1] += text

    def reading(self, done, total):
        self.read.append((done, total))

    def picture(self, shown):
        self.shown.append(shown)

    def took(self, summary):
        self.took_.append(summary)


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


@pytest.fixture
def session(runtime):
    runtime.forget()
    # What was started in the background may be told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Session(runtime, {"max_tokens": 40}, None, Lines(), Heard())
    signal.signal(signal.SIGINT, before)


def test_earlier_pictures_stay_and_are_not_encoded_again(session, runtime, embedded):
    encoded = []
    encode = runtime.engine.features._encode
    runtime.engine.features._encode = lambda pictures: (
        encoded.append(len(pictures)) or encode(pictures)
    )
    try:
        session.take(f"{STAR} What colour is the star?")
        session.take("What shape is it?")
        session.take(f"{FOUR} How many shapes are there?")
        session.take("/retry")
    finally:
        runtime.engine.features._encode = encode
    assert encoded == [1, 1]
    assert session.view.texts[0] == "red"
    exchanges = session.conversation.exchanges
    assert [len(one.pictures) for one in exchanges] == [1, 0, 1]
    assert exchanges[2].answer == session.view.texts[3]
    shown = 2 * embedded.num_image_tokens
    took = rf"\({shown} of pictures, \d+ known before\)"
    assert re.search(took, session.view.took_[3])


def test_pictures_may_go_away_while_they_are_talked_about(session, tmp_path):
    star = Path(shutil.copy(STAR, tmp_path / "star.png"))
    session.take(f"'{star}'")
    star.unlink()
    session.take("What colour is the star?")
    assert session.view.texts == ["red"]


def test_undo_gives_the_pictures_back(session):
    session.take(f"{STAR} What colour is the star?")
    session.take("/undo")
    assert session.conversation.exchanges == []
    assert [shown.name for shown in session.conversation.waiting] == [str(STAR)]
    session.take("What colour is the star?")
    assert session.view.texts == ["red", "red"]
    assert session.conversation.waiting == []


def test_what_waits_stays_behind_a_retry(session):
    session.take(f"{STAR} What colour is the star?")
    session.take(str(FOUR))
    session.take("/retry")
    assert session.view.texts == ["red", "red"]
    assert [shown.name for shown in session.conversation.waiting] == [str(FOUR)]
    assert len(session.conversation.exchanges) == 1


@pytest.mark.parametrize("behind", [[], ["And the shape?"]])
def test_a_retry_that_fails_leaves_the_answer(behind, session, monkeypatch):
    for line in (f"{STAR} What colour is the star?", *behind):
        session.take(line)
    before = [*session.conversation.exchanges]

    def refuse(*_, **__):
        raise PromptError("no")

    monkeypatch.setattr("mm1_mlx.apps.chat.session.stream", refuse)
    session.take("/retry")
    assert session.conversation.exchanges == before
    assert session.conversation.waiting == []


def test_the_system_message_is_set_and_taken_away(session, capfd):
    session.take("/system Be brief.")
    assert session.conversation.messages("Hi")[0] == {
        "role": "system", "content": "Be brief."
    }  # fmt: skip
    session.take("/clear")
    session.take("/system")
    assert capfd.readouterr().err.endswith("system message: Be brief.\n")
    session.take("/system -")
    assert session.conversation.messages("Hi")[0]["role"] == "user"


def test_tokens_are_counted_as_the_model_counts_them(session, capfd, embedded):
    session.take(f"{STAR} What colour is the star?")
    capfd.readouterr()
    session.take("/tokens")
    said = re.fullmatch(
        rf"(\d+) of 1,024 tokens, {embedded.num_image_tokens} of them for 1 picture; "
        r"(\d+) are known.*\n",
        capfd.readouterr().err,
    )
    assert said
    session.take("?")
    took = re.match(r"(\d+) prompt tokens", session.view.took_[-1])
    assert took[1] == said[1]


@pytest.mark.parametrize(
    "line", ["/image", "/save", "/load", "/retry", "/undo", "/copy"]
)
def test_commands_that_lack_something_say_so(session, capfd, line):
    session.take(line)
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_saved_chat_comes_back(session, tmp_path, capfd):
    (tmp_path / "my pics").mkdir()
    star = Path(shutil.copy(STAR, tmp_path / "my pics/red star.png"))
    gone = Path(shutil.copy(FOUR, tmp_path / "gone.png"))
    session.take("/system Be brief.")
    session.take(f"'{star}' What colour is the star?")
    session.take(f"{gone} How many shapes are there?")
    gone.unlink()
    session.take(f"/save {tmp_path}/a chat.json")
    content = json.loads((tmp_path / "a chat.json").read_text())
    roles = [message["role"] for message in content["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    urls = [
        part["image_url"]["url"]
        for message in content["messages"][1::2]
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    assert urls[0] == "my pics/red star.png"
    assert urls[1].startswith("data:image/")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "my pics", moved / "my pics")
    shutil.move(tmp_path / "a chat.json", moved / "a chat.json")
    before = session.conversation
    session.take("/clear")
    session.take(f"/load '{moved}/a chat.json'")
    after = session.conversation
    assert after is not before
    assert after.system == "Be brief."
    assert [(one.question, one.answer) for one in after.exchanges] == [
        ("What colour is the star?", "red"),
        ("How many shapes are there?", session.view.texts[1]),
    ]
    assert [p.data for p in after.pictures] == [STAR.read_bytes(), FOUR.read_bytes()]
    assert capfd.readouterr().err.endswith("a chat.json: 2 questions, 2 pictures\n")


def test_a_picture_that_has_changed_is_told(tmp_path):
    star = Path(shutil.copy(STAR, tmp_path / "star.png"))
    chat = Conversation(exchanges=[Exchange((read_picture(star),), "What?", "red")])
    archive.save(tmp_path / "chat.json", chat, "tiny")
    assert archive.load(tmp_path / "chat.json")[1] == []
    shutil.copy(FOUR, star)
    assert archive.load(tmp_path / "chat.json")[1] == [str(star)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format="other"), "is no chat that /save wrote"),
        (lambda c: c.pop("messages"), "is damaged"),
        (lambda c: c["messages"].pop(), "is damaged"),
        (lambda c: c["messages"].reverse(), "is damaged"),
        (lambda c: c["messages"].__setitem__(1, []), "is damaged"),
        (lambda c: c["messages"][0].update(content="text"), "is damaged"),
        (lambda c: c["messages"][1].update(content=7), "is damaged"),
        (lambda c: c["pictures_sha256"].append(""), "is damaged"),
        (lambda c: c.update(pictures_sha256=None), "is damaged"),
        (lambda c: image(c).update(url=5), "is damaged"),
        (lambda c: image(c).update(url="no.png"), "no.png' was not found"),
        (lambda c: image(c).update(url="/dev/zero"), "is not a regular file"),
        (lambda c: image(c).update(url="https://example.org/a.png"), "was not found"),
        (
            lambda c: image(c).update(url="data:image/png;base64,a_=="),
            "base64 is invalid",
        ),
    ],
)
def test_a_chat_that_is_none_is_refused_and_nothing_lost(
    session, tmp_path, capfd, change, match
):
    chat = Conversation(exchanges=[Exchange((read_picture(STAR),), "What?", "red")])
    path = tmp_path / "chat.json"
    archive.save(path, chat, "tiny")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(MM1Error, match=match):
        archive.load(path)
    session.take("/system stays")
    session.take(f"/load {path}")
    err = capfd.readouterr().err
    assert re.search(match, err)
    assert err.count("\n") == 2
    assert session.conversation.system == "stays"


def image(content):
    return content["messages"][0]["content"][0]["image_url"]


@pytest.mark.parametrize("says", [True, False])
def test_other_files_are_written_over_only_if_that_is_wanted(session, tmp_path, says):
    other = tmp_path / "notes.json"
    other.write_text('{"mine": 1}')
    session.reader.says = says
    session.take(f"/save {other}")
    assert ("mine" not in other.read_text()) is says
    session.reader.says = None
    chat = tmp_path / "chat.json"
    session.take(f"/save {chat}")
    session.take("/system more")
    session.take(f"/save {chat}")
    assert ("more" in chat.read_text()) is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "notes.json"]


def test_a_folder_that_is_not_there_is_one_line(session, capfd, tmp_path):
    session.take(f"/save {tmp_path}/no/chat.json")
    assert re.fullmatch(r"error: .*No such file.*\n", capfd.readouterr().err)


def test_the_last_answer_is_copied(session, monkeypatch, tmp_path, capfd):
    (tmp_path / "pbcopy").write_text(f"#!/bin/sh\ncat > {tmp_path}/clip\n")
    (tmp_path / "pbcopy").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    session.take(f"{STAR} What colour is the star?")
    session.take("/copy")
    assert (tmp_path / "clip").read_text() == "red"
    assert capfd.readouterr().err.endswith("copied\n")


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """Mm1-tiny, whose answers end nowhere: what ends them means nothing to it."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "endless")
    path, record = folder / "tokenizer_config.json", folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<pad>"}))
    manifest = json.loads(record.read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    record.write_text(json.dumps(manifest))
    return folder


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(endless):
    heard = Heard()
    with load(endless) as runtime:
        session = Session(runtime, {"max_tokens": 900}, None, Lines(), heard)

        def add(text):
            heard.texts[-1] += text
            if len(heard.texts[-1]) > 30 and once:
                signal.raise_signal(once.pop())

        heard.add, once = add, [signal.SIGINT]
        session.take(f"{FOUR} Describe the picture.")
        (one,) = session.conversation.exchanges
        assert one.answer == heard.texts[0]
        assert 30 < len(one.answer) < 2000
        assert heard.took_[0].startswith("stopped; ")
        heard.add = heard.texts.append
        session.settings["max_tokens"] = 3
        session.take("And now?")
        assert heard.took_[1].startswith("cut at --max-tokens; ")
        assert len(session.conversation.exchanges) == 2


def test_a_second_stop_waits_for_nothing(endless):
    heard = Heard()
    with load(endless) as runtime:
        session = Session(runtime, {"max_tokens": 900}, None, Lines(), heard)

        def add(text):
            heard.texts[-1] += text
            if len(heard.texts[-1]) > 30:
                signal.raise_signal(signal.SIGINT)

        heard.add = add
        session.take(f"{FOUR} Describe the picture.")
    (one,) = session.conversation.exchanges
    assert 30 < len(one.answer) < 60
    assert heard.took_ == ["stopped; not waited for"]


def test_an_answer_that_is_stopped_before_it_began_is_forgotten(
    session, capfd, monkeypatch
):
    def stopped(*_, cancel, **__):
        signal.raise_signal(signal.SIGINT)
        assert cancel.is_set()
        yield Piece("", None, "cancelled", None)

    monkeypatch.setattr("mm1_mlx.apps.chat.session.stream", stopped)
    session.take(f"{STAR} What colour is the star?")
    assert session.conversation.exchanges == []
    assert [shown.name for shown in session.conversation.waiting] == [str(STAR)]
    assert "the question is forgotten" in capfd.readouterr().err


def test_an_interrupt_outside_an_answer_keeps_the_chat(session, capfd, monkeypatch):
    lines = iter([f"{STAR} What colour is the star?", "/image big.png", "And now?"])
    monkeypatch.setattr(session.reader, "read", lambda _: next(lines, None))

    def interrupted(_):
        signal.raise_signal(signal.SIGINT)

    real = session.add_pictures
    monkeypatch.setattr(
        session,
        "add_pictures",
        lambda paths: (
            interrupted(paths) if session.conversation.exchanges else real(paths)
        ),
    )
    session.run()
    assert [one.question for one in session.conversation.exchanges] == [
        "What colour is the star?",
        "And now?",
    ]
    assert "stopped\n" in capfd.readouterr().err


def test_an_interrupt_just_behind_an_answer_keeps_it(session, monkeypatch):
    keep = session.conversation.keep

    def late(*given):
        signal.raise_signal(signal.SIGINT)
        keep(*given)

    monkeypatch.setattr(session.conversation, "keep", late)
    session.take(f"{STAR} What colour is the star?")
    (one,) = session.conversation.exchanges
    assert one.answer == "red"


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    cancel = threading.Event()
    with interrupts(cancel):
        signal.raise_signal(signal.SIGINT)
        assert cancel.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """``mm1 chat`` in a terminal of its own, driven as a person would."""

    def __init__(self, *arguments, **environment):
        self.said = ""
        own, theirs = pty.openpty()
        self.child = subprocess.Popen(
            [MM1, "chat", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            preexec_fn=_controls,
        )  # fmt: skip
        os.close(theirs)
        self.terminal = own

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait_for(self, pattern, seconds=60):
        """What came since the last call, up to the pattern, without control sequences."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, plain(self.said))):
            assert time.monotonic() < end, plain(self.said)
            if select.select([self.terminal], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:  # The other end is closed.
                    assert re.search(pattern, plain(self.said)), plain(self.said)
            # As terminals do when they are asked where the cursor is, and what they are.
            while "\x1b[6n" in self.said:
                self.said = self.said.replace("\x1b[6n", "", 1)
                self.type("\x1b[1;1R")
            while "\x1b[c" in self.said:
                self.said = self.said.replace("\x1b[c", "", 1)
                self.type("\x1b[?62;22c")
        text = plain(self.said)
        self.said = text[found.end() :]
        return text[: found.end()]


def _controls():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))


def plain(said):
    return re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])|\r", "", said)


@pytest.mark.slow
def test_a_terminal_is_talked_with(endless, tmp_path, embedded):
    spaced = shutil.copy(STAR, tmp_path / "my star (1).png")
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    chat = Terminal("-m", endless, "--max-tokens", "900", **state)
    chat.wait_for(">")
    chat.type(str(spaced).replace(" ", "\\ ").replace("(", "\\(").replace(")", "\\)"))
    chat.type("\r")
    shown = chat.wait_for("1 picture >")
    assert "picture 1: " in shown
    assert "▀" in shown
    # A pasted block is one question.
    chat.type("\x1b[200~What colour\nis the star?\x1b[201~\r")
    chat.wait_for("red")
    chat.type("\x03")
    # The line may be wrapped.
    stopped = chat.wait_for(r"stopped; (.|\n)*per\s+second")
    shown = f"{embedded.num_image_tokens} of pictures"
    assert shown in stopped
    chat.wait_for(">")
    # Ctrl-C drops what is half typed.
    chat.type("/nonsense\x03")
    chat.wait_for(">")
    chat.type(f"/save {tmp_path}/chat.json\r")
    chat.wait_for(r"1\s+question,\s+1\s+picture\s*\n>")
    chat.type("/ta\x7fo\t")
    # Only what changes is written: the letters typed may stand already, above a menu.
    chat.wait_for(r"/to\s*kens")
    chat.type("\r")
    chat.wait_for("of 1,024 tokens(.|\n)*>")
    chat.type("\x04")
    assert chat.child.wait(30) == 0
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert saved[0]["content"][1]["text"] == "What colour\nis the star?"
    assert saved[1]["content"].startswith("red")
    history = tmp_path / "state/mm1/chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+is the star?" in history.read_text()
    again = Terminal("--no-preview", "--no-history", **state)
    again.wait_for(">")
    again.type(f"/load {tmp_path}/chat.json\r")
    again.wait_for(r"1\s+question,\s+1\s+picture\s*\n>")
    again.type("What shape is it?\r")
    again.wait_for(rf"star(.|\n)*\({shown}\), (.|\n)*>")
    again.type("/quit\r")
    assert again.child.wait(30) == 0
