"""Messages and pictures to a ``Prompt``: tokens, and the spans that pictures fill.

Every count is checked here, in Python ints, before anything runs on the device.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jinja2

from mm1_mlx.config import MM1Config, PromptConfig
from mm1_mlx.errors import ConfigError, ContextError, PromptError
from mm1_mlx.image import ImageSource, Seen, load_pictures
from mm1_mlx.layout import Picture, Span, count_picture_tokens, indicator_texts
from mm1_mlx.messages import Message, Part, RegionToken, Turn, collect
from mm1_mlx.regions import refer
from mm1_mlx.templates import AFTER_IMAGE, BETWEEN_IMAGES, MARKS, TEMPLATES
from mm1_mlx.tokenizer import Tokenizer

# What a template may raise: its own refusal, the sandbox's, or any fault of its code.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    Attributes:
        tokens: ids [T]; a picture's positions hold ``PromptConfig.image_token_id``.
        spans: where the pictures stand, in order.
        pictures: the pictures, in order.
    """

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def num_image_tokens(self) -> int:
        """Positions filled by pictures and their regions."""
        return sum(span.length for span in self.spans)

    @cached_property
    def positions(self) -> tuple[int | tuple[str, int], ...]:
        """What stands at every position: a token, or a picture's digest and which token.

        Prompts whose positions begin alike are alike so far to the decoder.
        """
        positions: list[int | tuple[str, int]] = list(self.tokens)
        for span in self.spans:
            images = [(span.digest, span.offset + i) for i in range(span.length)]
            positions[span.start : span.stop] = images
        return tuple(positions)

    def after(self, count: int) -> Prompt:
        """The prompt without its first positions; pictures keep their numbers."""
        spans = []
        for span in self.spans:
            cut = max(0, count - span.start)
            if cut < span.length:
                spans.append(
                    replace(
                        span,
                        start=span.start + cut - count,
                        length=span.length - cut,
                        offset=span.offset + cut,
                    )
                )
        return Prompt(self.tokens[count:], tuple(spans), self.pictures)

    def until(self, count: int) -> Prompt:
        """The first positions of the prompt, with the pictures whole."""
        spans = tuple(span for span in self.spans if span.start < count)
        assert all(span.stop <= count for span in spans), "a picture would be cut"
        return Prompt(self.tokens[:count], spans, self.pictures)

    @classmethod
    def build(
        cls,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource],
        config: MM1Config,
        tokenizer: Tokenizer,
        *,
        tiled: int | None = None,
        most: int | None = None,
        seen: Seen | None = None,
    ) -> Prompt:
        """The prompt of a conversation that ends where the assistant answers.

        Args:
            messages: a question, or chat messages whose content is a string or a list of
                parts (``text``, ``image``, ``image_url``, ``video``, ``region``).
            images: pictures for the parts that bring none; where no part asks for one,
                they go before the last user message's text.
            config: the model's config.
            tokenizer: the model's tokenizer.
            tiled: how many of the last pictures may be split into tiles, None for all.
            most: a number of tokens; texts that must have more are refused unread.
            seen: knows pictures that were decoded before.

        Raises:
            PromptError: messages and pictures do not fit together or the model.
        """
        return cls.build_continued(
            messages, images, config, tokenizer, (), tiled=tiled, most=most, seen=seen
        )[0]

    @classmethod
    def build_continued(
        cls,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource],
        config: MM1Config,
        tokenizer: Tokenizer,
        continuations: Sequence[str],
        *,
        tiled: int | None = None,
        most: int | None = None,
        seen: Seen | None = None,
    ) -> tuple[Prompt, list[tuple[int, ...]]]:
        """The prompt, and the tokens of texts that may stand behind it.

        What a text is in tokens depends on what it follows: prompt and text are encoded
        as one. A space at its beginning is left out where the prompt ends with one.

        Args:
            messages: as of ``build``, as are the others.
            images: pictures.
            config: the model's config.
            tokenizer: the model's tokenizer.
            continuations: the texts.
            tiled: how many of the last pictures may be split into tiles, None for all.
            most: as of ``build``.
            seen: as of ``build``.

        Raises:
            PromptError: messages and pictures do not fit together or the model.
        """
        if config.prompt is None or config.decoder is None:
            raise ConfigError("the model has no decoder, so it cannot answer")
        turns, sources = collect(messages, images)
        if most is not None:
            _check_length(turns, tokenizer, most)
        if sources and not config.sees:
            raise PromptError(
                f"{len(sources)} picture(s) given, but the model takes text only; "
                "ask without pictures, or choose a model that sees"
            )
        pictures = (
            load_pictures(sources, config.image, tiled=tiled, seen=seen)
            if config.image
            else []
        )
        with tokenizer.lock:
            return cls._build(turns, pictures, config, tokenizer, continuations)

    @classmethod
    def _build(
        cls,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        config: MM1Config,
        tokenizer: Tokenizer,
        continuations: Sequence[str],
    ) -> tuple[Prompt, list[tuple[int, ...]]]:
        assert config.prompt is not None
        turns, pictures = refer(turns, pictures, config)
        tokens = encode_turns(turns, config.prompt, tokenizer)
        if not tokens and not pictures:
            raise PromptError("the prompt is empty; ask something")
        regions = [
            part.picture
            for _, parts in turns
            for part in parts
            if isinstance(part, RegionToken)
        ]
        prompt = place(tokens, pictures, config, tokenizer, regions)
        behind = []
        for text in continuations:
            whole = encode_turns(turns, config.prompt, tokenizer, continuation=text)
            behind.append(tuple(whole[len(tokens) :]))
            check_vocabulary(behind[-1], config, ())
        return prompt, behind


def _check_length(turns: Sequence[Turn], tokenizer: Tokenizer, most: int) -> None:
    """Pass only if the texts may be so few tokens; making them takes its time."""
    texts = [part for _, parts in turns for part in parts if isinstance(part, str)]
    size = sum(len(text.encode()) for text in texts)
    if size > most * tokenizer.longest:
        raise ContextError(
            f"prompt has {size:,} bytes of text, more than the model's context of "
            f"{most:,} tokens can hold; ask with less of it"
        )


def render(
    turns: Sequence[Turn],
    config: PromptConfig,
    tokenizer: Tokenizer,
    *,
    answer: bool = True,
) -> str:
    """The conversation as the template writes it, image tokens in place.

    Templates run in transformers' sandbox.

    Raises:
        PromptError: the template refuses the conversation.
    """
    if config.template == "checkpoint" and tokenizer.hf.chat_template is None:
        raise PromptError(
            "the model's tokenizer has no chat template; name a built-in one in "
            "config.json, prompt.template"
        )
    typed = config.template == "checkpoint" and config.content == "parts"
    messages = [
        {
            "role": role,
            "content": _typed_parts(parts, tokenizer)
            if typed
            else _joined(parts, config, tokenizer),
        }
        for role, parts in turns
    ]
    try:
        return tokenizer.hf.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answer,
            chat_template=TEMPLATES.get(config.template)
            or tokenizer.template_of_today(),
        )
    except _TEMPLATE_FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PromptError(
            f"the model's chat template refuses this conversation: {reason}"
        ) from None


def _texts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[str | None]:
    """Each stretch between pictures as one text: typed specials shielded, regions' not."""
    texts: list[str | None] = []
    for part in parts:
        if part is None:
            texts.append(None)
            continue
        text = tokenizer.region_token
        if isinstance(part, str):
            text = tokenizer.shield(part)
        assert text is not None, "the tokenizer was loaded without a region token"
        if texts and texts[-1] is not None:
            texts[-1] += text
        else:
            texts.append(text)
    return texts


def _typed_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[dict[str, str]]:
    return [
        {"type": "image"} if text is None else {"type": "text", "text": text}
        for text in _texts(parts, tokenizer)
    ]


def _joined(parts: Sequence[Part], config: PromptConfig, tokenizer: Tokenizer) -> str:
    after = config.after_image
    if after is None:
        after = AFTER_IMAGE.get(config.template, "")
    between = BETWEEN_IMAGES.get(config.template, after)
    written = []
    texts = _texts(parts, tokenizer)
    for text, following in zip(texts, [*texts[1:], ""], strict=True):
        if text is not None:
            written.append(text)
        else:
            end = between if following is None else after
            written.append(tokenizer.image_token + end)
    return "".join(written)


def encode_turns(
    turns: Sequence[Turn],
    config: PromptConfig,
    tokenizer: Tokenizer,
    *,
    answer: bool = True,
    continuation: str = "",
) -> list[int]:
    """Tokens of the rendered conversation, one image token per picture.

    A continuation stands behind it; its first space is the template's, if that ends so.

    The tokenizer adds its own special tokens where the reference code lets it:
    text-only chat templates write theirs; processors with pictures leave them to the
    tokenizer, unless the template wrote the first one already.
    """
    text = render(turns, config, tokenizer, answer=answer)
    if text[-1:].isspace():
        continuation = continuation.removeprefix(" ")
    text += tokenizer.shield(continuation)
    if (marks := MARKS.get(config.template)) is not None:
        return _encode_apart(text, (tokenizer.image_token, *marks), tokenizer)
    bos = tokenizer.hf.bos_token
    written = bos is not None and text.startswith(bos)
    chat = config.template == "checkpoint" and config.content == "string"
    return tokenizer.encode(text, add_special_tokens=not (chat or written))


def _encode_apart(text: str, marks: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The begin token, then the tokens of marks and of what lies between, each by itself."""
    bos = tokenizer.hf.bos_token_id
    tokens = [] if bos is None else [bos]
    for stretch in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        if stretch:
            tokens += tokenizer.encode(stretch, add_special_tokens=False)
    return tokens


def place(
    tokens: Sequence[int],
    pictures: Sequence[Picture],
    config: MM1Config,
    tokenizer: Tokenizer,
    regions: Sequence[int] = (),
) -> Prompt:
    """The prompt in which every image token is widened to its picture's positions.

    Args:
        tokens: of the conversation, one image token per picture.
        pictures: the pictures in order, with their regions.
        config: the model's config.
        tokenizer: the model's tokenizer.
        regions: for every region token, in order, the picture whose next region it is.

    Raises:
        PromptError: the tokens hold more or fewer places than there are pictures or
            regions, or one that the decoder has no embedding for.
    """
    placed: list[int] = []
    spans: list[Span] = []
    for stretch, held in lay_out(tokens, pictures, config, tokenizer, regions):
        spans += [replace(span, start=len(placed) + span.start) for span in held]
        placed += stretch
    return Prompt(tuple(placed), tuple(spans), tuple(pictures))


def lay_out(
    tokens: Sequence[int],
    pictures: Sequence[Picture],
    config: MM1Config,
    tokenizer: Tokenizer,
    regions: Sequence[int] = (),
) -> Iterator[tuple[list[int], list[Span]]]:
    """What stands for each token of a conversation, with the spans in it, from 0.

    A token of text stands for itself, without a span. Arguments and errors are those of
    ``place``.
    """
    image_id = tokenizer.image_id
    places = sum(token == image_id for token in tokens)
    if places != len(pictures):
        raise PromptError(
            f"prompt has {places} places for pictures but {len(pictures)} images "
            "were given; the model's chat template lost or made some"
        )
    region_id = tokenizer.region_id
    places = sum(token == region_id for token in tokens)
    if places != len(regions):
        raise PromptError(
            f"prompt has {places} places for regions but {len(regions)} were given; the "
            "model's chat template lost or made some"
        )
    check_vocabulary(tokens, config, (image_id, region_id))
    assert config.prompt is not None
    filler = config.prompt.image_token_id
    waiting = iter(enumerate(pictures))
    regional = iter(_region_spans(pictures, regions, config))
    for token in tokens:
        if token == region_id:
            yield [filler], [next(regional)]
        elif token == image_id:
            number, picture = next(waiting)
            yield widen(picture, number, config, tokenizer)
        else:
            yield [token], []


def widen(
    picture: Picture, number: int, config: MM1Config, tokenizer: Tokenizer
) -> tuple[list[int], list[Span]]:
    """What stands in a picture's place: tokens, and the spans in them, counted from 0.

    Args:
        picture: the picture.
        number: which of its prompt's pictures it is, counted from 0.
        config: the model's config.
        tokenizer: writes the text between its tiles.
    """
    assert config.prompt is not None
    tokens: list[int] = []
    spans: list[Span] = []
    offset = 0
    for text, length in _stretches(picture, number, config):
        tokens += tokenizer.encode(text, add_special_tokens=False) if text else []
        spans.append(
            Span(len(tokens), length, picture.kind, number, picture.digest, offset)
        )
        tokens += [config.prompt.image_token_id] * length
        offset += length
    return tokens, spans


def _region_spans(
    pictures: Sequence[Picture], regions: Sequence[int], config: MM1Config
) -> list[Span]:
    """A span for every region's token: behind the image tokens of its picture."""
    seen = [0] * len(pictures)
    spans = []
    for number in regions:
        picture, nth = pictures[number], seen[number]
        seen[number] += 1
        points = picture.regions[nth].tobytes()
        digest = hashlib.sha256(picture.digest.encode() + points).hexdigest()
        offset = count_picture_tokens(picture, config) + nth
        spans.append(Span(0, 1, "region", number, digest, offset))
    return spans


def _stretches(
    picture: Picture, number: int, config: MM1Config
) -> list[tuple[str, int]]:
    """Image tokens of a picture in runs, each with the text that stands before it."""
    tiling = config.image.tiling if config.image else None
    texts = indicator_texts(picture, number, tiling)
    if not texts:
        return [("", count_picture_tokens(picture, config))]
    return [(text, config.num_image_tokens) for text in texts]


def check_vocabulary(
    tokens: Sequence[int], config: MM1Config, places: Sequence[int | None]
) -> None:
    """Pass only if the decoder has an embedding for every token that is no place.

    Args:
        tokens: of a prompt.
        config: the model's config.
        places: the tokens that stand for something else.

    Raises:
        PromptError: it has none.
    """
    assert config.decoder is not None
    # mlx would read past the embedding's end.
    vocabulary = range(config.decoder.vocab_size)
    for token in tokens:
        if token not in vocabulary and token not in places:
            raise PromptError(
                f"the tokenizer makes token {token}, the decoder knows {len(vocabulary)}; "
                "they do not belong together, convert the model again"
            )
