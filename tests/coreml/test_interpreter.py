"""The interpreter against torch, its refusals, and numbers beyond half precision."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.coreml.interpreter import Interpreter, read_spec
from mm1_mlx.coreml.operations import OPERATIONS
from mm1_mlx.coreml.package import SPEC, export
from mm1_mlx.coreml.program import IMAGE, Plan
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models import MM1

from .conftest import write

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def numbers(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


X, Y = numbers(1, 6, 8, 8), numbers(1, 6, 8, 8)
Q, K, V = numbers(1, 2, 5, 4), numbers(1, 2, 7, 4), numbers(1, 2, 7, 4) + 1
KERNEL, EACH = numbers(4, 6, 2, 2), numbers(6, 1, 3, 3)
GAIN, SHIFT = numbers(8), numbers(8) + 1
CASES = {
    "conv": (
        {"x": X, "weight": KERNEL, "bias": GAIN[:4], "strides": [2, 2]},
        lambda x, weight, bias, strides: functional.conv2d(x, weight, bias, strides),
    ),
    "conv depthwise": (
        {"x": X, "weight": EACH, "groups": 6, "pad_type": "same"},
        lambda x, weight, **_: functional.conv2d(x, weight, padding=1, groups=6),
    ),
    "scaled_dot_product_attention": (
        {"query": Q, "key": K, "value": V},
        lambda query, key, value: functional.scaled_dot_product_attention(
            query, key, value
        ),
    ),
    "layer_norm": (
        {"x": X, "axes": [-1], "gamma": GAIN, "beta": SHIFT, "epsilon": 1e-5},
        lambda x, gamma, beta, **_: functional.layer_norm(x, (8,), gamma, beta, 1e-5),
    ),
    "linear": (
        {"x": X, "weight": numbers(3, 8), "bias": GAIN[:3]},
        lambda x, weight, bias: functional.linear(x, weight, bias),
    ),
    "matmul": (
        {"x": X, "y": Y, "transpose_y": True},
        lambda x, y, **_: x @ y.mT,
    ),
    "einsum": (
        {"values": (X[:, :, :, :4], Y[:, :4]), "equation": "bkhc,bchq->bkhq"},
        lambda values, equation: torch.einsum(equation, *values),
    ),
    "softmax": ({"x": X, "axis": 1}, lambda x, axis: functional.softmax(x, axis)),
    "gelu EXACT": ({"x": X, "mode": "EXACT"}, lambda x, **_: functional.gelu(x)),
    "gelu TANH": (
        {"x": X, "mode": "TANH_APPROXIMATION"},
        lambda x, **_: functional.gelu(x, approximate="tanh"),
    ),
    "gelu SIGMOID": (
        {"x": X, "mode": "SIGMOID_APPROXIMATION"},
        lambda x, **_: x * torch.sigmoid(1.702 * x),
    ),
    "silu": ({"x": X}, lambda x: functional.silu(x)),
    "topk": ({"x": X, "k": 3, "axis": -1}, lambda x, k, axis: torch.topk(x, k, axis)),
    "rsqrt": (
        {"x": X**2, "epsilon": 1e-2},
        lambda x, epsilon: torch.rsqrt(x + epsilon),
    ),
    "reduce_mean": (
        {"x": X, "axes": [1], "keep_dims": True},
        lambda x, **_: x.mean(1, keepdim=True),
    ),
    "split": (
        {"x": X, "split_sizes": [2, 4], "axis": 1},
        lambda x, split_sizes, axis: torch.split(x, split_sizes, axis),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_is_torchs(case, tolerances):
    given, reference = CASES[case]

    def tensor(x):
        if isinstance(x, tuple):
            return tuple(tensor(y) for y in x)
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    found = OPERATIONS[case.split()[0]](**given)
    expected = reference(**{k: tensor(v) for k, v in given.items()})
    pairs = [(found, expected)]
    if isinstance(found, tuple | list):
        pairs = list(zip(found, expected, strict=True))
    for one, other in pairs:
        one, other = np.asarray(one), other.numpy()
        assert one.shape == other.shape
        scale = np.abs(other).max()
        assert np.abs(one - other).max() <= tolerances["op"] * scale


def test_an_argument_that_is_not_known_is_no_silent_default():
    with pytest.raises(TypeError, match="attn_mask"):
        OPERATIONS["scaled_dot_product_attention"](query=Q, key=K, value=V, attn_mask=1)


@pytest.mark.parametrize("ane", [False, True], ids=["nlc", "bc1s"])
def test_a_number_beyond_half_precision_is_named(
    ane, make_config, reinitialise, photographs, tmp_path
):
    model = reinitialise(MM1(make_config(decoder=None, prompt=None)))
    layer = model.vision.layers[1]
    layer.mlp.fc2.weight = layer.mlp.fc2.weight * 2e5
    path, out = write(tmp_path / "model", model), tmp_path / "E.mlpackage"
    said = r"vision_layers_1_mlp_fc2 \(at vision_layers_1_mlp_fc2\) reaches .*65,504"
    # The weights themselves fit.
    assert mx.abs(layer.mlp.fc2.weight).max() > 6.55e4
    for precision in ("fp16", "int8"):
        plan = Plan(precision=precision, ane=ane)
        with pytest.raises(
            ConfigError, match=r"vision_layers_1_mlp_fc2 holds .* float16"
        ):
            export(path, out, plan, pictures=photographs)
    layer.mlp.fc2.weight = layer.mlp.fc2.weight * 0.1
    layer.mlp.fc1.weight = layer.mlp.fc1.weight * 20
    path = write(tmp_path / "other", model)
    with pytest.raises(ConfigError, match=said):
        export(path, out, Plan(ane=ane), pictures=photographs)
    assert not out.exists()
    _, found = export(path, out, Plan("fp32", ane=ane), pictures=photographs)
    assert max(x.reach for x in found[16]) > 65504
    assert found[16][-1].l2 < 1e-4


def test_what_is_run_is_what_was_saved(member, noise, tmp_path):
    """Another weight in the package's file is another result."""
    out = tmp_path / "E.mlpackage"
    export(member(), out, Plan())
    inputs = {IMAGE: noise.transpose(2, 0, 1)[None].astype(np.float32)}
    before = Interpreter(out)(inputs)["image_tokens"]
    assert np.array_equal(before, Interpreter(out)(inputs)["image_tokens"])
    weights = out / "Data/com.apple.CoreML/weights/weight.bin"
    data = bytearray(weights.read_bytes())
    # The last weight that is stored: the byte of its exponent.
    data[-1] ^= 0x40
    weights.write_bytes(data)
    assert not np.array_equal(before, Interpreter(out)(inputs)["image_tokens"])


def test_what_is_no_package_is_said(member, tmp_path):
    with pytest.raises(CheckpointError, match="is no Core ML package"):
        read_spec(tmp_path / "none.mlpackage")
    out = tmp_path / "E.mlpackage"
    export(member(), out, Plan())
    with pytest.raises(CheckpointError, match="no function 'tile_9', it has"):
        Interpreter(out, "tile_9")
    spec = out / SPEC
    spec.write_bytes(spec.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_spec(out)
    (out / "Manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_spec(out)
