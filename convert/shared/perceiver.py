"""The Perceiver resampler's tensors, as open_flamingo names them; xGen-MM's fork, too.

https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/src/helpers.py
https://github.com/salesforce/LAVIS/blob/d699f7e/open_flamingo/src/helpers.py
"""

from ..rules import Table, split

# By open_flamingo's name within a layer, ours: an attention, then a sequence of a norm and
# two linear layers with an activation between them.
LAYER = {
    "0.norm_media.weight": "feature_norm.weight",
    "0.norm_media.bias": "feature_norm.bias",
    "0.norm_latents.weight": "latent_norm.weight",
    "0.norm_latents.bias": "latent_norm.bias",
    "0.to_q.weight": "q_proj.weight",
    "0.to_out.weight": "out_proj.weight",
    "1.0.weight": "mlp_norm.weight",
    "1.0.bias": "mlp_norm.bias",
    "1.1.weight": "fc1.weight",
    "1.3.weight": "fc2.weight",
}


def table(prefix: str) -> Table:
    """The connector's rules, for names that start with ``prefix``.

    Embeddings of frames and of a picture's place have no rule: no model here has them.
    """
    layer = "connector.layers.{}."
    return {
        f"{prefix}latents": "connector.latents",
        **{
            f"{prefix}{name}.{leaf}": f"connector.{name}.{leaf}"
            for name in ("norm", "projection")
            for leaf in ("weight", "bias")
        },
        **{f"{prefix}layers.{{}}.{k}": f"{layer}{v}" for k, v in LAYER.items()},
        f"{prefix}layers.{{}}.0.to_kv.weight": split(
            f"{layer}k_proj.weight", f"{layer}v_proj.weight"
        ),
    }
