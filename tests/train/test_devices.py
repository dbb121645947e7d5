"""A model learns where it is computed: on this CPU, and on a Mac's GPU."""

import math

import mlx.core as mx
import pytest

from mm1_mlx.config import Packing
from mm1_mlx.models.linear import pack, packed_ways
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.trainable import make_trainable
from mm1_mlx.train.trainer import Trainer

STEPS = 12
RUN = TrainConfig(steps=STEPS, learning_rate=1e-2, warmup_steps=0, decay_steps=0)
ADAPTED = {"adapter": "lora", "trained": ("connector",)}
WAYS = {
    "lora": ADAPTED,
    "qlora": ADAPTED,
    "float16": {"trained": ("vision", "connector", "decoder"), "precision": "float16"},
}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.metal,
                pytest.mark.skipif(
                    not mx.metal.is_available(), reason="needs a Mac's GPU"
                ),
            ],
        ),
    ]
)
def device(request):
    """What computes."""
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(mx.cpu)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("way", WAYS)
def test_a_tiny_model_learns(way, make_model, batches, tmp_path):
    model = make_model(
        decoder={"hidden_size": 64, "head_dim": 32}, connector={"output_size": 64}
    )
    if way == "qlora":
        for block in model.decoder.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                block.mlp[name] = pack(block.mlp[name], Packing(group_size=32, bits=4))
        assert len(packed_ways(model)) == 6
    config = TrainConfig.from_dict(RUN.to_dict() | WAYS[way])
    make_trainable(model, config)
    trainer = Trainer(model, next_token_loss, batches, config, tmp_path)
    losses = [trainer.train_step() for _ in range(STEPS)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
