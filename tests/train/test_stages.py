"""What a command leaves to a default is the stage's, and what is trained is what it says."""

import json
import math
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from mm1_mlx.checkpoint import load_model
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS
from mm1_mlx.train import paper
from mm1_mlx.train.config import PARTS, TrainConfig
from mm1_mlx.train.curve import draw_curve
from mm1_mlx.train.job import HeldOut, Job, law_parameters
from mm1_mlx.train.stages import check_given, merged, plan
from mm1_mlx.train.trainable import check_rates, counts, make_trainable

MOE = {"num_experts": 4, "every": 1, "offset": 0}


def planned(stage, full=False, packed=(), parts=PARTS, begun=None, rows=4000, **given):
    return plan(
        stage,
        given,
        full=full,
        rows=rows,
        parts=parts,
        packed=packed,
        parameters=3_000_000_000,
        precision="bfloat16",
        begun=begun,
    )


def test_defaults_are_the_papers():
    whole = planned("pretrain")
    assert whole.learning_rate == pytest.approx(5.834e-5, rel=1e-3)
    # Lambda = 0.1 eta, as a share of eta.
    assert whole.weight_decay == 0.1
    assert whole.final_fraction == 0.1
    assert (whole.optimizer, whole.clip_norm, whole.trained) == ("adamw", 1.0, PARTS)
    # Of whatever size the decoder is.
    assert whole.rate("connector") == 8e-5
    assert {whole.rate(part) for part in ("vision", "decoder")} == {whole.learning_rate}
    full = planned("sft", full=True)
    assert (full.optimizer, full.learning_rate) == ("adafactor", 1e-5)
    assert (full.final_fraction, full.warmup_steps, full.weight_decay) == (0, 0, 0)
    assert {full.rate(part) for part in PARTS} == {1e-5}
    # Beside adapters what is trained in full has the paper's rate.
    adapters = planned("sft")
    assert adapters.rate("decoder") == 1e-4
    assert adapters.rate("connector") == adapters.rate("region") == 1e-5
    assert planned("connector").trained == ("connector", "region")
    # Once through the rows, 16 a step.
    assert {run.steps for run in (whole, full)} == {250}
    assert whole.warmup_steps + whole.decay_steps == 250
    assert planned("pretrain", steps=200_000).warmup_steps == 2000
    assert (whole.balance_weight, whole.z_weight) == (0.01, 0.001)


def test_the_length_may_be_said_in_passes():
    run = planned("sft", epochs=2.5, rows=1000)
    assert (run.epochs, run.steps) == (2.5, 157)
    with pytest.raises(ConfigError, match=r"steps 3 and epochs 2 both say how long"):
        check_given({"steps": 3, "epochs": 2.0})


def test_what_is_given_now_wins():
    then = {"steps": 10, "seed": 3}
    assert merged(then, {"epochs": 2.0}) == {"epochs": 2.0, "seed": 3}
    assert merged({"epochs": 2.0}, {"steps": 5}) == {"steps": 5}
    assert merged(then, {"seed": 4}) == {"steps": 10, "seed": 4}


def test_an_adapter_s_flag_needs_no_flag_for_the_stage_s_own():
    check_given({"adapter_rank": 16})
    assert planned("sft", adapter_rank=16).adapter_rank == 16
    with pytest.raises(ConfigError, match="adapter_rank: 16 is of adapters, and none"):
        planned("connector", adapter_rank=16)


def test_few_rows_are_taken_several_times():
    """Once through 200 pictures is a dozen steps, which teach nothing."""
    assert planned("sft", rows=200).steps == 100
    assert planned("sft", rows=1616).steps == 101
    # Unless the length is given.
    assert planned("sft", rows=200, epochs=1.0).steps == 13
    assert planned("sft", rows=200, steps=7).steps == 7


@pytest.mark.parametrize(
    ("steps", "log_every", "save_every"), [(5, 1, 1), (100, 5, 10), (9000, 10, 200)]
)
def test_a_short_run_has_a_curve_and_checkpoints(steps, log_every, save_every):
    run = planned("sft", steps=steps)
    assert (run.log_every, run.save_every) == (log_every, save_every)
    # Held-out rows are measured at each checkpoint.
    assert run.eval_every == 0
    given = planned("sft", steps=steps, log_every=3, save_every=4)
    assert (given.log_every, given.save_every) == (3, 4)


@pytest.mark.parametrize("steps", [100, 1000, 20_000])
def test_what_is_measured_is_little_beside_what_is_learned(steps):
    run = planned("sft", steps=steps, valid_share=0.1)
    rows = run.valid_examples * (1 + run.measurements_after(0))
    # A step on a row is at least twice a pass.
    assert rows <= 0.1 * 2 * 16 * steps
    assert 16 <= run.valid_examples <= 256
    assert planned("sft", steps=steps, valid_examples=999).valid_examples == 999
    # A run that is made longer is measured on the same rows.
    longer = planned("sft", steps=9 * steps, begun=run)
    assert longer.valid_examples == run.valid_examples


def test_what_is_left_to_a_default_stays_where_a_run_goes_on():
    begun = planned("sft", steps=40, seed=5)
    assert begun.warmup_steps == 2
    longer = planned("sft", steps=100, begun=begun)
    assert not list(longer.differences(begun))
    assert (longer.seed, longer.warmup_steps, longer.decay_steps) == (5, 2, 98)
    # What another command or a flag says is not passed over.
    names = lambda run: [name for name, *_ in run.differences(begun)]  # noqa: E731
    assert names(planned("connector", steps=40, begun=begun)) == ["stage"]
    assert names(planned("sft", steps=40, begun=begun, seed=6)) == ["seed"]
    assert "adapter" in names(planned("sft", steps=40, begun=begun, full=True))


def test_the_last_held_out_examples_are_measured_too():
    def of(size):
        return lambda step, _: list(range(step * size, (step + 1) * size))

    assert list(HeldOut(of, 4, 10)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9]]
    assert list(HeldOut(of, 4, 3)) == [[0], [1], [2]]
    assert list(HeldOut(of, 4, 8)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("stored", [mx.float16, mx.float32])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_what_is_trained_begins_as_it_is_stored(
    stored, precision, make_model, write_folder, write_rows, tmp_path
):
    """Rounded to the run's precision it would lose bits before the first step."""
    model = make_model()
    model.update(tree_map(lambda x: x.astype(stored), model.parameters()))
    folder = write_folder(tmp_path / "model", model)
    rows = write_rows(tmp_path / "rows", ["red", "blue"])
    given = {
        "data": (str(rows),), "steps": 1, "warmup_steps": 0, "learning_rate": 1e-20,
        "batch_size": 2, "micro_batches": 1, "precision": precision,
    }  # fmt: skip
    made = Job(folder, tmp_path / "run", "connector", given).run(lambda _: None)
    ours, theirs = load_model(made).tensors(), load_model(folder).tensors()
    for name, x in ours.items():
        assert x.dtype == stored
        assert mx.array_equal(x, theirs[name]), name


def test_a_packed_connector_stays_where_adapters_learn():
    assert planned("sft", packed={"decoder"}).trained == ("connector", "region")
    packed = {"decoder", "connector"}
    assert planned("sft", packed=packed).trained == ("region",)
    # Of the adapter that is asked for, whatever the stage's own is.
    assert planned("sft", packed=packed, adapter="dora").trained == ("region",)
    whole = planned("sft", packed=packed, adapter="none")
    assert whole.trained == ("connector", "region")
    assert planned("connector", packed=packed, adapter="lora").trained == ("region",)
    # Else it is refused with what it is, not left out.
    assert planned("pretrain", packed={"connector"}).trained == PARTS


def test_the_law_counts_experts_once():
    dense, sparse = (law_parameters(PRESETS[x]) for x in ("mm1-3b", "mm1-3b-moe"))
    assert dense == sparse
    assert paper.peak_learning_rate(dense) == pytest.approx(5.9e-5, rel=1e-2)


BASE = TrainConfig(steps=1, learning_rate=1.0, warmup_steps=0, decay_steps=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trained": ("connector",)}, r"connector\..*"),
        ({"trained": ("vision", "decoder")}, r"(vision|decoder)\..*"),
        ({"trained": (r"decoder\.layers\.1\..*", "vision.pre_layernorm.bias")},
         r"decoder\.layers\.1\..*|vision\.pre_layernorm\.bias"),
        ({"trained": (), "adapter": "lora"}, r"decoder\.layers\..*\.lora_[ab]"),
        ({"trained": ("connector",), "adapter": "dora", "adapter_layers": 1},
         r"connector\..*|decoder\.layers\.1\..*\.(lora_[ab]|m)"),
    ],
)  # fmt: skip
def test_any_subset_is_trained_and_nothing_else(changes, expected, make_model):
    model = make_model()
    before = {name: x.size for name, x in model.tensors().items()}
    make_trainable(model, replace(BASE, **changes))
    found = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert found
    assert all(re.fullmatch(expected, name) for name in found)
    adapted = "adapter" in changes
    wanted = {name for name in before if re.fullmatch(expected, name)}
    assert wanted <= found if not adapted else wanted == found & set(before)
    for part, (trained, total) in counts(model).items():
        sizes = [x.size for k, x in tree_flatten(model.trainable_parameters())
                 if k.startswith(f"{part}.")]  # fmt: skip
        assert trained == sum(sizes)
        own = sum(size for name, size in before.items() if name.startswith(f"{part}."))
        assert total >= own


def test_what_names_nothing_is_refused(make_model):
    model = make_model()
    with pytest.raises(
        ConfigError, match=r"'eyes' names nothing of the model that can"
    ):
        make_trainable(model, replace(BASE, trained=("eyes",)))
    with pytest.raises(ConfigError, match=r"nothing is to be trained; name parts"):
        make_trainable(model, replace(BASE, trained=()))


@pytest.mark.parametrize(
    "trained", [("connector", "decoder"), (r"decoder\.layers\.1\.self_attn\..*",)]
)
def test_nothing_is_trained_in_full_and_by_an_adapter(trained, make_model):
    """The adapter would freeze it: almost nothing of it were trained in full."""
    with pytest.raises(
        ConfigError,
        match=r"of the layers to train in full would get adapters too, e.g. \['decoder",
    ):
        make_trainable(make_model(), replace(BASE, trained=trained, adapter="lora"))


def test_the_rate_of_what_is_frozen_is_refused(make_model):
    model = make_model()
    make_trainable(model, replace(BASE, trained=("connector",), adapter="lora"))
    check_rates(model, {"decoder_learning_rate": 1e-3, "connector_learning_rate": 1e-3})
    check_rates(model, {"vision_learning_rate": None})
    with pytest.raises(
        ConfigError,
        match=r"vision_learning_rate: nothing of the part vision is trained",
    ):
        check_rates(model, {"vision_learning_rate": 1e-3})


def test_experts_are_balanced_and_their_losses_logged(
    make_model, write_folder, write_rows, tmp_path
):
    model = write_folder(tmp_path / "model", make_model(decoder={"moe": MOE}))
    rows = write_rows(tmp_path / "rows", ["red", "blue", "lime", "white"])
    given = {
        "data": (str(rows),), "steps": 2, "batch_size": 2, "micro_batches": 1,
        "log_every": 1, "precision": "float32",
    }  # fmt: skip
    lines = []
    out = tmp_path / "run"
    made = Job(model, out, "sft", given).run(lines.append)
    assert made == out / "adapter"
    for line in lines:
        total = line["cross_entropy"] + 0.01 * line["load_balance"]
        assert line["loss"] == pytest.approx(total + 0.001 * line["router_z"], rel=1e-5)
    names = mx.load(str(made / "adapter.safetensors")).keys()
    assert any(".switch_mlp." in name for name in names)
    logged = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert logged == lines


def test_the_curve_is_drawn(tmp_path):
    lines = [{"step": i, "loss": 3 / i + 0.1 * (i % 3)} for i in range(1, 60)]
    lines += [{"step": 30, "valid_loss": 0.4}]
    draw_curve(lines, tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {(31, 95, 174), (169, 199, 234), (209, 87, 27)} <= colours
    draw_curve([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    # All of one loss, and a single one; the held-out ones are no finite numbers.
    infinite = [{"step": 1, "valid_loss": x} for x in (None, math.inf, math.nan)]
    draw_curve([{"step": 1, "loss": 2.0}, *infinite], tmp_path / "one.png")
    draw_curve([{"step": i, "loss": 0.0} for i in (1, 2)], tmp_path / "flat.png")
    assert Image.open(tmp_path / "flat.png").size == (960, 540)
