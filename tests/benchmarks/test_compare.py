"""Questions about two pictures: what is asked can be seen, and is answered right."""

import re
from collections import Counter

from benchmarks.shapes.compare import compare
from benchmarks.shapes.scene import COLOURS, FEW, SHAPES, random_scene, split_rng

ORDER = {"first": 0, "second": 1}


def asked(split, count):
    for seed in range(count):
        rng = split_rng(split, seed)
        scenes = tuple(random_scene(rng, split, counts=FEW) for _ in range(2))
        for question in compare(scenes, rng):
            yield scenes, question


def fitting(scene, text):
    """The objects that a text's colour and shape words fit."""
    words = re.findall(r"[a-z]+", text.lower())
    singular = {w: s for s in SHAPES for w in (s, f"{s}s", f"{s}es")}
    colours = [w for w in words if w in COLOURS]
    shapes = [singular[w] for w in words if w in singular]
    return [
        o
        for o in scene.objects
        if o.colour in (colours or [o.colour]) and o.shape in (shapes or [o.shape])
    ]


def expected(scenes, text):
    found = [fitting(scene, text) for scene in scenes]
    if "more" in text:
        return "first" if len(found[0]) > len(found[1]) else "second"
    if "neither" in text:
        kinds = {(1, 1): "both", (1, 0): "first", (0, 1): "second", (0, 0): "neither"}
        return kinds[tuple(int(bool(f)) for f in found)]
    if "both pictures" in text and "same" not in text:
        return "yes" if all(found) else "no"
    if "same" in text:
        (a,), (b,) = found
        key = "colour" if "same colour" in text else "shape"
        return "yes" if getattr(a, key) == getattr(b, key) else "no"
    (order,) = (i for word, i in ORDER.items() if word in text)
    (item,) = found[order]
    return item.colour if "colour" in text else item.shape


def test_answers_follow_from_the_two_scenes():
    forms = Counter()
    for split in ("train", "held_out"):
        for scenes, q in asked(split, 300):
            assert q.answer in q.options
            # "shapes" and "objects" alone fit everything.
            assert q.answer == expected(scenes, q.text), q.text
            forms[len(q.options)] += 1
    assert min(forms[n] for n in (2, 4, 6, 8)) > 50


def test_no_answer_of_a_form_is_much_likelier():
    answers: dict[tuple[str, ...], Counter[str]] = {}
    for _, q in asked("held_out", 600):
        answers.setdefault(q.options, Counter())[q.answer] += 1
    for options, counts in answers.items():
        if len(options) < 6:
            assert max(counts.values()) < 1.5 * counts.total() / len(options), counts
