"""``convert`` rounds on the way what its sources hold unpacked."""

import mlx.core as mx
import pytest

from mm1_mlx.checkpoint import load_config, load_manifest
from mm1_mlx.convert import convert
from mm1_mlx.errors import ConfigError
from mm1_mlx.quantize import find_recipe, quantize


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= mx.load(str(path))
    return found


@pytest.mark.parametrize("name", ["4bit", "mixed_3_6", "mxfp4"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_converting_writes_what_quantizing_does(name, kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    report = convert(str(source), tmp_path / "a", recipe=find_recipe(name))
    quantize(source, tmp_path / "b", find_recipe(name), measured=False)
    assert load_config(tmp_path / "a") == load_config(tmp_path / "b")
    assert report.config == load_config(tmp_path / "a")
    ours, theirs = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[x], theirs[x]) for x in ours)
    assert load_manifest(tmp_path / "a")["source"]["quantized"] == {"recipe": name}


def test_it_is_cast_before_and_upcycled_before(dense, tmp_path):
    recipe = find_recipe("4bit")
    convert(
        str(dense),
        tmp_path / "out",
        recipe=recipe,
        dtype=mx.float16,
        upcycle="experts=4,every=2",
    )
    tensors = tensors_of(tmp_path / "out")
    experts = "decoder.layers.1.mlp.switch_mlp.up_proj"
    assert tensors[f"{experts}.scales"].dtype == mx.float16
    assert tensors[f"{experts}.weight"].shape == (4, 192, 128 * 4 // 32)
    assert tensors["decoder.layers.1.mlp.gate.weight"].dtype == mx.float16


def test_what_is_packed_already_stays_so(dense, tmp_path):
    quantize(dense, tmp_path / "a", find_recipe("8bit"), measured=False)
    convert(str(tmp_path / "a"), tmp_path / "b", recipe=find_recipe("4bit"))
    assert load_config(tmp_path / "b") == load_config(tmp_path / "a")


def test_nothing_to_pack_is_refused_before_anything_is_written(write_model, tmp_path):
    changes = dict.fromkeys(("connector", "decoder", "prompt"))
    source = write_model(tmp_path / "vision", **changes)
    with pytest.raises(ConfigError, match="has nothing that recipe '4bit' packs"):
        convert(str(source), tmp_path / "out", recipe=find_recipe("4bit"))
    assert not (tmp_path / "out").exists()
