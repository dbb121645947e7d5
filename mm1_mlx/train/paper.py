"""What MM1 was trained with, as values: laws, schedules, mixtures.

MM1 (arXiv 2403.09611), sections 3.3, 3.4 and 4.1, and the tables of its appendix. The
dataset sizes of the supervised stage are thousands of examples.
"""

import math
from dataclasses import dataclass

# Shares of the pre-training data: captions, interleaved documents, text.
PRETRAINING_MIXTURE = {"caption": 0.45, "interleaved": 0.45, "text": 0.10}
PRETRAINING_STEPS = 200_000
PRETRAINING_BATCH = 512  # sequences
SEQUENCE_LENGTH = 4096  # tokens
MAX_PICTURES_PER_SEQUENCE = 16
SFT_STEPS = 10_000
SFT_BATCH = 256
# Before a cosine to a share of the peak.
WARMUP_STEPS = 2000
FINAL_FRACTION = 0.1
# What weights lose a step, lambda, as a share of the learning rate, eta: as mlx's and
# torch's AdamW have it.
DECAY_SHARE = 0.1
# AdaFactor's, by a cosine from its peak to 0; of a warmup or a decay nothing is said.
SFT_LEARNING_RATE = 1e-5
SFT_FINAL_FRACTION = 0.0

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
