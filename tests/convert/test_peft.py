"""PEFT adapters through the rules of the formats: the model of the merged checkpoint.

The expected model is the checkpoint with ``W + scale * B A`` worked out by hand, converted
by the same program, which other tests compare with transformers.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import decoders  # noqa: E402
import sources  # noqa: E402
from decoders import VOCABULARY, sizes  # noqa: E402
from parity import Prompt as Asked  # noqa: E402
from parity import State, difference, our_logits, save, state_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_llava_hf import EQUAL, forward_of, pictures, prompt_of  # noqa: E402
from test_llava_hf import reference as llava_reference  # noqa: E402
from test_mixtral_hf import MIXTRAL, hub_layout  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mm1_mlx.adapters import Adapters, load, load_adapted  # noqa: E402
from mm1_mlx.adapters import save as save_adapter  # noqa: E402
from mm1_mlx.apps.cli import main  # noqa: E402
from mm1_mlx.checkpoint import load_model, read_manifest  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.convert.peft import import_peft  # noqa: E402
from mm1_mlx.convert.peft_out import export_peft  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

PREFIX = "base_model.model."
LLAMA = sizes("llama")
PROJECTIONS = r"(q|k|v|o|gate|up|down)_proj"
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "mixtral": MIXTRAL,
}


def checkpoint(kind: str, folder: Path, **fields: Any) -> State:
    """The tensors of a checkpoint of this kind, which lies in the folder then."""
    if kind == "mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    values = sizes(kind, **fields)
    model = decoders.reference(CLASSES[kind], values, 0)
    state = decoders.state_of(model)
    state = hub_layout(state) if kind == "mixtral" else state
    state = {name: x.detach().clone() for name, x in state.items()}
    save(folder, state, values)
    return state


def modules_of(state: State, pattern: str) -> list[str]:
    names = (n.removesuffix(".weight") for n in state if n.endswith(".weight"))
    return sorted(n for n in names if re.search(rf"({pattern})$", n))


def write_peft(
    folder: Path,
    state: State,
    modules: list[str],
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    full: Mapping[str, Any] | None = None,
    pickled: bool = False,
    biases: bool = False,
    scale: float = 2.0,
    alphas: Mapping[str, float] | None = None,
    dtype: Any = torch.float32,
    **fields: Any,
) -> State:
    """A PEFT adapter as PEFT writes it; the merged checkpoint, worked out by hand."""
    generator = torch.Generator().manual_seed(1)
    tensors: State = {}
    merged = dict(state)
    for module in modules:
        weight = state[f"{module}.weight"]
        r = next((n for k, n in (ranks or {}).items() if module.endswith(k)), rank)
        own = next((n for k, n in (alphas or {}).items() if module.endswith(k)), None)
        by = own / r if own is not None else scale * rank / r
        by = scale if fields.get("use_rslora") else by
        rows, columns = weight.shape
        A = torch.randn(r, columns, generator=generator).to(dtype)
        B = (torch.randn(rows, r, generator=generator) / 10).to(dtype)
        change = by * (B.float() @ A.float())
        if "embed_tokens" in module:
            # [r, V] and [D, r]: the table's change is the transpose of their product.
            A = torch.randn(r, rows, generator=generator)
            B = torch.randn(columns, r, generator=generator) / 10
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = A
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = B
            change = by * (B @ A).T
        else:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = A
            tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        result = weight + change
        if fields.get("use_dora"):
            m = weight.norm(dim=1) * (0.8 + 0.4 * torch.rand(rows, generator=generator))
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = m
            result = (m / result.norm(dim=1))[:, None] * result
        merged[f"{module}.weight"] = result
        if biases and f"{module}.bias" in state:
            bias = torch.randn(rows, generator=generator)
            merged[f"{module}.bias"] = bias
            tensors[f"{PREFIX}{module}.base_layer.bias"] = bias
    for name, x in (full or {}).items():
        tensors[PREFIX + name] = merged[name] = x
    folder.mkdir()
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        tensors = {k: x.contiguous() for k, x in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
        "lora_alpha": scale * rank, "lora_dropout": 0.05, "bias": "none",
        "target_modules": ["q_proj"], "inference_mode": True, "fan_in_fan_out": False,
        "rank_pattern": dict(ranks or {}), "alpha_pattern": dict(alphas or {}),
        "init_lora_weights": True, "peft_version": "0.17.0", "layer_replication": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return merged


class Bench:
    """A converted checkpoint, and what becomes of it with PEFT adapters."""

    def __init__(self, kind: str, tmp_path: Path, **fields: Any) -> None:
        self.kind, self.place, self.fields = kind, tmp_path, fields
        self.state = checkpoint(kind, tmp_path / "in", **fields)
        self.model = tmp_path / "model"
        convert(str(tmp_path / "in"), self.model)

    def peft(self, pattern: str, **options: Any) -> State:
        modules = modules_of(self.state, pattern)
        assert modules
        return write_peft(self.place / "peft", self.state, modules, **options)

    def bring(self) -> Path:
        """The imported adapter's folder."""
        report = import_peft(str(self.place / "peft"), self.model)
        save_adapter(self.place / "adapter", report.adapter)
        return self.place / "adapter"

    def adapted(self) -> dict[str, mx.array]:
        return load_adapted(
            self.model, Adapters.load([self.bring()]), mx.float32
        ).tensors()

    def expected(self, merged: State) -> dict[str, mx.array]:
        values = json.loads((self.place / "in" / "config.json").read_text())
        save(self.place / "merged", merged, values)
        convert(str(self.place / "merged"), self.place / "merged-model")
        return load_model(self.place / "merged-model", mx.float32).tensors()


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda kind="llama", **fields: Bench(kind, tmp_path, **fields)


def assert_equal(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert difference(np.array(found[name]), np.array(x)) <= 1e-6, name


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama, all projections": ("llama", PROJECTIONS, {}, {}),
    "alpha over the root of the rank": (
        "llama", "q_proj|v_proj", {}, {"use_rslora": True, "lora_alpha": 4.0},
    ),
    "ranks and alphas of their own": (
        "llama", PROJECTIONS, {},
        {"ranks": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alphas": {"v_proj": 3.0}},
    ),
    "DoRA": ("llama", PROJECTIONS, {}, {"use_dora": True}),
    "head and embedding": ("llama", "lm_head|embed_tokens", {}, {}),
    "a pickle": ("llama", "q_proj", {}, {"pickled": True}),
    "qwen2, biases stay": ("qwen2", PROJECTIONS, {}, {}),
    "qwen2, biases trained too": ("qwen2", PROJECTIONS, {}, {"biases": True}),
    "phi3, fused rows": ("phi3", "qkv_proj|gate_up_proj|o_proj", {}, {}),
    "phi3, fused rows, DoRA": ("phi3", "qkv_proj|gate_up_proj", {}, {"use_dora": True}),
    "mixtral, experts stacked": ("mixtral", r"w1|w2|w3|q_proj", {}, {}),
    "bfloat16": ("llama", PROJECTIONS, {}, {"dtype": torch.bfloat16}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_merged_checkpoint_does(
    name: str, bench: Callable[..., Bench]
) -> None:
    kind, pattern, fields, options = CASES[name]
    made = bench(kind, **fields)
    merged = made.peft(pattern, **options)
    assert_equal(made.adapted(), made.expected(merged))


@pytest.mark.parametrize("name", [x for x in CASES if x != "a pickle"])
def test_it_goes_back_as_it_came(name: str, bench: Callable[..., Bench]) -> None:
    """Every tensor to the bit, and the numbers that scale them."""
    kind, pattern, fields, options = CASES[name]
    made = bench(kind, **fields)
    made.peft(pattern, **options)
    out = made.place / "back"
    export_peft(load(made.bring()), out, made.model)
    before, after = (
        load_file(x / "adapter_model.safetensors") for x in (made.place / "peft", out)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(before[k].dtype == after[k].dtype for k in before)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == str(made.place / "in")
    first = import_peft(str(made.place / "peft"), made.model).adapter
    again = import_peft(str(out), made.model).adapter
    assert again.digest == first.digest


def test_one_that_was_trained_here_goes_out_and_means_the_same(
    bench: Callable[..., Bench],
) -> None:
    """Queries, keys and values of their own become one wider pair of the fused matrix."""
    from mm1_mlx.adapters import Adapter, AdapterConfig, attach, base_of
    from mm1_mlx.adapters.attach import wrapped

    made = bench("phi3")
    model = load_model(made.model, mx.float32)
    model.freeze()
    config = AdapterConfig(rank=3, where=("decoder.mlp", r".*\.[qv]_proj"))
    attach(model, config)
    mx.random.seed(0)
    for layer in wrapped(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    adapter = Adapter.of(model, config, base_of(made.model))
    export_peft(adapter, made.place / "peft", made.model)
    found = load_file(made.place / "peft" / "adapter_model.safetensors")
    fused = f"{PREFIX}model.layers.0.self_attn.qkv_proj"
    assert found[f"{fused}.lora_A.weight"].shape == (6, 32)
    # 4 heads of 8, then 2 for keys, which nothing changes.
    assert not found[f"{fused}.lora_B.weight"][32:48].any()
    expected = load_adapted(made.model, Adapters(((adapter, 1.0),)), mx.float32)
    assert_equal(made.adapted(), expected.tensors())


def test_a_new_connector_is_left_out_and_said(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """It is of no checkpoint; the decoder's matrices go out as those of its own."""
    from mm1_mlx.adapters import Adapter, AdapterConfig, attach, base_of

    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    out = tmp_path / "model"
    convert(None, out, vision=str(vision), connector="mlp", decoder=str(decoder))
    model = load_model(out, mx.float32)
    model.freeze()
    model.connector.unfreeze()
    attach(model, config := AdapterConfig(rank=2, where=("decoder", "vision")))
    adapter = Adapter.of(model, config, base_of(out))
    save_adapter(tmp_path / "adapter", adapter)
    left = export_peft(adapter, tmp_path / "peft", out)
    assert adapter.full
    assert set(left) == set(adapter.full) | {
        path for path in adapter.layers if path.startswith("vision.")
    }
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    back = import_peft(str(tmp_path / "peft"), out).adapter
    assert set(back.layers) == {p for p in adapter.layers if p.startswith("decoder.")}
    assert len(found) == 2 * len(back.layers)
    # Its encoder's go out for the other checkpoint.
    left = export_peft(adapter, tmp_path / "eyes", out, str(vision))
    assert not any(name.startswith("vision.") for name in left)
    command = ["adapter", "export", tmp_path / "adapter", tmp_path / "x", "-m", out]
    monkeypatch.setattr(sys, "argv", ["mm1", *map(str, command)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert re.match(r"\d+ trained tensors are left out, .*", capsys.readouterr().err)


def test_what_has_nothing_of_the_checkpoint_does_not_go_out(tmp_path: Path) -> None:
    from mm1_mlx.adapters import Adapter, AdapterConfig, attach, base_of

    vision, decoder = sources.clip(tmp_path / "clip"), sources.llama(tmp_path / "llama")
    out = tmp_path / "model"
    convert(None, out, vision=str(vision), connector="mlp", decoder=str(decoder))
    model = load_model(out, mx.float32)
    model.freeze()
    attach(model, config := AdapterConfig(rank=2, where=("vision",)))
    adapter = Adapter.of(model, config, base_of(out))
    with pytest.raises(CheckpointError, match=r"only what belongs to \['vision'\]"):
        export_peft(adapter, tmp_path / "peft", out)
    assert not (tmp_path / "peft").exists()


def test_llava_with_its_projector(tmp_path: Path) -> None:
    """Against transformers: decoder and encoder by LoRA, the projector in full."""
    model = llava_reference(EQUAL)
    state = {k: x.detach().clone() for k, x in state_of(model, EQUAL).items()}
    save(tmp_path / "in", state, EQUAL)
    convert(str(tmp_path / "in"), tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    full = {
        name: x + torch.randn(x.shape, generator=generator) / 10
        for name, x in state.items()
        if "multi_modal_projector" in name
    }
    assert len(full) == 4
    modules = modules_of(state, r"layers\.\d+\.\S+_proj|fc1|fc2")
    merged = write_peft(
        tmp_path / "peft", state, modules, rank=2, full=full,
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    report = import_peft(str(tmp_path / "peft"), tmp_path / "model")
    # The encoder's last block is not read.
    assert len(report.dropped) == 6
    assert all("layers.2." in name for name in report.dropped)
    ours = load_adapted(
        tmp_path / "model", Adapters(((report.adapter, 1.0),)), mx.float32
    )
    model.load_state_dict(merged)
    prompt = prompt_of(tmp_path / "model")
    for pixels in pictures(28):
        expected = forward_of(model)(
            prompt.tokens, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        )
        plain = our_logits(load_model(tmp_path / "model", mx.float32), prompt, pixels)
        assert difference(our_logits(ours, prompt, pixels), expected.numpy()) <= 1e-4
        assert difference(plain, expected.numpy()) > 0.05
    export_peft(report.adapter, tmp_path / "back", tmp_path / "model")
    before, after = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("peft", "back")
    )
    # Of blocks that are not read nothing was kept.
    assert before.keys() - after.keys() == {
        f"{PREFIX}{name.removesuffix('.weight')}.lora_{x}.weight"
        for name in report.dropped
        for x in "AB"
    }
    assert all(torch.equal(before[k], after[k]) for k in after)


def test_llavas_own_training_leaves_the_projector_beside(tmp_path: Path) -> None:
    model = llava_reference(EQUAL)
    state = {k: x.detach().clone() for k, x in state_of(model, EQUAL).items()}
    save(tmp_path / "in", state, EQUAL)
    convert(str(tmp_path / "in"), tmp_path / "model")
    modules = modules_of(state, r"language_model\.layers\.\d+\.\S+q_proj")
    write_peft(tmp_path / "peft", state, modules, pickled=True)
    name = next(n for n in state if n.endswith("linear_1.bias"))
    beside = {PREFIX + name: torch.ones(32)}
    torch.save(beside, tmp_path / "peft" / "non_lora_trainables.bin")
    adapter = import_peft(str(tmp_path / "peft"), tmp_path / "model").adapter
    assert adapter.full == ("connector.linear_1.bias",)
    assert mx.array_equal(adapter.tensors["connector.linear_1.bias"], mx.ones(32))


def test_an_embeddings_own_weight_may_lie_beside(bench: Callable[..., Bench]) -> None:
    """PEFT saves it, though it is the checkpoint's."""
    made = bench()
    made.peft("embed_tokens")
    path = made.place / "peft" / "adapter_model.safetensors"
    own = made.state["model.embed_tokens.weight"]
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    save_file(load_file(path) | {key: own}, path)
    assert load(made.bring()).full == ()


PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True,
         "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    ),
    "DoRA": ("phi3", {"target_modules": ["qkv_proj"], "use_dora": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
}  # fmt: skip
# Fields of the checkpoint that are not as in all others.
PEFT_SIZES = {"tied embedding": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("name", PEFT_CASES)
def test_peft_itself_computes_the_same_and_reads_what_goes_out(
    name: str, bench: Callable[..., Bench]
) -> None:
    (kind, fields), own = PEFT_CASES[name], PEFT_SIZES.get(name, {})
    made = bench(kind, **own)
    base = decoders.reference(CLASSES[kind], sizes(kind, **own), 0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator) / 10
                parameter.add_(change)
    model.eval().save_pretrained(made.place / "peft")
    prompt = Asked.make(VOCABULARY)
    expected = decoders.forward_of(model)(prompt.tokens, None).numpy()
    adapter = load(made.bring())
    ours = load_adapted(made.model, Adapters(((adapter, 1.0),)), mx.float32)
    assert difference(our_logits(ours, prompt, None), expected) <= 1e-6
    export_peft(adapter, made.place / "back", made.model)
    fresh = decoders.reference(CLASSES[kind], sizes(kind, **own), 0)
    back = peft.PeftModel.from_pretrained(fresh, made.place / "back").eval()
    found = decoders.forward_of(back)(prompt.tokens, None).numpy()
    assert difference(found, expected) <= 1e-6


def test_it_works_on_the_packed_model_too(bench: Callable[..., Bench]) -> None:
    from mm1_mlx.quantize import find_recipe, quantize
    from mm1_mlx.recipe import parse_way

    made = bench()
    way = parse_way("4/32", "test")
    recipe = find_recipe("4bit").with_ways({"attention": way, "mlp": way, "head": None})
    quantize(made.model, made.place / "packed", recipe, measured=False)
    made.peft("q_proj")
    adapter = import_peft(str(made.place / "peft"), made.place / "packed").adapter
    plain = load_model(made.place / "packed", mx.float32)
    ours = load_adapted(made.place / "packed", Adapters(((adapter, 1.0),)), mx.float32)
    prompt = Asked.make(VOCABULARY)
    assert difference(
        our_logits(ours, prompt, None), our_logits(plain, prompt, None)
    ) > 0.01  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "prefix tuning": (
        {"peft_type": "PREFIX_TUNING"}, ConfigError,
        "PEFT type 'PREFIX_TUNING' is not supported; supported: 'LORA', DoRA included",
    ),
    "what it cannot know": (
        {"arrow_config": {"top_k": 3}}, ConfigError, "arrow_config .* is not supported",
    ),
    "layers that are repeated": (
        {"layer_replication": [[0, 2], [1, 2]]}, ConfigError, "layer_replication .* is",
    ),
    "a beginning that changes the base": (
        {"init_lora_weights": "pissa"}, ConfigError, "'pissa' changed the checkpoint's",
    ),
    "a regular expression": (
        {"alpha_pattern": {"(a+)+$": 4}}, ConfigError, "is not a module's name and a",
    ),
    "another rank than it has": (
        {"r": 8}, CheckpointError, "has rank 4, its config says 8; they do not belong",
    ),
    "an alpha that is none": (
        {"lora_alpha": "8"}, ConfigError, "lora_alpha '8' is not a number",
    ),
    "DoRA without lengths": (
        {"use_dora": True}, CheckpointError, "does not fit the model: .* missing, not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_like_here_is_refused_by_name(
    name: str, bench: Callable[..., Bench]
) -> None:
    fields, error, message = REFUSED[name]
    made = bench()
    made.peft("q_proj")
    path = made.place / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(error, match=message):
        made.bring()


WRONG: dict[str, tuple[str, Any, str]] = {
    "an unknown module": (
        "model.layers.0.other.lora_A.weight", torch.zeros(4, 32), "half of a pair",
    ),
    "a convolution": (
        "model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 32, 1, 1),
        "no pair of a rank from 1 to 1024 for a linear layer",
    ),
    "ranks that differ": (
        "model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(3, 32),
        "no pair of a rank",
    ),
    "another width": (
        "model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 33),
        "does not fit the model",
    ),
    "a bias of B": (
        "model.layers.0.self_attn.q_proj.lora_B.bias", torch.zeros(32),
        "is of a kind not supported",
    ),
    "a whole weight that no rule knows": (
        "model.other.weight", torch.zeros(3), "1 source tensors have no rule",
    ),
    "a vocabulary that has grown": (
        "model.embed_tokens.weight", torch.zeros(VOCABULARY + 1, 32),
        "or its vocabulary has grown",
    ),
    "what is not finite": (
        "model.norm.weight", torch.full((32,), torch.inf), "a number that is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_are_refused(
    name: str, bench: Callable[..., Bench]
) -> None:
    key, tensor, message = WRONG[name]
    made = bench()
    made.peft("q_proj")
    path = made.place / "peft" / "adapter_model.safetensors"
    save_file(load_file(path) | {PREFIX + key: tensor}, path)
    with pytest.raises(CheckpointError, match=message):
        made.bring()


def test_a_rank_of_nothing_is_refused(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.peft("q_proj", r=0)
    path = made.place / "peft" / "adapter_model.safetensors"
    save_file(
        {k: x[:0] if "lora_A" in k else x[:, :0] for k, x in load_file(path).items()},
        path,
    )
    with pytest.raises(CheckpointError, match="no pair of a rank from 1 to 1024"):
        made.bring()


def test_experts_that_lack_some_and_a_tied_head_are_refused(
    tmp_path: Path,
) -> None:
    made = Bench("mixtral", tmp_path / "one")
    made.peft(r"experts\.[012]\.w1")
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight' cannot become"):
        made.bring()
    tied = Bench("llama", tmp_path / "two", tie_word_embeddings=True)
    tied.state["lm_head.weight"] = tied.state["model.embed_tokens.weight"]
    tied.peft("lm_head|q_proj")
    with pytest.raises(CheckpointError, match="ties to its embedding"):
        tied.bring()


def test_a_tied_embedding_changes_with_its_head_or_not_at_all(tmp_path: Path) -> None:
    """PEFT leaves the head as it was unless it is told to tie them."""
    alone = Bench("llama", tmp_path / "one", tie_word_embeddings=True)
    alone.peft("embed_tokens|q_proj")
    with pytest.raises(
        CheckpointError, match="leaves the head as it was, which the mod"
    ):
        alone.bring()
    both = Bench("llama", tmp_path / "two", tie_word_embeddings=True)
    merged = both.peft("embed_tokens|q_proj", ensure_weight_tying=True)
    assert_equal(both.adapted(), both.expected(merged))
    for made, pattern, tied in (
        (both, "embed_tokens|q_proj", True),
        (Bench("llama", tmp_path / "three"), "embed_tokens|q_proj", False),
        (Bench("llama", tmp_path / "four", tie_word_embeddings=True), "q_proj", False),
    ):
        if made is not both:
            made.peft(pattern)
            made.bring()
        export_peft(load(made.place / "adapter"), made.place / "back", made.model)
        config = json.loads((made.place / "back" / "adapter_config.json").read_text())
        assert config["ensure_weight_tying"] is tied


def test_a_pickle_that_wants_to_run_code_is_refused(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    made = bench()
    made.peft("q_proj", pickled=True)
    torch.save({"a": Evil()}, made.place / "peft" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="wants to run code or is damaged"):
        made.bring()
    assert not (tmp_path / "ran").exists()


def test_a_model_that_says_no_source_needs_one(bench: Callable[..., Bench]) -> None:
    made = bench()
    path = made.model / "manifest.json"
    manifest = read_manifest(made.model)
    assert manifest["source"]["parts"]["decoder"] == {
        "source": str(made.place / "in"), "format": "llama_hf", "licence": None,
    }  # fmt: skip
    path.write_text(json.dumps(manifest | {"source": {}}))
    made.peft("q_proj")
    with pytest.raises(CheckpointError, match="give that by --source"):
        made.bring()
    report = import_peft(
        str(made.place / "peft"), made.model, source=str(made.place / "in")
    )
    assert len(report.adapter.layers) == 2


def test_another_checkpoints_name_is_said(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.peft("q_proj", base_model_name_or_path="some/other-model")
    report = import_peft(str(made.place / "peft"), made.model)
    assert report.doubt is not None
    assert "is said to be for 'some/other-model'" in report.doubt


def test_the_commands(
    bench: Callable[..., Bench], monkeypatch: Any, capsys: Any
) -> None:
    made = bench()
    made.peft("q_proj")

    def mm1(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mm1", "adapter", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    peft, out, back = (made.place / x for x in ("peft", "ours", "back"))
    assert mm1("import", peft, out, "-m", made.model) == (0, f"{out}\n", "")
    status, text, _ = mm1("show", out)
    assert status == 0
    assert re.match(r"LoRA, rank 4, scale 2: 2 layers, \d+\.\d kB, for ", text)
    facts = json.loads(mm1("show", out, "--json")[1])
    assert facts["rank"] == 4
    assert facts["layers"][0] == "decoder.layers.0.self_attn.q_proj"
    assert facts["training"] == {"imported_from": "PEFT"}
    assert mm1("export", out, back, "-m", made.model) == (0, f"{back}\n", "")
    assert (back / "adapter_model.safetensors").is_file()
    status, text, error = mm1("export", out, back, "-m", made.model)
    assert (status, text) == (1, "")
    assert "already exists" in error
    # Both kinds have an adapter_config.json, but neither is written onto what is read.
    before = {path.name: path.read_bytes() for path in peft.iterdir()}
    for place in (peft, peft / "in", made.model / "in"):
        arguments = ("import", peft, place, "-m", made.model, "--overwrite")
        status, _, error = mm1(*arguments)
        assert (status, error.count("\n")) == (1, 1)
        assert "is, holds or lies in" in error
        status, _, error = mm1("export", peft, place, "-m", made.model)
        assert status == 1
    assert {path.name: path.read_bytes() for path in peft.iterdir()} == before
    assert "is, holds or lies in" in mm1("export", out, out / "in", "-m", made.model)[2]
    status, _, error = mm1("show", peft)
    assert status == 1
    assert "mm1 adapter import" in error
