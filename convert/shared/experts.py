"""Rules for the experts of a sparse decoder, as hub checkpoints and transformers 5 lay them."""

from ..rules import Table, split, stack

MLP = "decoder.layers.{}.mlp."
EXPERTS = f"{MLP}switch_mlp."


def table(block: str, gate: str, up: str, down: str) -> Table:
    """The rules of a sparse layer whose tensors lie under ``block``.

    Hub checkpoints have one matrix per expert, [H, D] and [D, H]; transformers 5 holds
    all of them in two, [E, 2H, D] and [E, D, H], and may save those.

    Args:
        block: the layer's feed-forward part, ``{}`` standing for its number.
        gate: name of an expert's gate projection, in the first layout.
        up: of its up projection.
        down: of its down projection.
    """
    return {
        f"{block}gate.weight": f"{MLP}gate.weight",
        f"{block}experts.{{}}.{gate}.weight": stack(f"{EXPERTS}gate_proj.weight"),
        f"{block}experts.{{}}.{up}.weight": stack(f"{EXPERTS}up_proj.weight"),
        f"{block}experts.{{}}.{down}.weight": stack(f"{EXPERTS}down_proj.weight"),
        f"{block}experts.gate_up_proj": split(
            f"{EXPERTS}gate_proj.weight", f"{EXPERTS}up_proj.weight", axis=1
        ),
        f"{block}experts.down_proj": f"{EXPERTS}down_proj.weight",
    }
