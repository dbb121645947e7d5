"""Weights are computed in what the device is quick at, as stored where that suits."""

import mlx.core as mx
import pytest

from mm1_mlx.checkpoint import device_dtype, device_dtypes, load_model
from mm1_mlx.errors import CheckpointError
from mm1_mlx.writer import CheckpointWriter


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("applegpu_g13s", (mx.float16,)),
        ("applegpu_g14d", (mx.float16,)),
        ("applegpu_g15p", (mx.bfloat16, mx.float16)),
        ("applegpu_g16s", (mx.bfloat16, mx.float16)),
        ("applegpu_g17p", (mx.bfloat16, mx.float16)),
        ("sm_90", (mx.bfloat16, mx.float16)),
    ],
)
def test_the_device_says_what_it_is_quick_at(architecture, kinds, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert device_dtypes() == kinds
    for stored in (mx.float32, mx.float16, mx.bfloat16):
        assert device_dtype(stored) == (stored if stored in kinds else kinds[0])


def test_a_cpu_is_quick_at_float32_alone():
    assert device_dtypes() == (mx.float32,)


@pytest.mark.parametrize(
    ("stored", "quick", "expected"),
    [
        (mx.float16, (mx.float32,), mx.float32),
        (mx.float16, (mx.bfloat16, mx.float16), mx.float16),
        (mx.bfloat16, (mx.float16,), mx.float16),
        (mx.float32, (mx.bfloat16, mx.float16), mx.bfloat16),
    ],
)
def test_weights_are_cast_by_what_most_are_stored_in(
    stored, quick, expected, tiny_model, tmp_path
):
    model = tiny_model
    with CheckpointWriter(tmp_path / "out", model.config, {}) as writer:
        for name, tensor in model.tensors().items():
            # Norms are often kept in float32.
            kind = mx.float32 if "norm" in name else stored
            writer.add(name, tensor.astype(kind))

    def choose(found):
        assert found == stored
        return found if found in quick else quick[0]

    loaded = load_model(tmp_path / "out", choose)
    assert {x.dtype for x in loaded.tensors().values()} == {expected}


@pytest.fixture
def large(tiny_model, write, tmp_path):
    """A model in bfloat16, one number of which float16 does not hold."""
    tensors = {k: x.astype(mx.bfloat16) for k, x in tiny_model.tensors().items()}
    tensors["decoder.norm.weight"][3] = 7e4
    return write(tmp_path / "large", tiny_model, tensors)


def test_where_a_weight_is_too_large_for_the_devices_type_all_are_bfloat16(
    large, tiny_model
):
    """The GPUs of M1 and M2 are quick at float16 alone, and slow but right at this."""
    loaded = load_model(large, lambda _: mx.float16).tensors()
    for name, x in tiny_model.tensors().items():
        expected = x.astype(mx.bfloat16)
        if name == "decoder.norm.weight":
            expected[3] = 7e4
        assert mx.array_equal(loaded[name], expected)


def test_a_type_that_was_asked_for_and_is_too_small_is_refused(large):
    message = (
        r"1 tensor\(s\) hold numbers too large for .*float16, e.g. \['decoder.norm"
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(large, mx.float16)


def test_what_is_infinite_as_stored_is_no_overflow(tiny_model, write, tmp_path):
    tensors = {k: x.astype(mx.bfloat16) for k, x in tiny_model.tensors().items()}
    tensors["decoder.norm.weight"][3] = float("inf")
    out = write(tmp_path / "out", tiny_model, tensors)
    assert load_model(out, mx.float16).tensors()["decoder.norm.weight"][3] == mx.inf
