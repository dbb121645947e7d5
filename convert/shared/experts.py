"""Rules for the experts of a sparse decoder, in every layout that they are saved in.

https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/models/mixtral.py
"""

from ..rules import Table, each, split, stack

MLP = "decoder.layers.{}.mlp."
EXPERTS = f"{MLP}switch_mlp."


def table(block: str, gate: str, up: str, down: str) -> Table:
    """The rules of a sparse layer whose tensors lie under ``block``.

    Hub checkpoints have one matrix per expert, [H, D] and [D, H]; transformers 5 holds
    all of them in two, [E, 2H, D] and [E, D, H], and may save those; mlx-lm saves three,
    [E, H, D] and [E, D, H], packed or not.

    Args:
        block: the layer's feed-forward part, ``{}`` standing for its number.
        gate: name of an expert's gate projection, in the first layout.
        up: of its up projection.
        down: of its down projection.
    """
    by_mlx_lm: Table = {
        f"{block}switch_mlp.{name}.weight": f"{EXPERTS}{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return by_mlx_lm | {
        f"{block}gate.weight": f"{MLP}gate.weight",
        f"{block}experts.{{}}.{gate}.weight": stack(f"{EXPERTS}gate_proj.weight"),
        f"{block}experts.{{}}.{up}.weight": stack(f"{EXPERTS}up_proj.weight"),
        f"{block}experts.{{}}.{down}.weight": stack(f"{EXPERTS}down_proj.weight"),
        f"{block}experts.gate_up_proj": each(
            split(f"{EXPERTS}gate_proj.weight", f"{EXPERTS}up_proj.weight")
        ),
        f"{block}experts.down_proj": f"{EXPERTS}down_proj.weight",
    }
