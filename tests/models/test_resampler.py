"""Attention pooling equals torch's attention, the Perceiver open_flamingo's description.

The oracles are written here in plain torch, from open_clip's ``AttentionalPooler`` (which
is ``nn.MultiheadAttention`` with ``kdim`` and ``vdim`` between two norms) and from
open_flamingo's ``PerceiverResampler`` (heads of their own width, latents joined to the
keys, a projection where xGen-MM has one): not from this program's code.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")

from mm1_mlx.config import AttentionPoolConfig, PerceiverConfig  # noqa: E402
from mm1_mlx.models.resampler import AttentionPool, Perceiver  # noqa: E402

pytestmark = pytest.mark.reference
C, D, HEADS = 24, 40, 4


def as_torch(module):
    return {
        name: torch.from_numpy(np.array(x))
        for name, x in tree_flatten(module.parameters())
    }


def norm(w, name, x):
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


def attentional_pooler(w, features):
    """open_clip's, and the norm that stands behind it in CoCa's vision tower."""
    attention = torch.nn.MultiheadAttention(D, HEADS, kdim=C, vdim=C, batch_first=True)
    state = {f"{x}_proj_weight": w[f"{x}_proj.weight"] for x in "qkv"} | {
        "in_proj_bias": torch.cat([w[f"{x}_proj.bias"] for x in "qkv"]),
        "out_proj.weight": w["out_proj.weight"],
        "out_proj.bias": w["out_proj.bias"],
    }
    attention.load_state_dict(state)
    x = norm(w, "feature_norm", features)
    q = norm(w, "query_norm", w["query"]).expand(len(x), -1, -1)
    with torch.no_grad():
        return norm(w, "norm", attention(q, x, x, need_weights=False)[0])


def perceiver_resampler(w, features, depth, heads, head_dim):
    """open_flamingo's, head by head, with to_kv fused as its checkpoints have it."""
    latents = w["latents"].expand(len(features), -1, -1)
    for i in range(depth):
        layer = {
            k.removeprefix(f"layers.{i}."): v
            for k, v in w.items()
            if k.startswith(f"layers.{i}.")
        }
        x = norm(layer, "feature_norm", features)
        q_in = norm(layer, "latent_norm", latents)
        kv_in = torch.cat([x, q_in], dim=1)
        to_kv = torch.cat([layer["k_proj.weight"], layer["v_proj.weight"]])
        k, v = (kv_in @ to_kv.T).chunk(2, dim=-1)
        q = (q_in @ layer["q_proj.weight"].T) * head_dim**-0.5
        seen = []
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            scores = q[..., part] @ k[..., part].transpose(1, 2)
            seen.append(scores.softmax(dim=-1) @ v[..., part])
        latents = latents + torch.cat(seen, dim=-1) @ layer["out_proj.weight"].T
        y = norm(layer, "mlp_norm", latents) @ layer["fc1.weight"].T
        y = torch.nn.functional.gelu(y) @ layer["fc2.weight"].T
        latents = latents + y
    return norm(w, "norm", latents) @ w["projection.weight"].T + w["projection.bias"]


def features(count, seed=0):
    return np.random.default_rng(seed).standard_normal((2, count, C)).astype(np.float32)


# MM1's numbers of image tokens, of its numbers of patches.
@pytest.mark.parametrize(("patches", "tokens"), [(256, 64), (576, 64), (729, 144)])
def test_attention_pooling_is_open_clip_s(patches, tokens, reinitialise, assert_close):
    config = AttentionPoolConfig(
        input_size=C,
        num_features=patches,
        output_size=D,
        num_image_tokens=tokens,
        num_attention_heads=HEADS,
    )
    pool = reinitialise(AttentionPool(config))
    x = features(patches)
    expected = attentional_pooler(as_torch(pool), torch.from_numpy(x))
    assert_close(pool(mx.array(x)), expected.numpy(), "op")


@pytest.mark.parametrize(
    ("tokens", "depth", "heads", "head_dim"),
    [(64, 2, 8, 4), (144, 1, 2, 20), (128, 6, 3, 12)],
)
def test_the_perceiver_is_open_flamingo_s(
    tokens, depth, heads, head_dim, reinitialise, assert_close
):
    config = PerceiverConfig(
        input_size=C,
        num_features=81,
        output_size=D,
        num_image_tokens=tokens,
        depth=depth,
        num_attention_heads=heads,
        head_dim=head_dim,
        intermediate_size=4 * C,
    )
    perceiver = reinitialise(Perceiver(config))
    x = features(81)
    weights = as_torch(perceiver)
    with torch.no_grad():
        expected = perceiver_resampler(
            weights, torch.from_numpy(x), depth, heads, head_dim
        )
    assert_close(perceiver(mx.array(x)), expected.numpy())


def test_the_latents_attend_to_themselves_too(reinitialise):
    config = PerceiverConfig(
        input_size=C,
        num_features=4,
        output_size=D,
        num_image_tokens=3,
        depth=1,
        intermediate_size=C,
    )
    perceiver = reinitialise(Perceiver(config))
    layer, x = perceiver.layers[0], mx.array(features(4))
    latents = mx.broadcast_to(perceiver.latents, (2, 3, C))
    changed = mx.concatenate([latents[:, :2], -latents[:, 2:]], axis=1)
    # Not only the latent that was changed is another now.
    difference = mx.abs(layer(latents, x) - layer(changed, x)).max(axis=-1)
    assert mx.all(difference > 1e-4)
