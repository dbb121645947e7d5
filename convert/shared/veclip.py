"""How pictures are made for Apple's VeCLIP and VeCap-DFN, which no file of theirs says.

https://github.com/apple/ml-veclip/blob/ecce5da/clip_processor.py

Their archives hold a ``CLIPModel`` and nothing beside it: no preprocessor, which is code
of theirs that runs TensorFlow, and no tokenizer, which is T5's. So they are told by a text
tower of T5's vocabulary without a preprocessor's config. To embed texts with one, put the
files of T5's tokenizer (t5-base) beside it before it is converted.
"""

from mm1_mlx.config import ImageConfig, TextConfig
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..source import Source

# T5's pieces: alone, with the 100 that it fills gaps with, and padded.
VOCABULARIES = (32_000, 32_100, 32_128)
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def image_section(
    source: Source, size: int, text: TextConfig | None
) -> ImageConfig | None:
    """The picture's way to ``size`` x ``size`` pixels, None if the source is none of these."""
    if text is None or text.vocab_size not in VOCABULARIES:
        return None
    if any(source.file(name) for name in PREPROCESSORS):
        return None
    return ImageConfig(
        size=size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD, resample="bilinear"
    )
