"""Ferret in plain torch, written from the description of its code and not from ours.

apple/ml-ferret at 3c9e5c9: ``GeoRegionSampler`` of ferret/model/ferret_arch.py, and how
ferretui/model/ferret_arch.py makes the map that it reads. CLIP and the decoders are
transformers' own. Where the code draws at random, points and the first anchor are given;
where its ``topk`` leaves open which of equally near points it takes, the first are.

Gemma is as in transformers 4.39, which Ferret-UI pins: it scales whatever embeddings it is
given, image tokens too. Today's scales those of text alone.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel


def read_points(grid: Any, points: Any, flipped: bool = True) -> Any:
    """Features [P, C] of a map [H, W, C] at points [P, 2], x and y in 0..1."""
    where = points.flip(-1) if flipped else points
    where = (2.0 * where - 1.0)[None, :, None, :]  # [1, P, 1, (column, row)]
    image = grid.permute(2, 0, 1)[None]
    found = functional.grid_sample(image, where, mode="bilinear", align_corners=True)
    return found[0, :, :, 0].T


def far_apart(points: Any, count: int) -> Any:
    """Indices of farthest point sampling that begins with the first."""
    apart = torch.full((len(points),), 1e10)
    indices, last = [], 0
    for _ in range(count):
        indices.append(last)
        apart = torch.minimum(apart, ((points - points[last]) ** 2).sum(-1))
        last = int(apart.max(-1)[1])
    return torch.tensor(indices)


def neighbours(points: Any, anchors: Any, count: int) -> Any:
    """Indices [M, count] of the nearest points; of equals the first."""
    differences = anchors.double()[:, None] - points.double()[None]
    order = (differences**2).sum(-1).sort(dim=-1, stable=True)[1]
    return order[:, :count]


class ReluNorm(nn.Module):
    """A convolution of width 1, ReLU and a norm over channels."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(channels_in, channels, 1), nn.ReLU())
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Any) -> Any:
        return self.norm(self.net(x).transpose(1, 2)).transpose(1, 2)


class Sampler(nn.Module):
    """One token per region, from a map [H, W, C] and points [R, P, 2]."""

    def __init__(
        self, width: int, out: int, counts: tuple[int, ...] = (128, 32), near: int = 24
    ) -> None:
        super().__init__()
        self.counts, self.near, self.flipped = counts, near, True
        self.diff_projector_list = nn.ModuleList(
            nn.Linear(width + 2, width + 2) for _ in counts
        )
        self.agg_projector_list = nn.ModuleList(
            ReluNorm(2 * (width + 2), width) for _ in counts
        )
        self.flatten_projector = nn.Linear(width * counts[-1], width)
        self.dim_projector = nn.Linear(width, out)

    def forward(self, grid: Any, regions: Any) -> Any:
        return torch.stack([self.one(grid, points) for points in regions])

    def one(self, grid: Any, points: Any) -> Any:
        features = read_points(grid, points, self.flipped)
        for i, count in enumerate(self.counts):
            chosen = far_apart(points, count)
            near = neighbours(points, points[chosen], self.near)
            local = torch.cat([features[near], points[near]], dim=-1)
            anchor = torch.cat([features[chosen], points[chosen]], dim=-1)[:, None]
            changes = self.diff_projector_list[i](local - anchor)
            both = torch.cat([changes, anchor.repeat(1, self.near, 1)], dim=-1)
            mixed = self.agg_projector_list[i](both.transpose(1, 2))
            features = functional.adaptive_max_pool1d(mixed, 1)[..., 0]
            points = points[chosen]
        return self.dim_projector(self.flatten_projector(features.flatten()))


class Body(nn.Module):
    """What lies under ``model.`` beside the decoder."""

    def __init__(self, vision: dict[str, Any], width: int, mlp: bool) -> None:
        super().__init__()
        tower = CLIPVisionModel(CLIPVisionConfig(**vision))
        self.vision_tower = nn.ModuleDict({"vision_tower": tower})
        size = vision["hidden_size"]
        self.mm_projector: Any = nn.Linear(size, width)
        if mlp:
            layers = (nn.Linear(size, width), nn.GELU(), nn.Linear(width, width))
            self.mm_projector = nn.Sequential(*layers)
        self.region_geo_sampler = Sampler(size, width)


class Ferret(nn.Module):
    """Logits [T, V] of tokens, of a picture's tiles [N, 3, H, W] and of its regions."""

    def __init__(
        self, vision: dict[str, Any], decoder: Any, mlp: bool, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.body = Body(vision, decoder.config.hidden_size, mlp)
        self.decoder = decoder
        # Of image tokens, where the decoder scales embeddings.
        self.scale = scale

    def features(self, tiles: Any) -> Any:
        """Features [N, L, C] of the last block but one, without the class token."""
        tower = self.body.vision_tower["vision_tower"]
        return tower(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]

    def grids(self, x: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
        """Features of an overview, and of tiles [H, W, C], rows x columns of them."""
        side = int(x.shape[1] ** 0.5)
        rows, columns = shape
        tiles = x[1:].reshape(rows, columns, side, side, -1).permute(0, 2, 1, 3, 4)
        return x[0], tiles.reshape(rows * side, columns * side, -1)

    def image_tokens(self, tiles: Any, shape: tuple[int, int], regions: Any) -> Any:
        """Image tokens [K, D] of a picture, and tokens [R, D] of its regions."""
        x = self.features(tiles)
        side = int(x.shape[1] ** 0.5)
        if len(x) == 1:
            tokens = self.body.mm_projector(x[0])
            grid = x[0].reshape(side, side, -1)
        else:
            base, joined = self.grids(x, shape)
            flat = torch.cat([base, joined.flatten(0, 1)])
            tokens = self.body.mm_projector(flat)
            base = base.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            base = functional.interpolate(base, joined.shape[:2])  # nearest
            grid = joined + base[0].permute(1, 2, 0)
        if regions is None:
            return tokens, None
        return tokens, self.body.region_geo_sampler(grid, regions)

    def forward(
        self, ids: list[int], image: slice, places: list[int], picture: Any
    ) -> Any:
        """Logits with image tokens at ``image`` and region tokens at ``places``."""
        tiles, shape, regions = picture
        x = self.decoder.get_input_embeddings()(torch.tensor(ids)).clone()
        tokens, referred = self.image_tokens(tiles, shape, regions)
        x[image] = tokens * self.scale
        if places:
            x[places] = referred * self.scale
        return self.decoder(inputs_embeds=x[None]).logits[0]

    def own_state(self) -> dict[str, Any]:
        """Its tensors by the names that Ferret's checkpoints have."""
        state = {f"model.{name}": x for name, x in self.body.state_dict().items()}
        # transformers 5 left out a level of names.
        tower = "model.vision_tower.vision_tower."
        state = {
            name.replace(tower, f"{tower}vision_model.")
            if f"{tower}vision_model." not in name
            else name: x
            for name, x in state.items()
        }
        decoder = dict(self.decoder.state_dict())
        if self.decoder.config.tie_word_embeddings:
            decoder.pop("lm_head.weight")
        return state | decoder
