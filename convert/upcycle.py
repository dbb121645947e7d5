"""A dense decoder made sparse: every expert a copy of the layer's MLP, a new router.

``experts=64,every=2`` on the command line. Right after, the model is the dense one: the
chosen experts are equal and their weights add up to 1.

Source: sparse upcycling (arXiv 2212.05055), as axlearn's convert_dense_to_moe_parameters
does it, https://github.com/apple/axlearn/blob/34aed43c1b6e581c4753d06d7cbeedd5010ef26b/
axlearn/common/mixture_of_experts.py
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

from mm1_mlx.config import DecoderConfig, MM1Config, MoEConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.shard import Deferred

EXAMPLE = "experts=64,every=2[,offset=1][,top=2]"
FIELDS = ("experts", "every", "offset", "top")
ROUTER = "router"
_MLP = re.compile(r"decoder\.layers\.(\d+)\.mlp\.((gate|up|down)_proj\.weight)")
_NUMBER = re.compile("[0-9]{1,6}")
Tensors = Iterable[tuple[str, Deferred]]


@dataclass(frozen=True)
class Upcycle:
    """Which layers of a dense decoder become sparse, and how."""

    moe: MoEConfig

    @classmethod
    def parse(cls, spec: str) -> Self:
        """What the command line asks for.

        Raises:
            ConfigError: it is not of the form ``EXAMPLE``, or its numbers do not fit.
        """
        pairs = [pair.split("=") for pair in spec.split(",")]
        values = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        well_formed = (
            len(values) == len(pairs)
            and {"experts", "every"} <= set(values) <= set(FIELDS)
            and all(_NUMBER.fullmatch(value) for value in values.values())
        )
        if not well_formed:
            raise ConfigError(f"upcycle {spec!r} is not of the form {EXAMPLE}")
        every = int(values["every"])
        return cls(
            MoEConfig(
                num_experts=int(values["experts"]),
                experts_per_token=int(values.get("top", 2)),
                every=every,
                offset=int(values.get("offset", every - 1)),
            )
        )

    def config(self, dense: MM1Config) -> MM1Config:
        """The config of the sparse model.

        Raises:
            ConfigError: the dense one cannot be made sparse.
        """
        decoder = dense.decoder
        if decoder is None:
            raise ConfigError("there is no decoder to upcycle; name a source of one")
        _check_dense(decoder)
        sparse = replace(decoder, moe=self.moe)
        if not any(map(sparse.is_sparse, range(decoder.num_hidden_layers))):
            raise ConfigError(
                f"upcycle every={self.moe.every},offset={self.moe.offset} makes none of "
                f"the {decoder.num_hidden_layers} layers sparse; lower them"
            )
        return replace(dense, decoder=sparse)

    def check_packed(self, packed: Iterable[str]) -> None:
        """Pass only if none of the packed modules is the decoder's.

        Raises:
            ConfigError: one is.
        """
        if any(name.startswith("decoder.") for name in packed):
            raise ConfigError(
                "a quantized decoder cannot be upcycled; convert the unquantized one"
            )

    def tensors(
        self, dense: Tensors, sparse: DecoderConfig, seed: int
    ) -> Iterator[tuple[str, Deferred]]:
        """The sparse model's tensors, from the dense one's as they come."""
        E, D = self.moe.num_experts, sparse.hidden_size
        keys = mx.random.split(mx.random.key(seed), sparse.num_hidden_layers)
        for name, tensor in dense:
            match = _MLP.fullmatch(name)
            if match is None or not sparse.is_sparse(int(match[1])):
                yield name, tensor
                continue
            mlp = f"decoder.layers.{match[1]}.mlp"
            if match[3] == "gate":
                # As nn.Linear begins: small enough for no expert to be out of reach.
                weight = mx.random.uniform(
                    -(D**-0.5), D**-0.5, (E, D), key=keys[int(match[1])]
                )
                weight = weight.astype(tensor.dtype)
                yield f"{mlp}.gate.weight", Deferred.of(weight)
            copies = Deferred((E, *tensor.shape), tensor.dtype, _copies(tensor, E))
            yield f"{mlp}.switch_mlp.{match[2]}", copies


def _copies(tensor: Deferred, count: int) -> Callable[[], Iterator[mx.array]]:
    """Gives the tensor's pieces so many times; it is made once, and held meanwhile."""

    def pieces() -> Iterator[mx.array]:
        held = list(tensor.pieces())
        for _ in range(count):
            yield from held

    return pieces


def _check_dense(decoder: DecoderConfig) -> None:
    """Pass only if the feed-forward layers are what experts are.

    Raises:
        ConfigError: they are not.
    """
    if decoder.moe:
        raise ConfigError(
            f"the decoder has {decoder.moe.num_experts} experts already; upcycle a "
            "dense one"
        )
    if decoder.hidden_act != "silu":
        raise ConfigError(
            f"a decoder with hidden_act {decoder.hidden_act!r} cannot be upcycled, for "
            "experts are SwiGLU; choose one with 'silu'"
        )
    if decoder.mlp_bias:
        raise ConfigError(
            "a decoder with mlp_bias cannot be upcycled, for experts have no biases; "
            "choose one without"
        )
    if decoder.layer_sizes:
        raise ConfigError(
            "a decoder whose layers differ in size cannot be upcycled; choose one whose "
            "layers are alike"
        )
