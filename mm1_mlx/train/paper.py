"""What MM1 was trained with, as values: laws, schedules, mixtures.

MM1 (arXiv 2403.09611), sections 3.3, 3.4 and 4.1, and the tables of its appendix. The
dataset sizes of the supervised stage are thousands of examples.
"""

import math
from dataclasses import dataclass

from mm1_mlx.train.config import TrainConfig

# Shares of the pre-training data: captions, interleaved documents, text.
PRETRAINING_MIXTURE = {"caption": 0.45, "interleaved": 0.45, "text": 0.10}
PRETRAINING_STEPS = 200_000
PRETRAINING_BATCH = 512  # sequences
SEQUENCE_LENGTH = 4096  # tokens
MAX_PICTURES_PER_SEQUENCE = 16
SFT_STEPS = 10_000
SFT_BATCH = 256
SFT_LEARNING_RATE = 1e-5
# What weights lose a step, lambda, as a share of the learning rate, eta.
DECAY_SHARE = 0.1

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a brief description of the given image."
TRANSCRIBE = "Please transcribe all the text in the picture."


@dataclass(frozen=True)
class Dataset:
    """One row of the supervised mixture: thousands of examples, and what is asked."""

    name: str
    thousands: int
    # Added to every question; of captions and transcriptions one of several such prompts.
    prompt: str | None = None


SFT_MIXTURE = (
    Dataset("Text-only SFT", 13),
    Dataset("LLaVA-Conv", 57),
    Dataset("LLaVA-Complex", 77),
    Dataset("ShareGPT-4V", 102),
    Dataset("VQAv2", 83, SHORT_ANSWER),
    Dataset("GQA", 72, SHORT_ANSWER),
    Dataset("OKVQA", 9, SHORT_ANSWER),
    Dataset("OCRVQA", 80, SHORT_ANSWER),
    Dataset("DVQA", 200, SHORT_ANSWER),
    Dataset("ChartQA", 18, SHORT_ANSWER),
    Dataset("AI2D", 3, SHORT_ANSWER),
    Dataset("DocVQA", 39, SHORT_ANSWER),
    Dataset("InfoVQA", 24, SHORT_ANSWER),
    Dataset("A-OKVQA", 66, LETTER),
    Dataset("COCO Captions", 83, CAPTION),
    Dataset("TextCaps", 22, CAPTION),
    Dataset("SynthDog-EN", 500, TRANSCRIBE),
)

# MM1.5 (arXiv 2409.20566): shares of pre-training, of continual pre-training on text in
# pictures, and of supervised fine-tuning, in percent.
PRETRAINING_MIXTURE_1_5 = {"caption": 50.0, "interleaved": 10.0, "text": 40.0}
CONTINUAL_MIXTURE_1_5 = dict.fromkeys(
    ("PDFA", "IDL", "RenderedText", "DocStruct-4M"), 25.0
)
SFT_MIXTURE_1_5 = {
    "text-rich": 37.2,
    "refer-and-ground": 22.5,
    "general": 11.3,
    "math": 5.6,
    "code": 2.3,
    "science": 1.1,
    "multi-image": 10.0,
    "text": 10.0,
}


def peak_learning_rate(parameters: float) -> float:
    """The best peak for a decoder of so many parameters: exp(-0.4214 ln N - 0.5535)."""
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


def weight_decay(learning_rate: float) -> float:
    """Lambda, what weights lose a step at the peak: a tenth of the learning rate."""
    return DECAY_SHARE * learning_rate


def pretraining(parameters: float) -> TrainConfig:
    """The pre-training schedule of a decoder of so many parameters.

    Warmup over 2,000 steps and a cosine to a tenth of the peak.
    """
    peak = peak_learning_rate(parameters)
    return TrainConfig(
        steps=PRETRAINING_STEPS,
        learning_rate=peak,
        warmup_steps=2000,
        decay_steps=PRETRAINING_STEPS - 2000,
        final_fraction=0.1,
        # Relative to the rate, as mlx's and torch's AdamW have it.
        weight_decay=DECAY_SHARE,
    )


def fine_tuning() -> TrainConfig:
    """The supervised stage's schedule: AdaFactor, a cosine from its peak to 0.

    Of a decay nothing is said.
    """
    return TrainConfig(
        steps=SFT_STEPS,
        optimizer="adafactor",
        learning_rate=SFT_LEARNING_RATE,
        warmup_steps=0,
        decay_steps=SFT_STEPS,
        final_fraction=0.0,
        weight_decay=0.0,
    )
