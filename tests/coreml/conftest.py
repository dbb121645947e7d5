"""Tiny members of the family as model folders, and photographs."""

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.models import MM1
from mm1_mlx.writer import CheckpointWriter

AIM = {
    "position": "sincos", "class_token": False, "pre_norm": False, "patch_norm": True,
    "patch_bias": True, "hidden_act": "gelu", "feature_layer": -1,
    "attention_bias": False, "apply_post_norm": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
AIMV2 = AIM | {
    "position": "learned", "norm": "rms", "gated_mlp": True, "hidden_act": "silu",
    "mlp_bias": False,
}  # fmt: skip
MOBILE = {
    "moe": {"num_experts": 4, "experts_per_image": 2, "num_sparse_layers": 2,
            "router_input": "class_token", "norm_topk_prob": True},
    "feature_layer": -1,
}  # fmt: skip
ENCODERS = {
    "clip": {},
    "clip-gelu-tanh": {"hidden_act": "gelu_tanh", "apply_post_norm": True},
    "aim": AIM,
    "aimv2": AIMV2,
    "mobile-v-moe": MOBILE,
}
CONNECTORS = {
    "c_abstractor": {},
    "c_abstractor-ends": {
        "kind": "c_abstractor", "hidden_size": 16, "depth": 1, "prenorm": True,
        "num_eos_tokens": 2, "num_image_tokens": 6, "position_embedding": False,
    },
    "average_pool": {"kind": "average_pool", "num_image_tokens": 9},
    "attention_pool": {
        "kind": "attention_pool", "num_image_tokens": 5, "num_attention_heads": 4,
    },
    "perceiver": {
        "kind": "perceiver", "num_image_tokens": 5, "depth": 2, "head_dim": 8,
        "num_attention_heads": 4, "intermediate_size": 64,
    },
    "mlp": {"kind": "mlp", "hidden_size": 64},
    "mlp-pooled": {"kind": "mlp", "hidden_size": 64, "pooled_tokens": 4},
    "linear": {"kind": "linear"},
}  # fmt: skip
# Of image tokens in half precision, in either layout, picture by picture: the difference's
# length over the model's, and its largest number over the model's.
L2, LARGEST = 2.5e-3, 6e-3
# Every encoder, every connector; both layouts of each are a test's to choose.
MEMBERS = [
    *((encoder, "c_abstractor") for encoder in ENCODERS),
    *(("clip", connector) for connector in CONNECTORS if connector != "c_abstractor"),
]


def write(folder, model):
    """A model's folder, of its encoder and connector alone."""
    names = model.tensors()
    packed = [x.removesuffix(".scales") for x in names if x.endswith(".scales")]
    source = {"name": "a test"}
    with CheckpointWriter(folder, model.config, source, packed=packed) as writer:
        for name, tensor in names.items():
            writer.add(name, tensor)
    return folder


@pytest.fixture(scope="session")
def photographs():
    """Two photographs."""
    from skimage import data

    return [Image.fromarray(data.astronaut()), Image.fromarray(data.chelsea())]


@pytest.fixture(scope="session")
def member(make_config, reinitialise, tmp_path_factory):
    """A function: the folder of an encoder and a connector, of these names."""
    made = {}

    def folder(encoder="clip", connector="c_abstractor", seed=3, **vision):
        key = (encoder, connector, seed, tuple(vision.items()))
        if key not in made:
            given = CONNECTORS[connector]
            sizes = {"input_size": 32, "num_features": 16, "output_size": 48}
            config = make_config(
                vision=ENCODERS[encoder] | vision,
                connector=None if given else {},
                decoder=None,
                prompt=None,
            )
            if given:
                sections = config.to_dict() | {"connector": sizes | given}
                config = type(config).from_dict(sections)
            model = reinitialise(MM1(config), seed)
            made[key] = write(tmp_path_factory.mktemp("member") / "model", model)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def noise():
    """Pixels that differ everywhere, [16, 16, 3]."""
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
