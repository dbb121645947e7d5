"""A model of this package as a model of lmms-eval, so that published tasks run on it.

    pip install "mm1-mlx[lmms]"
    python -m lmms_eval --model mm1 --model_args pretrained=my-llava --tasks pope --batch_size 8

lmms-eval finds it by the entry point ``lmms_eval.models``. Its tasks bring their data and
their metrics; what is read and said is as in ``mm1 generate``. Run with 0.7.3 and local
data: answers are counted; tasks by likelihood fail there with any model, as the evaluator
turns each (loss, greedy) into text before a task sees it.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval/blob/75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3/lmms_eval/api/model.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from mm1_mlx.adapters import parse
from mm1_mlx.answer import Settings
from mm1_mlx.batch import SIZE, Ask, generate_batch
from mm1_mlx.errors import ConfigError, MM1Error, PromptError
from mm1_mlx.likelihood import Candidates, loglikelihoods
from mm1_mlx.messages import Message
from mm1_mlx.runtime import load

# What stands in a task's text where a picture does.
PLACE = "<image>"
MAX_TOKENS = 1024
# Of lmms-eval's settings of an answer, those that are followed, and those that say
# nothing to a greedy answer or to a sampled one.
_IDLE = {"do_sample", "num_beams", "image_aspect_ratio", "max_length", "use_cache"}
_KNOWN = {"until", "max_new_tokens", "temperature", "top_p", "seed"} | _IDLE


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told: ``--model mm1``."""
    return ModelManifest(
        model_id="mm1", simple_class_path=f"{__name__}.MM1Lmms", aliases=("mm1_mlx",)
    )


class MM1Lmms(lmms):
    """A model folder or hub repository that lmms-eval asks.

    Args:
        pretrained: the model, by default as ``mm1`` takes it without ``-m``.
        batch_size: how many answers are under way at once.
        max_batch_size: lmms-eval's; ``batch_size`` says it.
        device: lmms-eval's; mlx runs on the Mac's GPU wherever that is.
        resolution: how pictures become tiles, as ``--resolution``.
        tiled: how many of a prompt's last pictures may be split into tiles.
        adapter: names of adapters with scales, separated by ``+``.
        system_prompt: stands before every conversation.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = SIZE,
        max_batch_size: int | None = None,  # noqa: ARG002
        device: str | None = None,  # noqa: ARG002
        resolution: str | int | None = None,
        tiled: int | None = None,
        adapter: str | None = None,
        system_prompt: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"unknown model_args {sorted(unknown)[:5]}; known: pretrained, "
                "resolution, tiled, adapter, system_prompt"
            )
        size = str(batch_size)
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"batch_size is {batch_size!r}, expected a positive number"
            )
        self.batch_size = int(size)
        self._tiled, self._system = tiled, system_prompt
        adapters = [parse(name) for name in adapter.split("+")] if adapter else []
        self.runtime = load(
            pretrained,
            resolution=None if resolution is None else str(resolution),
            adapters=adapters,
        )

    def clean(self) -> None:
        """Let the model go."""
        self.runtime.close()
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers to requests, in their order."""
        asks = []
        for request in requests:
            context, options, visual, number, task, split = request.args
            shown = visual(self._document(task, split, number))
            asks.append(self._ask(context, shown, options))
        said = self._answers(asks)
        for request, text in zip(requests, said, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return said

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """What was said in all rounds of each request.

        The task's own function says what is asked next, and when to end.
        """
        return [self._rounds(*request.args) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The loss of each request's continuation, and whether a greedy answer begins so.

        The negative sum of log-probabilities: the API's docstring asks for the sum, but
        lmms-eval's own models return a loss, and its tasks take the least of what comes
        (``ConfigurableTask.process_results``).
        """
        questions = []
        for request in requests:
            context, target, visual, number, task, split = request.args
            document = self._document(task, split, number)
            text = target if isinstance(target, str) else target(document)
            ask = self._ask(context, visual(document), {})
            questions.append(Candidates(ask, (str(text),)))
        found = []
        for _, scores in loglikelihoods(self.runtime, questions):
            if isinstance(scores, MM1Error):
                raise scores
            found.append((-scores[0].logprob, scores[0].greedy))
        return found

    def _document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def _rounds(
        self,
        context: str,
        options: Mapping[str, Any],
        visual: Any,
        follow: Any,
        number: Any,
        task: str,
        split: str,
    ) -> list[str]:
        """What was said in each round of one request."""
        document = self._document(task, split, number)
        shown, info = visual(document), None
        said: list[str] = []
        while True:
            # As its own models do, each round is asked by itself: what stands before is
            # the task's to write. An end that a task names is of all rounds.
            rest = {key: value for key, value in options.items() if key != "until"}
            said += self._answers([self._ask(context, shown, rest)])
            shown, context, ended, results, info = follow(
                document,
                previous_output=said,
                round_idx=len(said),
                previous_round_info=info,
            )
            if ended:
                return list(results)

    def _answers(self, asks: Sequence[Ask]) -> list[str]:
        said = []
        for answer in generate_batch(self.runtime, asks, size=self.batch_size):
            if isinstance(answer, MM1Error):
                raise answer
            said.append(answer.text.strip())
        return said

    def _ask(self, context: str, shown: Any, options: Mapping[str, Any]) -> Ask:
        messages: list[Message] = [
            {"role": "user", "content": [*_parts(context, shown)]}
        ]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return Ask(messages, (), _settings(options, self._tiled))


def _parts(context: str, shown: Any) -> Iterator[dict[str, Any]]:
    """The parts of a question: pictures in their places, or before it."""
    pictures = [_picture(source) for source in shown or []]
    texts = context.split(PLACE)
    if len(texts) != len(pictures) + 1:
        # Fewer places than pictures, or a typed one.
        yield from pictures
        texts, pictures = [context], []
    for i, text in enumerate(texts):
        if text:
            yield {"type": "text", "text": text}
        yield from pictures[i : i + 1]


def _picture(source: Any) -> dict[str, Any]:
    if isinstance(source, Image.Image):
        return {"type": "image", "image": source}
    if isinstance(source, str):
        return {"type": "video", "video": source}
    raise PromptError(
        f"the task shows {type(source).__name__}, expected pictures or paths of videos; "
        "choose a task of these"
    )


def _settings(options: Mapping[str, Any], tiled: int | None) -> Settings:
    """How to answer, from lmms-eval's generation_kwargs.

    Raises:
        PromptError: they ask for what is not there.
    """
    if unknown := sorted(set(options) - _KNOWN):
        raise PromptError(
            f"generation_kwargs has {unknown[:5]}, expected some of {sorted(_KNOWN)}"
        )
    beams = options.get("num_beams") or 1
    if beams != 1:
        raise PromptError(
            f"num_beams is {beams}, but answers are searched without beams"
        )
    ends = options.get("until") or []
    sampled = options.get("do_sample", True) and options.get("temperature")
    return Settings(
        max_tokens=int(options.get("max_new_tokens") or MAX_TOKENS),
        temperature=float(options["temperature"]) if sampled else 0.0,
        top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
        seed=options.get("seed"),
        stop=[ends] if isinstance(ends, str) else [end for end in ends if end],
        tiled=tiled,
    )
