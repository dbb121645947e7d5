"""Which decoders are read, and which are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import sources

from mm1_mlx.convert import Source, detect_format
from mm1_mlx.convert.detect import formats, name_of
from mm1_mlx.errors import CheckpointError, ConfigError

READ = {
    "llama": "llama_hf",
    "mistral": "llama_hf",
    "qwen2": "qwen_hf",
    "qwen3": "qwen_hf",
    "mixtral": "mixtral_hf",
    "olmoe": "olmoe_hf",
    "stablelm": "stablelm_hf",
    "openelm": "openelm",
    "gemma": "gemma_hf",
    "phi3": "phi3_hf",
    "axlearn": "axlearn",
}
REFUSED = (
    *(
        "phi",
        "qwen",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "olmo",
        "olmo2",
        "stablelm_epoch",
    ),
    *("qwen2_moe", "qwen3_moe", "phimoe", "gpt_neox", "falcon", "mpt", "cohere"),
)


def source(folder: Path, values: dict[str, Any]) -> Source:
    return Source(str(sources.write(folder / "in", values, {})))


@pytest.mark.parametrize("kind", READ)
def test_a_decoder_is_in_one_format(kind: str, tmp_path: Path) -> None:
    given = source(tmp_path, {"model_type": kind})
    assert [name_of(f) for f in formats() if f.detect(given)] == [READ[kind]]


@pytest.mark.parametrize("kind", REFUSED)
def test_other_decoders_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    message = f"model type '{kind}' .* is not one this program converts; it converts .*"
    with pytest.raises(CheckpointError, match=message):
        detect_format(source(tmp_path, {"model_type": kind}))


@pytest.mark.parametrize("kind", REFUSED)
def test_other_decoders_are_refused_inside_llava(kind: str, tmp_path: Path) -> None:
    values = sources.LLAVA | {"text_config": sources.LLAMA | {"model_type": kind}}
    given = source(tmp_path, values)
    message = f"LlavaConfig.text_config: model type '{kind}' is not supported"
    with pytest.raises(ConfigError, match=message):
        detect_format(given).config(given)


# Not the one that has no config.json of transformers' kind.
@pytest.mark.parametrize("kind", [kind for kind in READ if kind != "axlearn"])
@pytest.mark.parametrize(
    "field", ["attention_multiplier", "use_bidirectional_attention", "layer_scale"]
)
def test_a_field_that_is_not_known_is_refused(
    kind: str, field: str, tmp_path: Path
) -> None:
    lists = {"num_query_heads": [2] * 12, "num_kv_heads": [1] * 12}
    values = {"model_type": kind, field: 2.0}
    if kind == "openelm":
        values |= lists | {"ffn_multipliers": [1.0] * 12}
    given = source(tmp_path, values)
    with pytest.raises(ConfigError, match=rf"field\(s\) \['{field}'\] are not known"):
        detect_format(given).config(given)
