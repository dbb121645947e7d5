"""Honeybee computes what CLIP and Llama of transformers and our oracle compute."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import llava_oracle  # noqa: E402
from honeybee_oracle import CAbstractor  # noqa: E402
from llava_oracle import VOCABULARY  # noqa: E402
from parity import Prompt, State, check_parity, pictures, save  # noqa: E402

from mm1_mlx.checkpoint import load_config, load_model, model_shapes  # noqa: E402
from mm1_mlx.config import CAbstractorConfig, MM1Config  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

# Honeybee's id of a picture's places is -1; ours is any of the vocabulary.
FILLER = 0


def honeybee(
    vision: dict[str, Any], projector: dict[str, Any], text: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model_type": "",
        "architectures": ["HoneybeeForConditionalGeneration"],
        "vision_config": {
            "encoder_type": "openai.clip",
            "pretrained_vision_name_or_path": "openai/clip-vit-large-patch14",
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
        }
        | vision,
        "projector_config": {
            "projector_type": "c-abs",
            "depth": 3,
            "mlp_depth": 2,
            "num_eos_tokens": 0,
            "pos_emb": True,
            "feature_layer_index": -1,
            "prenorm": False,
            "encoder_hidden_size": vision["hidden_size"],
            "output_hidden_size": text["hidden_size"],
        }
        | projector,
        "lm_config": {"pretrained_lm_name_or_path": "lmsys/vicuna-7b-v1.5"},
        "text_config": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 2,
        }
        | text,
    }


# By name: the seed, whose greedy tokens are diverse, and the config.
CASES = {
    "equal widths": (
        0,
        honeybee(
            {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
            },
            {"hidden_size": 32, "num_query_tokens": 4, "depth": 2},
            {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        ),
    ),
    "wider encoder, overlapping bins, 3 queries a key": (
        0,
        honeybee(
            {
                "hidden_size": 40,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "image_size": 35,
                "patch_size": 5,
            },
            {"hidden_size": 24, "num_query_tokens": 16},
            {
                "hidden_size": 36,
                "intermediate_size": 44,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-5,
            },
        ),
    ),
    "end tokens, a norm first, deeper readout, layer -2": (
        0,
        honeybee(
            {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_attention_heads": 3,
                "image_size": 42,
                "patch_size": 14,
                "num_hidden_layers": 3,
            },
            {
                "hidden_size": 28,
                "num_query_tokens": 4,
                "depth": 1,
                "mlp_depth": 3,
                "num_eos_tokens": 2,
                "prenorm": True,
                "feature_layer_index": -2,
            },
            {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 10,
            },
        ),
    ),
}


class Reference:
    """CLIP, the oracle and Llama, put together as Honeybee does."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        config = copy.deepcopy(config)
        projector, vision = config["projector_config"], config["vision_config"]
        self.layer = projector["feature_layer_index"]
        self.vision = llava_oracle.clip(
            {k: v for k, v in vision.items() if not k.startswith("pretrained")}
        )
        self.abstractor = CAbstractor(
            patches=(vision["image_size"] // vision["patch_size"]) ** 2,
            inputs=vision["hidden_size"],
            outputs=config["text_config"]["hidden_size"],
            tokens=projector["num_query_tokens"],
            hidden=projector["hidden_size"],
            depth=projector["depth"],
            mlp_depth=projector["mlp_depth"],
            eos=projector["num_eos_tokens"],
            prenorm=projector["prenorm"],
        )
        self.language = llava_oracle.llama(config["text_config"])
        llava_oracle.renew((self.vision, self.abstractor, self.language), 3 * seed)

    def state(self) -> State:
        parts = {
            "abstractor.": self.abstractor,
            "language_model.": self.language,
        }
        return llava_oracle.tower(self.vision, "vision_model.") | {
            prefix + name: tensor
            for prefix, part in parts.items()
            for name, tensor in part.state_dict().items()
        }

    def forward(self, tokens: list[int], pixels: Any) -> Any:
        """Logits [T, V]; the run of fillers is the picture's."""
        with torch.no_grad():
            hidden = self.vision(pixels, output_hidden_states=True).hidden_states
            image = self.abstractor(hidden[self.layer][:, 1:])
            start = tokens.index(FILLER)
            embeddings = self.language.get_input_embeddings()(torch.tensor([tokens]))
            embeddings[:, start : start + image.shape[1]] = image
            return self.language(inputs_embeds=embeddings).logits[0]


def prompt_of(out: Path) -> Prompt:
    return Prompt.make(VOCABULARY, load_config(out).num_image_tokens, FILLER)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_the_oracle(name: str, tmp_path: Path) -> None:
    seed, config = CASES[name]
    model = Reference(config, seed)
    save(tmp_path / "in", model.state(), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    inputs = pictures(config["vision_config"]["image_size"])
    check_parity(tmp_path / "out", model.forward, prompt_of(tmp_path / "out"), inputs)


def old_layout(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the first published checkpoints."""
    config = copy.deepcopy(config)
    projector = config.pop("projector_config")
    config["num_query_tokens"] = projector.pop("num_query_tokens")
    return config | {"visual_projector_config": projector, "hidden_size": 32}


def test_a_pickle_with_a_class_token_s_row_and_old_config_gives_the_same_model(
    tmp_path: Path,
) -> None:
    seed, config = CASES["equal widths"]
    model = Reference(config, seed)
    state = model.state()
    row = torch.full((1, 1, 32), 9.0)
    state["abstractor.pos_emb"] = torch.cat([row, state["abstractor.pos_emb"]], dim=1)
    folder = save(tmp_path / "in", {}, old_layout(config))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    convert(str(folder), tmp_path / "out")
    inputs = pictures(56)[:1]
    check_parity(tmp_path / "out", model.forward, prompt_of(tmp_path / "out"), inputs)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    seed, config = CASES["equal widths"]
    folder = save(tmp_path / "in", Reference(config, seed).state(), config)
    queries = config["projector_config"]["num_query_tokens"]
    prompt = Prompt.make(VOCABULARY, queries, FILLER)
    assert llava_oracle.check_swaps(folder, prompt, 56) > 450


@pytest.mark.parametrize(
    ("patches", "inputs", "outputs", "parameters"),
    [
        (576, 1024, 4096, 37_398_016),
        (729, 1280, 2048, 24_763_200),
        (729, 1280, 3072, 31_056_704),
        (729, 1280, 4096, 39_447_360),
        (729, 1280, 7168, 77_202_240),
    ],
)
def test_oracle_and_ours_have_the_published_number_of_parameters(
    patches: int, inputs: int, outputs: int, parameters: int
) -> None:
    with torch.device("meta"):
        oracle = CAbstractor(patches, inputs, outputs, 144)
    ours = CAbstractorConfig(
        input_size=inputs,
        num_features=patches,
        output_size=outputs,
        num_image_tokens=144,
    )
    assert sum(p.numel() for p in oracle.parameters()) == parameters
    shapes = model_shapes(MM1Config(connector=ours)).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == parameters


def test_pictures_are_squashed_and_prompts_are_honeybee_s(tmp_path: Path) -> None:
    seed, config = CASES["equal widths"]
    save(tmp_path / "in", Reference(config, seed).state(), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    written = load_model(tmp_path / "out").config
    assert written.image is not None
    assert written.image.resize == "squash"
    assert written.prompt is not None
    assert written.prompt.template == "honeybee"
