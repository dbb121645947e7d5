"""The config of the parts of a model together."""

from dataclasses import replace
from typing import Any

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError

from .connectors import SPELLINGS, connector_config
from .origins import Origin, Origins, config_of, elsewhere


def compose(origins: Origins, spec: str | None) -> MM1Config:
    """The config of the parts together, a new connector between them if asked for.

    Pictures are made as the encoder's source makes them, prompts as the decoder's; a
    model whose authors left its encoder elsewhere goes on making both.

    Raises:
        ConfigError: a part is missing, or they do not fit.
    """
    values: dict[str, Any] = {
        part: getattr(config_of(origin), part) for part, origin in origins.items()
    }
    for part, section in (("vision", "image"), ("decoder", "prompt")):
        if part in origins:
            values[section] = getattr(config_of(origins[part]), section)
    both = "vision" in values and "decoder" in values
    if both:
        # Beside a decoder CLIP's space has no use.
        values["vision"] = replace(values["vision"], projection_size=None)
    connector = origins.get("connector")
    trained = connector.config.vision if isinstance(connector, Origin) else None
    if trained and "vision" in values:
        # A connector goes on reading the features it was trained on.
        values["vision"] = replace(
            values["vision"],
            feature_layer=trained.feature_layer,
            apply_post_norm=trained.apply_post_norm,
            drop_cls=trained.drop_cls,
        )
        if elsewhere(connector):
            # The model is the connector's; only its encoder's weights lie elsewhere.
            values["image"] = config_of(origins["connector"]).image
    if spec:
        if not both:
            raise ConfigError(
                f"connector {spec!r} needs a vision part and a decoder to stand between"
            )
        # A class token has no place in the grid that connectors pool.
        values["vision"] = replace(values["vision"], drop_cls=True)
        made = connector_config(spec, values["vision"], values["decoder"])
        tiling = values["image"].tiling if values["image"] else None
        newline = getattr(tiling, "merge", "flat") == "unpad"
        values["connector"] = replace(made, newline=newline)
    elif both and "connector" not in values:
        raise ConfigError(
            "vision and decoder need a connector between them, one of "
            f"{', '.join(SPELLINGS)}, or a source of one"
        )
    return MM1Config(**values)
