"""The batches of conversations and documents, and the labelled pictures they are about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.balance import (
    NO_RIVAL,
    AnswerAdjustment,
    Balance,
    Rival,
    is_evidence,
    names_some,
)
from benchmarks.shapes.compare import compare
from benchmarks.shapes.documents import (
    Part,
    captions,
    interleaved,
    naming,
    told_naming,
    written,
)
from benchmarks.shapes.draw import draw
from benchmarks.shapes.episodes import (
    LENGTHS,
    TEXTS,
    Episode,
    random_episode,
    told,
)
from benchmarks.shapes.exchanges import (
    Exchange,
    ask,
    ask_told,
    described,
    exchange_of,
    read_labels,
    sayable,
    vary,
)
from benchmarks.shapes.mentions import NO_MENTIONS, MentionFinder
from benchmarks.shapes.patches import (
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    PatchBatch,
    label_patches,
)
from benchmarks.shapes.recipe import (
    Recipe,
    Stage,
    picture_rng,
    picture_side,
    random_picture_scene,
)
from benchmarks.shapes.rows import Examples, Rows
from benchmarks.shapes.scene import (
    ALL_PAIRS,
    FEW,
    SEEN_PAIRS,
    Pair,
    Scene,
    pick,
    random_scene,
    recolour,
)
from benchmarks.shapes.writing import SMALL, writing_scene
from mm1_mlx.config import SplitTiling
from mm1_mlx.image import load_picture
from mm1_mlx.layout import Picture
from mm1_mlx.messages import Turn
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.sample import (
    Batch,
    Row,
    Sample,
    build_document,
    build_sample,
    collate,
    stack,
)

# Rows of up to so many tokens are read together, padded alike.
LENGTHS_TOGETHER = (24, 64, 1024)
# Pictures in a talk.
TALKS = (2, 3, 4)
GRID = 2


@dataclass(frozen=True)
class JointBatch:
    """Rows, what stands before them, and the pictures that they refer to."""

    rows: tuple[Rows, ...]
    # [B, P], or none where pictures stand in the rows.
    prefixes: Batch | None
    patches: PatchBatch | None
    # Of several tiles each; else ``patches`` holds the pictures.
    tiled: tuple[Picture, ...] = ()
    # Whether the encoder learns from them.
    teaches_encoder: bool = True


@dataclass(frozen=True)
class Named:
    """A thing in a prompt, its made-up name, and the tokens of that."""

    pair: Pair
    word: str
    tokens: Sequence[int]
    # Whether an earlier example tells the name.
    told: bool


@dataclass(frozen=True)
class _Spoken:
    """A text, and what is learned of it in turn.

    Attributes:
        sample: its tokens.
        answers: the learned tokens of every answer, and what was asked; none where all
            that is learned belongs together.
        balanced: whether scores are, where pairs are named.
    """

    sample: Sample
    answers: Sequence[tuple[Sequence[int], Exchange]] = ()
    balanced: bool = True


@dataclass(frozen=True)
class _Whole:
    """A row in which pictures stand, these by their places, and what is named in it."""

    spoken: _Spoken
    places: Sequence[int] = ()
    named: Sequence[Named] = ()


class Conversations:
    """The batch of (step, shard); a shard is of the form that its stage gives it."""

    def __init__(self, recipe: Recipe, stage: Stage, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.stage = stage
        self.tokenizer = tokenizer
        self.config = recipe.config
        assert self.config.image is not None
        assert self.config.decoder is not None
        self.tiled = replace(self.config.image, tiling=SplitTiling(grid=GRID))
        self._sample = lru_cache(maxsize=200_000)(self._build)
        self._mentions = MentionFinder(tokenizer, ahead=stage.point_ahead)
        vocab_size = self.config.decoder.vocab_size
        self._adjustment = AnswerAdjustment(tokenizer, vocab_size)
        image = self.config.prompt
        assert image is not None
        self._image = image.image_token_id

    def __call__(self, step: int, shard: int) -> JointBatch:
        rng = picture_rng(self.stage.train.seed, step, shard)
        forms = self.stage.forms[shard]
        form = forms[step % len(forms)]
        batch: JointBatch = getattr(self, f"_{form}")(rng)
        weight = self.stage.weights.get(form, 1.0)
        rows = [replace(some, weights=some.weights * weight) for some in batch.rows]
        teaches = form not in self.stage.only_seen
        return replace(batch, rows=tuple(rows), teaches_encoder=teaches)

    # Forms: what a micro-batch is made of.

    def _questions(self, rng: np.random.Generator) -> JointBatch:
        """Every picture with a question of each kind."""
        scenes = [
            random_picture_scene(rng, self.stage.unnamed)
            for _ in range(self.stage.pictures)
        ]
        asked = [self._ask(s, rng) for s in scenes]
        return self._shared(scenes, [[s] for s in range(len(scenes))], asked, rng)

    def _pairs(self, rng: np.random.Generator) -> JointBatch:
        """Two pictures at a time, each of which stands in two prompts."""
        count = self.stage.pictures * 3 // 2
        scenes = [random_scene(rng, short_side=96, counts=FEW) for _ in range(count)]
        places = [[i, (i + 1) % count] for i in range(count)]
        asked = []
        for a, b in places:
            two = scenes[a], scenes[b]
            found = compare(two, rng)
            if self.stage.fair:
                found = [q for q in found if not is_evidence(q.text, two)]
            asked.append([exchange_of(q, rng) for q in found])
        return self._shared(scenes, places, asked, rng)

    def _reading(self, rng: np.random.Generator) -> JointBatch:
        """Words and numbers that can be read at a glance."""
        count = self.stage.pictures * 3 // 2
        scenes = []
        for _ in range(count):
            scene = writing_scene(rng, short_side=picture_side(rng))
            scenes.append(recolour(scene, pick(rng, self.stage.unnamed), rng))
        return self._shared(
            scenes, [[i] for i in range(count)], read_labels(scenes, rng), rng
        )

    def _parts(self, rng: np.random.Generator) -> JointBatch:
        """Small words and numbers, and shapes, in pictures of several tiles."""
        count = self.stage.pictures // 2
        scenes, asked = [], []
        for i in range(count):
            if i % 4 == 3:
                scene = random_scene(rng, short_side=2 * 96)
                asked.append(self._ask(scene, rng))
            else:
                scene = writing_scene(rng, short_side=2 * 96, heights=SMALL)
                asked += read_labels([scene], rng)
            scenes.append(scene)
        pictures = [load_picture(draw(scene), self.tiled) for scene in scenes]
        places = [[i] for i in range(count)]
        return self._shared(scenes, places, asked, rng, pictures)

    def _episodes(self, rng: np.random.Generator) -> JointBatch:
        """New words, of pictures and of things that are told in words."""
        count = self.stage.pictures
        scenes = []
        for _ in range(count):
            scene = random_scene(rng, short_side=picture_side(rng), counts=(1,))
            scenes.append(recolour(scene, pick(rng, self.stage.unnamed), rng))
        pairs = [scene.objects[0].pair for scene in scenes]
        groups: tuple[list[_Whole], list[_Whole]] = ([], [])
        for i in range(self.stage.episodes):
            seen = i % 2 == 0
            found = random_episode(
                *(rng, pairs if seen else ALL_PAIRS, pick(rng, LENGTHS)),
                known=SEEN_PAIRS if seen else ALL_PAIRS,
                alike=rng.random() < self.stage.alike,
                narrow=rng.random() < self.stage.narrow,
            )
            if found is None:
                continue
            sample, named = self.episode(found, rng, seen=seen)
            shown = found.pairs if seen else ()
            places = [_place_of(pair, pairs, rng) for pair in shown]
            groups[i % 2].append(_Whole(_Spoken(sample, balanced=False), places, named))
        return self._whole(scenes, [group for group in groups if group])

    def _talks(self, rng: np.random.Generator) -> JointBatch:
        """Pictures one after another, each with questions about it."""
        count = self.stage.pictures
        scenes = [random_picture_scene(rng, self.stage.unnamed) for _ in range(count)]
        rows = []
        for _ in range(self.stage.episodes):
            # Examples of one task, or of any.
            alike = rng.random() < 0.5
            # Nothing is drawn in the stages before there was such a share.
            behind = self.stage.behind > 0 and rng.random() < self.stage.behind
            parts, shown = [], []
            for place in rng.choice(count, pick(rng, TALKS), replace=False).tolist():
                number = pick(rng, (1, 1, 2))
                found = self._ask(scenes[place], rng)[:number]
                if alike:
                    found = sayable([described(scenes[place], rng)]) or found
                if found:
                    varied = [vary(x, rng) for x in found]
                    parts.append(self._in_turn(varied, 1, behind=behind))
                    shown.append(place)
            rows.append(_Whole(_joined(parts), shown))
        told = [self._told(rng, seen=i % 2 == 0) for i in range(self.stage.told)]
        return self._whole(scenes, [rows, told] if told else [rows])

    def _told(self, rng: np.random.Generator, *, seen: bool) -> _Whole:
        """A conversation about things that are told in words."""
        scene = random_scene(rng, "train" if seen else "held_out")
        asked = [vary(x, rng) for x in ask_told(scene, rng, max(self.stage.turns))]
        return _Whole(replace(self._in_turn(asked, 0), balanced=False))

    def _captions(self, rng: np.random.Generator) -> JointBatch:
        """Every picture with some texts that are true of it."""
        scenes = [self._any_scene(rng) for _ in range(self.stage.pictures)]
        rows: list[list[_Spoken]] = []
        for scene in scenes:
            texts = captions(scene, rng, self.recipe.questions_per_picture)
            rows.append([_Spoken(self._mixed([0, text])) for text in texts])
        places = [[i] for i in range(len(scenes)) if rows[i]]
        return self._join(scenes, places, [row for row in rows if row], [])

    def _documents(self, rng: np.random.Generator) -> JointBatch:
        """Pictures between texts, and texts alone."""
        count = self.stage.pictures
        scenes = [
            random_scene(rng, short_side=picture_side(rng), counts=FEW)
            for _ in range(count)
        ]
        lone = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
        pairs = [scenes[i].objects[0].pair for i in lone]
        rows: list[_Whole] = []
        for i in range(self.stage.episodes):
            places = [int(x) for x in rng.choice(count, 3, replace=False)]
            parts: list[Part] = interleaved(scenes, places, rng)
            if i % 3 == 0 and (
                found := random_episode(rng, pairs, 4, known=SEEN_PAIRS)
            ):
                places = [lone[_place_of(pair, pairs, rng)] for pair in found.pairs]
                parts = naming(found, places)
            elif i % 3 == 1:
                scene = random_scene(rng, counts=FEW)
                parts = [written(scene, rng)]
                told_episode = random_episode(rng, ALL_PAIRS, pick(rng, LENGTHS))
                if told_episode and rng.random() < 0.5:
                    parts = [told_naming(told_episode)]
            held = [part for part in parts if isinstance(part, int)]
            rows.append(_Whole(_Spoken(self._mixed(parts), balanced=False), held))
        groups = [[row for row in rows if bool(row.places) == seen] for seen in (1, 0)]
        return self._whole(scenes, [group for group in groups if group])

    # What forms are made with.

    def _ask(self, scene: Scene, rng: np.random.Generator) -> list[Exchange]:
        count = self.recipe.questions_per_picture
        return ask(scene, rng, count, fair=self.stage.fair, shares=self.stage.shares)

    def _any_scene(self, rng: np.random.Generator) -> Scene:
        if rng.random() < 0.2:
            return writing_scene(rng, short_side=picture_side(rng))
        return random_picture_scene(rng, self.stage.unnamed)

    def _shared(
        self,
        scenes: Sequence[Scene],
        places: Sequence[Sequence[int]],
        asked: Sequence[Sequence[Exchange]],
        rng: np.random.Generator,
        tiled: Sequence[Picture] = (),
    ) -> JointBatch:
        """Rows of one question or several behind the pictures that they are about."""
        kept = [i for i, exchanges in enumerate(asked) if exchanges]
        varied = [[vary(exchange, rng) for exchange in asked[i]] for i in kept]
        rows = [
            [self._in_turn(some, len(places[i])) for some in self._turns(found, rng)]
            for i, found in zip(kept, varied, strict=True)
        ]
        return self._join(scenes, [places[i] for i in kept], rows, tiled)

    def _turns(
        self, exchanges: Sequence[Exchange], rng: np.random.Generator
    ) -> Iterator[Sequence[Exchange]]:
        """Those that follow one another."""
        numbers = self.stage.turns
        start = 0
        while start < len(exchanges):
            end = start + (pick(rng, numbers) if len(numbers) > 1 else numbers[0])
            yield exchanges[start:end]
            start = end

    def _join(
        self,
        scenes: Sequence[Scene],
        places: Sequence[Sequence[int]],
        groups: Sequence[Sequence[_Spoken]],
        tiled: Sequence[Picture],
    ) -> JointBatch:
        """The batch of groups, each of whose rows begins with its pictures."""
        pictures = list(tiled)
        config = replace(self.config, image=self.tiled) if tiled else self.config
        heads = [self._split(group[0].sample)[0] for group in groups]
        prefixes = collate(heads, places, pictures, config, self.tokenizer)
        rows = [
            (self._split(spoken.sample)[1], spoken, owner)
            for owner, group in enumerate(groups)
            for spoken in group
        ]
        parts = []
        for least, most in pairwise((0, *LENGTHS_TOGETHER)):
            chosen = [row for row in rows if least < len(row[0].tokens) <= most]
            if chosen:
                parts.append(self._rows(chosen, scenes, places))
        patches = None if tiled else label_patches(scenes, self.config)
        return JointBatch(tuple(parts), prefixes, patches, tuple(pictures))

    def _rows(
        self,
        chosen: Sequence[tuple[Row, _Spoken, int]],
        scenes: Sequence[Scene],
        places: Sequence[Sequence[int]],
    ) -> Rows:
        batch = stack([row for row, _, _ in chosen], [[] for _ in chosen], [])
        counted = self._counted([spoken for _, spoken, _ in chosen], batch)
        alone = [owner if len(places[owner]) == 1 else None for *_, owner in chosen]
        known = [None if o is None else scenes[places[o][0]] for o in alone]
        mentions = self._mentions(batch, known)
        owners = np.array([owner for *_, owner in chosen], np.int32)
        return Rows(batch, *counted, mentions, owners)

    def _counted(
        self, rows: Sequence[_Spoken], batch: Batch
    ) -> tuple[
        NDArray[np.float32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]
    ]:
        """Of the learned tokens, what balances their scores, how much each counts, what
        takes a share of it and which.
        """
        balances: list[Balance] = []
        weights: list[float] = []
        rivals: list[Rival] = []
        for row, tokens, flags in zip(rows, batch.tokens, batch.learned, strict=True):
            together = [(tokens[flags].tolist(), Exchange("", ""))]
            for learned, x in row.answers or together:
                number = len(learned)
                unbalanced: list[Balance] = [{}] * number
                balances += (
                    self._adjustment(learned, x.about, self._doubts(x))
                    if row.balanced
                    else unbalanced
                )
                weights += [max(number, 1) ** -self.stage.row_power] * number
                rivals += (
                    self._rivals(learned, x) if row.balanced else [NO_RIVAL] * number
                )
        assert len(weights) == len(rivals) == batch.learned.sum()
        return (
            self._adjustment.table(balances),
            np.array(weights, np.float32),
            np.array([token for token, _ in rivals], np.int32),
            np.array([share for _, share in rivals], np.float32),
        )

    def _doubts(self, exchange: Exchange) -> Mapping[int, Balance]:
        """Against what a model leans to that was never shown some of what is there."""
        if exchange.kind == "exists":
            # A no that were both doubted and softened would be none.
            alone = self.stage.soften_no > 0
            return self._adjustment.doubt_denials(self.stage.doubt, beside_yes=alone)
        if self._doubts_number(exchange):
            return self._adjustment.doubt_small_numbers(self.stage.doubt_few)
        return {}

    def _doubts_number(self, exchange: Exchange) -> bool:
        some = not self.stage.doubt_some or names_some(exchange.question)
        return exchange.kind == "count" and some

    def _rivals(self, learned: Sequence[int], exchange: Exchange) -> list[Rival]:
        """What takes a share of each token: of the first no or number, what is more.

        Things of a pair that was never shown are overlooked, hardly ever made up.
        """
        softened: Mapping[int, Rival] = {}
        if exchange.kind == "exists":
            softened = self._adjustment.soften_denials(self.stage.soften_no)
        if self._doubts_number(exchange):
            softened = self._adjustment.soften_numbers(self.stage.soften_number)
        rivals = [NO_RIVAL] * len(learned)
        for i, token in enumerate(learned):
            if token in softened:
                rivals[i] = softened[token]
                break
        return rivals

    def _whole(
        self, scenes: Sequence[Scene], groups: Sequence[Sequence[_Whole]]
    ) -> JointBatch:
        """The batch of rows in which pictures stand, those of a group padded alike."""
        parts = []
        for group in groups:
            samples = [row.spoken.sample for row in group]
            places = [row.places for row in group]
            batch = collate(samples, places, (), self.config, self.tokenizer)
            counted = self._counted([row.spoken for row in group], batch)
            examples = self._examples(group, batch)
            parts.append(Rows(batch, *counted, NO_MENTIONS, examples=examples))
        return JointBatch(tuple(parts), None, label_patches(scenes, self.config))

    def _examples(self, group: Sequence[_Whole], batch: Batch) -> Examples | None:
        T = batch.tokens.shape[1]
        known: list[tuple[int, Pair]] = []
        queries: list[int] = []
        told: list[list[int]] = []
        for b, row in enumerate(group):
            wide = self._widened(row.spoken.sample)
            for i, named in enumerate(row.named):
                places = [wide[token] for token in named.tokens]
                # Where its name is read, and where that is found again.
                first = b * T + places[0]
                known += [(first - 1, named.pair), (first, named.pair)]
                if not named.told:
                    continue
                alike = [x.tokens for x in row.named[:i] if x.word == named.word]
                queries += [b * T + place - 1 for place in places]
                told += [[wide[t] for t in again] for again in zip(*alike, strict=True)]
        if not known:
            return None
        table = np.zeros((len(queries), T), bool)
        for q, found in enumerate(told):
            table[q, found] = True
        return Examples(
            np.array([place for place, _ in known], np.int32),
            np.array([SHAPE_CLASSES[shape] for _, (_, shape) in known], np.int32),
            np.array([COLOUR_CLASSES[colour] for _, (colour, _) in known], np.int32),
            np.array(queries, np.int32),
            table,
        )

    def _widened(self, sample: Sample) -> list[int]:
        """Where each token of a sample stands once pictures take their places."""
        assert self.config.connector is not None
        wide = self.config.connector.num_image_tokens - 1
        places, shift = [], 0
        for i, token in enumerate(sample.tokens):
            places.append(i + shift)
            shift += wide if token == self._image else 0
        return places

    def episode(
        self, episode: Episode, rng: np.random.Generator, *, seen: bool
    ) -> tuple[Sample, list[Named]]:
        """The conversation, and what is named in it."""
        tokens: list[int] = []
        learned: list[bool] = []
        named: list[Named] = []
        text = pick(rng, TEXTS)
        for i, (pair, word) in enumerate(
            zip(episode.pairs, episode.words, strict=True)
        ):
            question = text if seen else told(pair, rng)
            part = self._sample((question, word), int(seen))
            known = i not in episode.unknown
            answer = [len(tokens) + int(t) for t in np.flatnonzero(part.learned)]
            named.append(Named(pair, word, answer, known))
            tokens += part.tokens
            learned += [flag and known for flag in part.learned]
        return Sample(tuple(tokens), tuple(learned)), named

    def _in_turn(
        self, exchanges: Sequence[Exchange], pictures: int, *, behind: bool = False
    ) -> _Spoken:
        """A conversation that begins with so many pictures, or the question before them."""
        parts = []
        for i, x in enumerate(exchanges):
            shown = 0 if i else pictures
            part = self._sample((x.question, x.answer), shown, behind)
            parts.append(_Spoken(part, [(_learned(part), x)]))
        return _joined(parts)

    def _build(
        self, pair: tuple[str, str], pictures: int, behind: bool = False
    ) -> Sample:
        question, answer = pair
        shown: list[str | None] = [None] * pictures
        asked = [question, *shown] if behind else [*shown, question]
        turns: list[Turn] = [("user", asked), ("assistant", [answer])]
        return build_sample(turns, self.config, self.tokenizer)

    def _mixed(self, parts: Sequence[Part]) -> Sample:
        held = [None if isinstance(part, int) else part for part in parts]
        return build_document(held, self.config, self.tokenizer)

    def _split(self, sample: Sample) -> tuple[Sample, Row]:
        """What stands up to the last picture, and behind it."""
        tokens = sample.tokens
        cut = max(i for i, token in enumerate(tokens) if token == self._image) + 1
        head = Sample(tokens[:cut], (False,) * cut)
        return head, Row(tokens[cut:], (False, *sample.learned[cut + 1 :]), ())


def _learned(sample: Sample) -> list[int]:
    return [t for t, flag in zip(sample.tokens, sample.learned, strict=True) if flag]


def _joined(parts: Sequence[_Spoken]) -> _Spoken:
    """Texts, one behind another."""
    return _Spoken(
        Sample(
            tuple(t for part in parts for t in part.sample.tokens),
            tuple(flag for part in parts for flag in part.sample.learned),
        ),
        [answer for part in parts for answer in part.answers],
    )


def _place_of(pair: Pair, pairs: Sequence[Pair], rng: np.random.Generator) -> int:
    """One of the pictures that show a pair."""
    return pick(rng, [i for i, other in enumerate(pairs) if other == pair])
