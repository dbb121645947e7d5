"""The sentences that the tokenizer is made for."""

from __future__ import annotations

from benchmarks.shapes.boxes import ask_box
from benchmarks.shapes.compare import compare
from benchmarks.shapes.episodes import TEXTS, told
from benchmarks.shapes.questions import ask_place, caption, questions
from benchmarks.shapes.reading import LONE_TEXTS, NUMBER_TEXTS, WORD_TEXTS
from benchmarks.shapes.scene import SEEN_PAIRS, pick, random_scene, split_rng

SUFFIXES = (
    "Answer with a single word.",
    "Answer the question using a single word or phrase.",
    "Answer in a full sentence.",
    "One word, please.",
)


def sentences(num_scenes: int) -> list[str]:
    """Questions, answers and captions of scenes that training may show."""
    rng = split_rng("train", 0)
    lines: list[str] = []
    before = random_scene(rng)
    for _ in range(num_scenes):
        scene = random_scene(rng)
        asked = [*questions(scene, rng), ask_place(scene, rng), ask_box(scene, rng)]
        asked += compare((before, scene), rng)
        for q in asked:
            if q is not None:
                lines += [q.text, q.text.lower(), f" {q.answer}", q.sentence]
        question, answer = caption(scene, rng)
        lines += [question, f" {answer}", pick(rng, SUFFIXES)]
        lines += [told(pick(rng, SEEN_PAIRS), rng), pick(rng, TEXTS)]
        lines += [pick(rng, (*LONE_TEXTS, *WORD_TEXTS, *NUMBER_TEXTS))]
        before = scene
    return lines
