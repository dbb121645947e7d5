"""What MM1 was trained with, as values: laws, schedules, prompts.

MM1 (arXiv 2403.09611), sections 3.3, 3.4 and 4.1, and the tables of its appendix. Its
mixtures are in ``data/specs``.
"""

import math

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


def peak_learning_rate(parameters: float) -> float:
    """The best peak for a decoder of so many parameters: exp(-0.4214 ln N - 0.5535)."""
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)
