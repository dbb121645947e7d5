"""Questions about drawn words and numbers."""

from __future__ import annotations

import numpy as np

from benchmarks.shapes.questions import Question
from benchmarks.shapes.scene import Label, Scene, pick

LONE_TEXTS = (
    "What does it say?",
    "What is written in the picture?",
    "Read the text.",
    "What text do you see?",
)
WORD_TEXTS = (
    "What word is written?",
    "Which word do you see?",
    "Read the word.",
    "What is the word?",
)
NUMBER_TEXTS = (
    "What number is written?",
    "Which number do you see?",
    "Read the number.",
    "What is the number?",
)


def ask_reading(
    scene: Scene, rng: np.random.Generator, label: Label | None = None
) -> Question:
    """What a label, by chance one of the scene's, says."""
    label = label or pick(rng, scene.labels)
    kind = "number" if label.text.isdigit() else "word"
    texts = NUMBER_TEXTS if kind == "number" else WORD_TEXTS
    if len(scene.labels) == 1 and rng.random() < 0.5:
        texts = LONE_TEXTS
    sentence = f"The {kind} is {label.text}."
    return Question("read", pick(rng, texts), label.text, (), None, sentence)
