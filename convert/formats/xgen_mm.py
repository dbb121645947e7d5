"""xGen-MM 1 (BLIP-3, arXiv 2408.08872): ``Salesforce/xgen-mm-phi3-mini-base-r-v1``.

https://huggingface.co/Salesforce/xgen-mm-phi3-mini-base-r-v1 (config and processor)
https://github.com/salesforce/LAVIS/blob/d699f7e/open_flamingo/src/xgenmm.py (the code of
its successor, whose modules have the same names and make the checkpoint's number of tensors
and of bytes: 16 heads of 96 in the Perceiver, a bias of the logits)

MM1's encoder, DFN5B's ViT-H/14-378 in open_clip's layout, and Phi-3-mini between a
Perceiver of 128 latents. A picture is one tile, squashed. The vocabulary has three tokens
more than the tokenizer's files, whose rows lie beside the decoder's own.

The model card's prompts write 127 times "<image placeholder>" after every "<image>".
Whether its code puts the 128 image tokens in the place of all of them could not be found,
and is assumed; the config's ``prompt.after_image`` takes them where it does not.
"""

from dataclasses import replace
from typing import Any

from mm1_mlx.config import MM1Config, PromptConfig

from ..rules import Table, join
from ..shared import language, open_clip, perceiver
from ..shared import xgen_mm as parts
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source

WHERE = "XGenMMConfig"
MODEL, CONNECTOR = "vlm.lang_model.", "vlm.vision_tokenizer."
EMBEDDING, HEAD = f"{MODEL}model.embed_tokens", f"{MODEL}lm_head"
TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")


def detect(source: Source) -> bool:
    """Whether the source is an xGen-MM, of whatever version."""
    return source.config.get("model_type") == "xgenmm"


def rules(source: Source) -> Table:
    """The tensor names of the whole model."""
    text, rows = _text(source)
    names = language.table(text, f"{MODEL}model.", MODEL)
    for target, first, added in (
        ("embed_tokens.weight", EMBEDDING, f"{EMBEDDING}.additional_embedding"),
        ("lm_head.weight", HEAD, f"{HEAD}.additional_fc"),
        ("lm_head.bias", HEAD, f"{HEAD}.additional_fc"),
    ):
        leaf = target.rpartition(".")[2]
        op = join(f"decoder.{target}", f"{added}.{leaf}", rows=rows)
        names[f"{first}.{leaf}"] = op
    names |= open_clip.tower(parts.ENCODER) | perceiver.table(CONNECTOR)
    # CLIP's space has no use beside a decoder.
    names[f"{parts.ENCODER}proj"] = None
    return names


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(source.config, WHERE)
    vision = parts.vision_section(source, fields)
    text, rows = _text(source)
    fields.get("text_config")
    decoder = replace(
        language.decoder_config(text),
        vocab_size=rows + len(TOKENS),
        head_bias=source.holds(f"{HEAD}.bias"),
    )
    connector = parts.connector_section(fields, vision, decoder)
    fields.finish()
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=parts.image_section(source, vision.image_size),
        prompt=_prompt(source, text, rows),
    )


def _text(source: Source) -> tuple[dict[str, Any], int]:
    """The decoder's fields, and how many tokens its tokenizer knows."""
    where = f"{WHERE}.text_config"
    given = source.config.get("text_config")
    fields = Fields(given or {}, where, {"initial_tokenizer_len": 32_012})
    rows = fields.integer("initial_tokenizer_len")
    own = {k: v for k, v in fields.values.items() if k != "initial_tokenizer_len"}
    return language.values({"model_type": "phi3"} | own, where), rows


def _prompt(source: Source, text: dict[str, Any], rows: int) -> PromptConfig:
    # The tokenizer's own template is Phi-3's, for chats.
    made = prompt_section(source, text, "xgen_mm")
    ends = rows + TOKENS.index("<|endofchunk|>")
    return replace(
        made,
        template="xgen_mm",
        content="string",
        image_token=TOKENS[0],
        image_token_id=rows,
        added_tokens=TOKENS,
        eos_token_ids=(*made.eos_token_ids, ends),
    )
