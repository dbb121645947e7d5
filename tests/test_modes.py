"""Shots, thoughts, videos and tilings from the question to the answer.

The answers are forced: what is tested is what the model is shown, and what becomes of
what it says.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from PIL import Image

from mm1_mlx import generate, load
from mm1_mlx.config import PromptConfig
from mm1_mlx.runtime import TINY
from mm1_mlx.shots import Shot, read_shots

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"


class Forced:
    """A model that says what it is told to, and keeps what it was shown."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        self.decoder = ForcedDecoder(model.decoder, self)
        self.shown = None
        self.said = 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def embed(self, tokens, image_tokens, spans):
        self.shown = SimpleNamespace(
            tokens=tokens.tolist(), image_tokens=image_tokens, spans=spans
        )
        self.said = 0
        return self.model.embed(tokens, image_tokens, spans)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        return self.say(self.model(inputs, cache, input_embeddings))

    def say(self, logits):
        """Logits of which the next token to say is the largest."""
        token = self.tokens[min(self.said, len(self.tokens) - 1)]
        self.said += 1
        return mx.where(mx.arange(logits.shape[-1]) == token, 1e3, logits)


class ForcedDecoder:
    """Its logits, which are those behind the prompt."""

    def __init__(self, decoder, model):
        self.decoder, self.model = decoder, model

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def logits(self, states):
        return self.model.say(self.decoder.logits(states))


@pytest.fixture
def force():
    """A function: the embedded model, in a mode, that answers with a text."""
    opened = []

    def force(text, resolution=None, **prompt):
        runtime = load(resolution=resolution)
        opened.append(runtime)
        hf = runtime.tokenizer.hf
        tokens = hf.encode(text, add_special_tokens=False)
        assert hf.decode(tokens).strip() == text.strip()
        runtime.engine.model = Forced(runtime.model, [*tokens, *hf.eos_token_ids])
        if prompt:
            values = runtime.config.prompt.to_dict() | prompt
            section = PromptConfig.from_dict(values)
            runtime.engine.config = replace(runtime.config, prompt=section)
        return runtime

    yield force
    for runtime in opened:
        runtime.close()


def text_of(runtime):
    """What the model was shown, pictures left out."""
    return text_shown(runtime.model.shown, runtime.tokenizer)


def text_shown(shown, tokenizer):
    filled = {i for span in shown.spans for i in range(span.start, span.stop)}
    words = [t for i, t in enumerate(shown.tokens) if i not in filled]
    return tokenizer.hf.decode(words)


def test_a_forced_answer_is_the_answer(force):
    answer = generate(force("a green circle"), "What is it?", [STAR])
    assert answer.text.strip() == "a green circle"
    assert answer.finish_reason == "stop"


def test_a_split_picture_reaches_the_model_as_five_tiles(force, embedded):
    runtime = force("red", resolution="2x96")
    answer = generate(runtime, "What colour is the star?", [STAR])
    tile = embedded.num_image_tokens
    assert answer.image_tokens == 5 * tile
    shape = (5 * tile, embedded.decoder.hidden_size)
    assert [x.shape for x in runtime.model.shown.image_tokens] == [shape]
    # The overview comes first and is what the model sees without a split.
    whole = force("red")
    generate(whole, "What colour is the star?", [STAR])
    (alone,) = whole.model.shown.image_tokens
    overview = runtime.model.shown.image_tokens[0][:tile]
    assert mx.allclose(overview, alone, atol=1e-4)


def test_only_the_last_pictures_of_shots_are_split(force, embedded):
    runtime = force("red", resolution="2x96")
    shots = [Shot((FOUR,), "4", "How many?"), Shot((STAR,), "red", "What colour?")]
    answer = generate(runtime, "And this?", [STAR], shots=shots, tiled=2)
    tile = embedded.num_image_tokens
    shown = [len(x) for x in runtime.model.shown.image_tokens]
    assert shown == [tile, 5 * tile, 5 * tile]
    assert answer.image_tokens == sum(shown)


def test_shots_are_shown_as_turns_and_the_answer_ends_where_it_ends(force):
    runtime = force("a red star. and more")
    shots = [Shot((FOUR,), "4", "How many shapes are there?")]
    answer = generate(runtime, "What is it?", [STAR], shots=shots)
    assert answer.text.strip() == "a red star. and more"
    text = text_of(runtime)
    assert "How many shapes are there?" in text
    assert text.index("4") < text.index("What is it?")
    assert text.rstrip().endswith("ASSISTANT:")


def test_a_base_model_s_answer_ends_as_the_examples_do(force):
    runtime = force("a red star. and more", template="plain")
    shots = [Shot((FOUR,), "4", "How many?")]
    answer = generate(runtime, "What is it?", [STAR], shots=shots)
    assert answer.text.strip() == "a red star"
    text = text_of(runtime)
    assert "Question: How many? Short answer: 4\n" in text
    assert text.endswith("Question: What is it? Short answer:")
    chosen = generate(runtime, "What is it?", [STAR], shots=shots, stop=["red"])
    assert chosen.text.strip() == "a"


def test_captions_are_completed_to_the_end_of_their_line(force):
    runtime = force("a red star.\na photo", template="plain")
    shots = [Shot((FOUR,), "four shapes")]
    answer = generate(runtime, "", [STAR], shots=shots)
    assert answer.text.strip() == "a red star."
    assert text_of(runtime).endswith("A photo of")


def test_a_video_is_shown_as_its_frames(force, tmp_path, embedded):
    for number in range(30):
        level = 8 * number
        Image.new("RGB", (32, 32), (level, level, level)).save(
            tmp_path / f"{number}.png"
        )
    runtime = force("a circle", resolution="2x96")
    video = {"type": "video", "video": str(tmp_path)}
    message = {"role": "user", "content": [video, {"type": "text", "text": "What?"}]}
    answer = generate(runtime, [message])
    assert answer.image_tokens == 24 * embedded.num_image_tokens  # never split
    assert {span.kind for span in runtime.model.shown.spans} == {"frame"}


def test_the_command_line_takes_shots_and_thoughts(force, tmp_path, monkeypatch, capfd):
    from mm1_mlx.apps.cli import main

    row = {"image": str(FOUR), "question": "How many?", "answer": "4"}
    path = tmp_path / "shots.jsonl"
    path.write_text(json.dumps(row | {"reasoning": "One, two."}))
    assert read_shots(path)[0].solution == "One, two. Answer: 4"
    runtime = force("it is red. Answer: star")
    # The command closes its runtime.
    forced, tokenizer = runtime.model, runtime.tokenizer
    monkeypatch.setattr("mm1_mlx.apps.generate.open_runtime", lambda *_: runtime)
    arguments = ["-i", str(STAR), "-p", "What is it?", "--shots", str(path)]
    command = ["mm1", "generate", *arguments, "--think", "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["text"] == "it is red. Answer: star"
    assert printed["answer"] == "star"
    shown = text_shown(forced.shown, tokenizer)
    assert "Think step by step" in shown
    assert "One, two. Answer: 4" in shown
