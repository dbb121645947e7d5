"""The sizes of MM1 (arXiv 2403.09611) as configs.

The paper states each model's total parameters, the encoder (ViT-H/14 at 378 pixels),
the connector (C-Abstractor, 144 image tokens) and the number and period of expert
layers. It does not state the decoders' layers, widths, heads or vocabulary: those here
are ours, chosen because their parameter counts meet every published total at once. The
vocabulary is axlearn's for models of that time.
"""

from mm1_mlx.config import (
    CAbstractorConfig,
    DecoderConfig,
    ImageConfig,
    MM1Config,
    MoEConfig,
    PromptConfig,
    VisionConfig,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

VIT_L_14_336 = VisionConfig(
    image_size=336,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="quick_gelu",
)

# apple/DFN5B-CLIP-ViT-H-14-378.
VIT_H_14_378 = VisionConfig(
    image_size=378,
    patch_size=14,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    hidden_act="quick_gelu",
)


def _decoder(
    layers: int, width: int, heads: int, kv_heads: int, feedforward: int
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=49_152,
        hidden_size=width,
        intermediate_size=feedforward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        # axlearn, in which MM1 was trained, rotates interleaved pairs.
        rope_interleaved=True,
    )


def _mm1(
    vision: VisionConfig, decoder: DecoderConfig, moe: MoEConfig | None = None
) -> MM1Config:
    if moe is not None:
        decoder = DecoderConfig.from_dict(decoder.to_dict() | {"moe": moe})
    return MM1Config(
        vision=vision,
        connector=CAbstractorConfig(
            input_size=vision.hidden_size,
            num_features=vision.num_features,
            output_size=decoder.hidden_size,
            num_image_tokens=144,
        ),
        decoder=decoder,
        image=ImageConfig(
            size=vision.image_size, resize="squash", mean=CLIP_MEAN, std=CLIP_STD
        ),
        prompt=PromptConfig(template="plain"),
    )


_1_2B = _decoder(24, 2048, 32, 32, 5632)
_3B = _decoder(26, 3072, 24, 24, 8064)
_7B = _decoder(32, 4096, 32, 4, 13_312)
_30B = _decoder(48, 7168, 56, 56, 19_200)

# axlearn's honeycrisp-3B, AFM-on-device's skeleton: a decoder alone.
# https://github.com/apple/axlearn/blob/34aed43/axlearn/experiments/text/gpt/honeycrisp.py
_AFM_3B = DecoderConfig.from_dict(
    _decoder(26, 3072, 24, 8, 8064).to_dict() | {"qk_norm": "rotated"}
)

PRESETS: dict[str, MM1Config] = {
    "mm1-1.2b": _mm1(VIT_L_14_336, _1_2B),  # the ablations' base
    "mm1-3b": _mm1(VIT_H_14_378, _3B),
    "mm1-7b": _mm1(VIT_H_14_378, _7B),
    "mm1-30b": _mm1(VIT_H_14_378, _30B),
    "mm1-3b-moe": _mm1(VIT_H_14_378, _3B, MoEConfig(num_experts=64, every=2, offset=1)),
    "mm1-7b-moe": _mm1(VIT_H_14_378, _7B, MoEConfig(num_experts=32, every=4, offset=3)),
    "afm-3b": MM1Config(decoder=_AFM_3B, prompt=PromptConfig(template="plain")),
}
