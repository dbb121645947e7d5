"""What a training step takes is said, and refused, before it is taken."""

import gc
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from PIL import Image

from mm1_mlx.adapters import AdapterConfig, attach
from mm1_mlx.checkpoint import build_model
from mm1_mlx.chips import CHIPS
from mm1_mlx.config import MM1Config, QuantizationConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.image import load_pictures
from mm1_mlx.models import MM1
from mm1_mlx.presets import PRESETS
from mm1_mlx.recipe import find_recipe, plan
from mm1_mlx.resolution import with_resolution
from mm1_mlx.train import budget
from mm1_mlx.train.budget import (
    COUNTED,
    Training,
    check_training,
    step_seconds,
    training_of,
)
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.optimizer import make_optimizer
from mm1_mlx.train.sample import Batch, build_sample, pack, stack, widen_sample
from mm1_mlx.train.trainable import make_trainable
from mm1_mlx.train.trainer import Trainer
from mm1_mlx.work import decoder_flops, encode_flops

RUN = TrainConfig(steps=4, learning_rate=1e-3, warmup_steps=1, decay_steps=1)
CONFIG = PRESETS["mm1-3b"]


def kept(state):
    """Bytes of what an optimizer keeps of weights; its step and rate are no such."""
    return sum(x.nbytes for _, x in tree_flatten(state) if x.size > 1)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_optimizer_keeps_what_is_said(name, make_model, batches):
    model = make_model()
    if name == "adafactor":
        optimizer = optim.Adafactor(learning_rate=1e-3)
    else:
        optimizer = make_optimizer(replace(RUN, optimizer=name))
    optimizer.init(model.trainable_parameters())
    training = training_of(model, batches(0, 0), name)
    said = training.bytes(model.config)["optimizer"]
    assert said == kept(optimizer.state)
    # By what is trained of the config as of the model.
    assert replace(training, trained=None).bytes(model.config)["optimizer"] == said


def test_an_optimizer_that_there_is_not_is_refused():
    with pytest.raises(
        ConfigError, match=r"'adam' is not one of \['adamw', 'muon', 'ad"
    ):
        Training(1, 8, optimizer="adam").bytes(CONFIG)


def adapters(config, rank):
    """Shapes of low-rank matrices beside all layers of the decoder's blocks."""
    shapes = {}
    for name, x in MM1(replace(config, quantization=None)).tensors().items():
        if name.startswith("decoder.layers.") and x.ndim >= 2:
            *experts, rows, columns = x.shape
            shapes[f"{name}.lora_b"] = (*experts, rows, rank)
            shapes[f"{name}.lora_a"] = (*experts, rank, columns)
    return shapes


def test_a_packed_base_is_counted_packed():
    ways = plan(find_recipe("4bit"), CONFIG).packed
    training = Training(
        1, 128, parts=("decoder",), trained=adapters(CONFIG, 8), ways=ways
    )
    plain = replace(training, ways={}).bytes(CONFIG)
    needs = training.bytes(CONFIG)
    assert needs["weights"] < 0.35 * plain["weights"]
    assert needs["gradients"] == plain["gradients"] > 0


@pytest.mark.parametrize("parts", [("decoder",), ("vision", "connector", "decoder")])
def test_packed_weights_are_not_trained(parts):
    ways = plan(find_recipe("4bit"), CONFIG).packed
    with pytest.raises(
        ConfigError, match=r"\['decoder'\] cannot be trained, their wei"
    ):
        Training(1, 8, parts=parts, ways=ways).bytes(CONFIG)
    assert Training(1, 8, parts=("connector",), ways=ways).bytes(CONFIG)


def test_a_models_step_is_read_off_the_model(make_model, batches):
    model, batch = make_model(), batches(0, 0)
    model.freeze()
    model.connector.unfreeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    training = training_of(model, batch, "adamw", 2, 1)
    assert training.parts == ("connector", "decoder")
    assert (training.rows, training.positions) == batch.tokens.shape
    assert training.tiles == len(batch.pictures)
    weights = tree_flatten(model.trainable_parameters())
    trained = sum(x.nbytes for _, x in weights)
    needs = training.bytes(model.config)
    # Two micro-batches' are averaged.
    assert needs["gradients"] == 2 * trained
    assert needs["optimizer"] == 2 * trained


def test_a_packed_models_step_is_read_off_it_too(make_config, batches):
    config = make_config(decoder={"hidden_size": 64}, connector={"output_size": 64})
    ways = plan(find_recipe("4bit"), config).packed
    packed = replace(config, quantization=QuantizationConfig.of_modules(ways))
    model = build_model(packed, ways)
    training = training_of(model, batches(0, 0), "adamw")
    assert training.ways == ways
    held = sum(x.nbytes for x in model.tensors().values())
    assert training.bytes(packed)["weights"] == pytest.approx(held, rel=1e-3)


def test_packed_examples_attend_to_themselves():
    """Those of a row are counted as rows of their own, but for nothing they share."""
    rows = Training(4, 512, 4, targets=100)
    packed = replace(rows, rows=1, positions=2048, segments=(512,) * 4)
    assert packed.flops(CONFIG) == rows.flops(CONFIG)
    assert packed.activations(CONFIG) == rows.activations(CONFIG)
    whole = replace(packed, segments=())
    decoder = CONFIG.decoder
    arrays = budget.KEPT_SCORES * decoder.num_hidden_layers + budget.WORKING_SCORES
    pairs = decoder.num_attention_heads * (2048**2 - 4 * 512**2)
    more = whole.activations(CONFIG) - packed.activations(CONFIG)
    assert more == arrays * pairs * 4


def test_a_packed_batch_is_known_by_its_segments(make_model, batches):
    batch = replace(batches(0, 0), segments=(3, 4))
    assert training_of(make_model(), batch, "adamw").segments == (3, 4)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("vocabulary", [512, 16_384])
def test_what_a_step_keeps_is_about_what_is_measured(trained, vocabulary, make_model):
    """Of a decoder alone: within a factor of two, whatever the head's size."""
    model = make_model(
        decoder={"vocab_size": vocabulary, "hidden_size": 64},
        connector={"output_size": 64},
    ).train()
    if not trained:
        model.freeze()
        attach(model, AdapterConfig(rank=4))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocabulary, (8, 256)).astype(np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, bool), (), (), (256,) * 8)
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    # What is used up is freed sooner or later, as the processor is free: the most counts.
    for _ in range(3):
        mx.eval(nn.value_and_grad(model, next_token_loss)(model, batch))
    measured = mx.get_peak_memory() - before
    needs = training_of(model, batch, "adamw").bytes(model.config)
    said = needs["gradients"] + needs["activations"]
    assert 0.5 * measured < said < 2 * measured


WAYS = {
    "lora": {"adapter": "lora", "trained": ("connector",)},
    "dora": {"adapter": "dora", "trained": ("connector",)},
    "full": {},
    "adafactor": {"optimizer": "adafactor"},
    "checkpointing": {"checkpointing": True},
    "packing": {"packing": True},
    "packed and checkpointed": {"packing": True, "checkpointing": True},
    "tiles": {"resolution": "2x32"},
    "micro-batches": {"micro_batches": 2},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "lora in float16": {
        "adapter": "lora", "trained": ("connector",), "precision": "float16",
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_run_is_said_to_take_is_about_what_it_takes(
    way, make_model, train_tokenizer, conversation, tmp_path
):
    """All of it, whatever is trained and however: four fifths at least, never twice.

    Nine tenths where blocks are computed again, of as small a model as this.
    """
    config = replace(RUN, **{"trained": COUNTED, "resolution": "32"} | WAYS[way])
    # What other tests have left must not be freed meanwhile.
    gc.collect()
    before = mx.get_active_memory()
    model = make_model(
        vision={"image_size": 32, "hidden_size": 32},
        decoder={"hidden_size": 64, "num_hidden_layers": 4},
        connector={"output_size": 64, "num_features": 64},
    )
    model.config = with_resolution(model.config, config.resolution)
    make_trainable(model, config)
    # As a job does.
    model.decoder.recompute = model.vision.recompute = config.checkpointing
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue") * 2]
    pictures = load_pictures(images, model.config.image)
    rows = [
        widen_sample(
            build_sample(conversation("so it is. " * n), model.config, train_tokenizer),
            *([picture], model.config, train_tokenizer),
        )
        for n, picture in zip((20, 14, 17, 9), pictures, strict=True)
    ]
    join = pack if config.packing else stack
    batch = join(rows, [[i] for i in range(len(rows))], pictures)
    trainer = Trainer(model, next_token_loss, lambda *_: batch, config, tmp_path)
    trainer.train_step()
    mx.reset_peak_memory()
    for _ in range(2):
        trainer.train_step()
    measured = mx.get_peak_memory() - before
    said = trainer.forecast()["bytes"]
    assert 0.8 * measured < said < 2 * measured


# Refusals


def free(monkeypatch, size):
    monkeypatch.setattr(budget, "allowed", lambda: size)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)


WHOLE = Training(8, 2048, 8)


@pytest.mark.parametrize(
    ("training", "room", "message"),
    [
        (
            WHOLE,
            200e9,
            r"^a training step needs \d{3}\.\d GB \(14\.9 GB weights \+ 14\.9 GB gradients "
            r"\+ 29\.8 GB optimizer \+ [\d.]+ GB activations \+ 27\.4 MB pictures\) of memory, but 200\.0 GB are "
            r"free here; give batches of at most \d rows, not 8, or use a Mac with 512 GB$",
        ),
        (WHOLE, 80e9, r"give batches of one row of at most [\d,]+ tokens"),
        (
            WHOLE,
            40e9,
            r"train the connector alone, and give batches of one row of at most [\d,]+ t",
        ),
        (WHOLE, 10e9, "here; train a smaller model, or use"),
        (
            replace(WHOLE, rows=1, tiles=1, micro_batches=4, workers=4),
            150e9,
            "here; train on one micro-batch a step",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_what_would(
    training, room, message, monkeypatch
):
    free(monkeypatch, int(room))
    with pytest.raises(ConfigError, match=message):
        check_training(CONFIG, training)
    free(monkeypatch, sum(training.bytes(CONFIG).values()))
    check_training(CONFIG, training)
    free(monkeypatch, None)
    check_training(CONFIG, training)


def test_what_is_named_as_fitting_fits(monkeypatch):
    free(monkeypatch, 200_000_000_000)
    with pytest.raises(ConfigError) as refusal:
        check_training(CONFIG, WHOLE)
    rows = int(str(refusal.value).split("at most ")[1].split()[0])
    check_training(CONFIG, replace(WHOLE, rows=rows, tiles=rows))
    with pytest.raises(ConfigError):
        check_training(CONFIG, replace(WHOLE, rows=rows + 1, tiles=rows + 1))


def test_weights_that_are_there_are_not_counted_again(monkeypatch):
    need = sum(WHOLE.bytes(CONFIG).values())
    free(monkeypatch, need - 14_000_000_000)
    with pytest.raises(ConfigError):
        check_training(CONFIG, WHOLE)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 14_000_000_000)
    check_training(CONFIG, WHOLE)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_does_not_fit_does_not_begin(
    name, make_model, batches, tmp_path, monkeypatch
):
    model = make_model()
    free(monkeypatch, 100_000)
    with pytest.raises(
        ConfigError, match=r"a training step needs .* 100.0 kB are free"
    ):
        Trainer(
            model,
            next_token_loss,
            batches,
            replace(RUN, optimizer=name),
            tmp_path / "x",
        )
    assert not list(tmp_path.iterdir())


# Seconds


def test_a_step_is_one_pass_forward_and_twice_that_back():
    config = replace(CONFIG, quantization=None)
    assert isinstance(config, MM1Config)
    forward = encode_flops(config, 4) + 2 * decoder_flops(config.decoder, 96, rows=96)
    whole = Training(2, 96, 4)
    assert whole.flops(config) == 3 * forward
    assert replace(whole, micro_batches=5).flops(config) == 15 * forward
    assert replace(whole, checkpointing=True).flops(config) == 4 * forward
    decoder = 2 * decoder_flops(config.decoder, 96, rows=96)
    vision = encode_flops(replace(config, connector=None), 4)
    connector = forward - vision - decoder
    # Gradients pass through the frozen decoder to the connector, and end there.
    alone = replace(whole, parts=("connector",)).flops(config)
    assert alone == vision + 3 * connector + 2 * decoder
    beside = replace(whole, parts=("decoder",), trained=adapters(config, 8))
    assert beside.flops(config) == vision + connector + 2 * decoder


def test_adapters_spare_the_gradients_of_what_is_frozen(make_model, batches):
    model, batch = make_model(), batches(0, 0)
    whole = training_of(model, batch, "adamw").flops(model.config)
    model.freeze()
    model.connector.unfreeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    config, (rows, positions) = model.config, batch.tokens.shape
    decoder = rows * decoder_flops(config.decoder, positions, rows=positions)
    tiles = sum(len(picture.tiles) for picture in batch.pictures)
    vision = encode_flops(replace(config, connector=None), tiles)
    connector = encode_flops(config, tiles) - vision
    assert whole == 3 * (vision + connector + decoder)
    step = training_of(model, batch, "adamw")
    assert step.flops(config) == vision + 3 * connector + 2 * decoder


def test_nothing_is_computed_backward_before_the_first_adapter(make_model, batches):
    model, batch = make_model(), batches(0, 0)
    model.freeze()
    attach(model, AdapterConfig(rank=2, layers=1))
    config, (rows, positions) = model.config, batch.tokens.shape
    assert config.decoder.num_hidden_layers == 2
    decoder = rows * decoder_flops(config.decoder, positions, rows=positions)
    tiles = sum(len(picture.tiles) for picture in batch.pictures)
    step = training_of(model, batch, "adamw")
    forward = encode_flops(config, tiles) + decoder
    assert step.flops(config) == forward + round(decoder / 2)
    again = replace(step, checkpointing=True)
    assert again.flops(config) == forward + decoder


def test_a_chips_least_time_is_that_of_operations_or_bytes():
    chip = next(chip for chip in CHIPS if chip.name == "M4 Max")
    training = Training(4, 2048, 4)
    fast, wide = replace(chip, flops=1e30), replace(chip, bandwidth=1e30)
    assert step_seconds(wide, CONFIG, training) == training.flops(CONFIG) / chip.flops
    needs = training.bytes(CONFIG)
    read = 2 * (needs["weights"] + needs["gradients"] + needs["optimizer"])
    assert step_seconds(fast, CONFIG, training) == read / chip.bandwidth


def test_trained_weights_are_counted_in_float32_whatever_computes():
    """Half precision halves what is frozen and kept for gradients, and nothing else."""
    single = Training(1, 128, parts=("connector",))
    half = replace(single, itemsize=2)
    needs, less = single.bytes(CONFIG), half.bytes(CONFIG)
    for name in ("gradients", "optimizer"):
        assert less[name] == needs[name]
    trained = needs["gradients"]
    # The frozen ones in two bytes, the trained ones in four.
    assert less["weights"] == (needs["weights"] - trained) / 2 + trained
    assert less["activations"] < needs["activations"]


def test_no_more_gradients_are_held_than_are_under_way():
    step = Training(1, 128, parts=("connector",))
    once = step.bytes(CONFIG)["gradients"]
    for micro_batches, workers, held in ((1, 1, 1), (2, 1, 2), (16, 1, 2), (16, 4, 5)):
        more = replace(step, micro_batches=micro_batches, workers=workers)
        assert more.bytes(CONFIG)["gradients"] == held * once
