"""Adapters of PEFT as ours, by the very rules that convert the checkpoint they are for.

PEFT names matrices after the modules of the checkpoint's own model:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight     [out, r]

The format's rule for ``model.layers.0.self_attn.q_proj.weight`` says where they go. Where
it does more than rename, they can follow if all that it does is part the rows, or stack
experts; whether that is so is tried on a product of two small matrices.

https://github.com/huggingface/peft/blob/v0.17.0/src/peft/tuners/lora/config.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx import hub
from mm1_mlx.adapters import Adapter, AdapterConfig, Adapters, base_of
from mm1_mlx.adapters.config import MAX_RANK
from mm1_mlx.adapters.folder import CONFIG, check
from mm1_mlx.checkpoint import build_model, load_config, packed_on_disk, read_manifest
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.files import read_json, read_shard, safe_join
from mm1_mlx.pieces import ALL

from .detect import detect_format
from .expected import possible_shapes
from .match import steps_of
from .place import local_folder
from .rules import Rules
from .shards import scratch, unpickle
from .source import Source
from .step import Step

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# What LLaVA's own training writes beside them: the projector.
BESIDE = "non_lora_trainables.bin"
PREFIX = "base_model.model."
# LoraConfig's word, from PEFT 0.18 on, for a tied head that changes with its embedding.
TYING = "ensure_weight_tying"
EMBEDDING, HEAD = "decoder.embed_tokens.weight", "decoder.lm_head.weight"
# Fields of LoraConfig that act in training, or that the weights themselves tell.
IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "bias"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("megatron_core", "eva_config", "runtime_config", "qalora_group_size"),
    "loftq_config",
}
READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", TYING),
}
# Beginnings that leave the checkpoint's weights as they are; others take away from them.
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", None)
# A pattern's key that is a name, or its end; others would have to be run.
_NAME = re.compile(r"\^?[\w.]+\$?")
_LEAVES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
_LEAF = re.compile("(.+?)[.](" + "|".join(map(re.escape, _LEAVES)) + ")")


@dataclass(frozen=True)
class Report:
    """What was brought over.

    Attributes:
        adapter: as ours.
        dropped: modules that this model does not have, such as blocks of the encoder
            behind those that are read.
        doubt: a sentence if it is said to be for another checkpoint, else None.
    """

    adapter: Adapter
    dropped: tuple[str, ...]
    doubt: str | None


@dataclass(frozen=True)
class Pair:
    """A module's matrices as PEFT has them: A [r, in], B [out, r], and DoRA's lengths."""

    A: mx.array
    B: mx.array
    m: mx.array | None
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight that they change."""
        if self.embedding:
            return self.A.shape[1], self.B.shape[0]
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class Held:
    """A tensor that is in memory, as a step reads it."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> mx.Dtype:
        """Its type."""
        return self.array.dtype

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or those of some places along the first axis."""
        return self.array[rows] if self.array.ndim else self.array


def import_peft(name: str, model: Path, source: str | None = None) -> Report:
    """The adapter that a PEFT folder or repository is of a model folder.

    Args:
        name: the adapter.
        model: the folder that the checkpoint it is for was converted to.
        source: that checkpoint; by default what the model's manifest names.

    Raises:
        CheckpointError: it cannot be had, is damaged, or does not fit the model.
        ConfigError: it is of a kind that has no like here.
    """
    folder = local_folder(name) or hub.download_files(
        name, (CONFIG, WEIGHTS, PICKLE, BESIDE)
    )
    config = read_config(folder)
    pairs, full = _split(name, _tensors(folder, name))
    said = config.get("base_model_name_or_path")
    origin = origin_of(model, source, said)
    with Source(origin) as opened:
        rules = detect_format(opened).rules(opened)
    shapes = possible_shapes(load_config(model))
    made = _Import(name, config, rules, shapes, pairs, full)
    adapter = made.adapter(model)
    # Folders are called what people like; repositories have one name.
    doubt = None
    if isinstance(said, str) and hub.is_repository(said) and said != origin:
        doubt = (
            f"{name} is said to be for {said!r:.120}, and the model was converted from "
            f"{origin!r}: its shapes fit, what it has learned may not"
        )
    return Report(adapter, tuple(sorted(made.dropped)), doubt)


def origin_of(model: Path, source: str | None, said: object = None) -> str:
    """The checkpoint that a model folder, or its decoder, was converted from.

    Args:
        model: the folder.
        source: the checkpoint, if it is known.
        said: what an adapter calls its checkpoint, which is taken if it is one of several.

    Raises:
        CheckpointError: nothing says.
    """
    if source:
        return source
    names = {part: name for part, name in _sources(model).items() if name}
    if isinstance(said, str) and said in names.values():
        return said
    if not names:
        raise CheckpointError(
            f"{model} does not say which checkpoint it was converted from; give that by "
            "--source"
        )
    return names.get("decoder") or next(iter(names.values()))


def parts_elsewhere(model: Path, origin: str) -> set[str]:
    """The parts of a model folder that are from no checkpoint, or another than this one."""
    names = _sources(model)
    # Of a checkpoint under another name it is not known what it holds.
    known = origin in names.values()
    return {
        part for part, name in names.items() if not name or (known and name != origin)
    }


def _sources(model: Path) -> dict[str, str | None]:
    """By part of a model folder the checkpoint it is from; None of those that are new."""
    known = read_manifest(model).get("source")
    parts = known.get("parts") if isinstance(known, dict) else None
    records = parts if isinstance(parts, dict) else {}
    names = {
        part: record.get("source")
        for part, record in records.items()
        if isinstance(record, dict)
    }
    return {k: name if isinstance(name, str) else None for k, name in names.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a PEFT adapter's adapter_config.json.

    Raises:
        CheckpointError: there is none, or it is not PEFT's.
        ConfigError: it is of a kind, or has an option, that has no like here.
    """
    config = read_json(safe_join(folder, CONFIG))
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"{folder / CONFIG} is not of a PEFT adapter")
    if config["peft_type"] != "LORA":
        raise ConfigError(
            f"{folder}: PEFT type {config['peft_type']!r:.40} is not supported; "
            "supported: 'LORA', DoRA included"
        )
    for field in sorted(set(config) - IGNORED - READ):
        # What is unset says nothing, whatever it is about.
        if config[field] not in (None, False, [], {}, ""):
            raise ConfigError(
                f"{folder}: {field} {config[field]!r:.80} is not supported; merge the "
                "adapter into its checkpoint with PEFT and convert that"
            )
    begun = config.get("init_lora_weights", True)
    if begun not in BEGINNINGS:
        raise ConfigError(
            f"{folder}: init_lora_weights {begun!r:.40} changed the checkpoint's own "
            "weights; save the adapter with PEFT's path_initial_model_for_weight_"
            "conversion"
        )
    return config


def _tensors(folder: Path, name: str) -> dict[str, mx.array]:
    """All tensors of the folder by name, pickles through a child process."""
    path = safe_join(folder, WEIGHTS)
    beside = safe_join(folder, BESIDE)
    pickles = [beside] if beside.is_file() else []
    tensors: dict[str, mx.array] = {}
    if path.is_file():
        tensors = read_shard(path)
    elif (pickle := safe_join(folder, PICKLE)).is_file():
        pickles.insert(0, pickle)
    else:
        raise CheckpointError(f"{name} has neither {WEIGHTS} nor {PICKLE}")
    with ExitStack() as stack:
        if pickles:
            place = stack.enter_context(scratch(None, 0))
            for shard in unpickle(pickles, place):
                tensors |= read_shard(shard)
        # Before the files are gone.
        mx.eval(tensors)
    return tensors


def _split(
    name: str, tensors: Mapping[str, mx.array]
) -> tuple[dict[str, Pair], dict[str, mx.array]]:
    """Pairs by module, and weights trained in full by name.

    Raises:
        CheckpointError: a pair is not whole, or a tensor is of a kind unknown.
    """
    found: dict[str, dict[str, mx.array]] = {}
    embeddings, full = set(), {}
    for key, tensor in tensors.items():
        # LLaVA's projector lacks PEFT's prefix in some versions.
        plain = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        if plain.endswith(".base_layer.weight"):
            # The checkpoint's own, which PEFT saves beside an embedding's matrices.
            continue
        plain = plain.replace(".base_layer.", ".")
        if match := _LEAF.fullmatch(plain):
            found.setdefault(match[1], {})[_LEAVES[match[2]]] = tensor
            if "embedding" in match[2]:
                embeddings.add(match[1])
        elif "lora" in plain or "trainable_tokens" in plain:
            raise CheckpointError(f"{name}: {key!r:.120} is of a kind not supported")
        else:
            full[plain] = tensor
    pairs = {}
    for module, leaves in found.items():
        A, B = leaves.get("A"), leaves.get("B")
        if A is None or B is None:
            raise CheckpointError(f"{name}: {module!r:.120} has half of a pair")
        paired = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
        if not paired or not 0 < A.shape[0] <= MAX_RANK:
            raise CheckpointError(
                f"{name}: {module!r:.120} has matrices of shape {list(A.shape)} and "
                f"{list(B.shape)}, which are no pair of a rank from 1 to {MAX_RANK} for "
                "a linear layer"
            )
        pairs[module] = Pair(A, B, leaves.get("m"), module in embeddings)
    return pairs, full


class _Import:
    """A PEFT adapter that is being brought over."""

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        rules: Rules,
        possible: Mapping[str, tuple[int, ...]],
        pairs: Mapping[str, Pair],
        full: Mapping[str, mx.array],
    ) -> None:
        self.name = name
        self.config = config
        self.rules = rules
        # Every tensor that the checkpoint's model may have, by our name.
        self.possible = possible
        self.pairs = pairs
        self.full = full
        self.tensors: dict[str, mx.array] = {}
        self.scales: dict[str, float] = {}
        # The checkpoint's tensors that one of ours, or its matrices, come from.
        self.names: dict[str, list[str]] = {}
        self.dropped: list[str] = []

    def adapter(self, model: Path) -> Adapter:
        """The adapter, checked against the model folder.

        Raises:
            CheckpointError: it does not fit, or cannot be laid out as the model is.
        """
        config = load_config(model)
        built = build_model(config, packed_on_disk(model, config))
        wanted = set(built.tensors())
        pairs = {f"{module}.weight": pair.shape for module, pair in self.pairs.items()}
        for step in self._steps(pairs):
            if self._is_here(step, wanted):
                self._take_pair(step)
        for step in self._steps({k: tuple(x.shape) for k, x in self.full.items()}):
            if self._is_here(step, wanted):
                self._take_full(step)
        if not self.scales:
            raise CheckpointError(f"{self.name} has no low-rank matrices of this model")
        scale = Counter(self.scales.values()).most_common(1)[0][0]
        ranks = Counter(x.A.shape[0] for x in self.pairs.values())
        adapter = Adapter(
            AdapterConfig(
                kind="dora" if self.config.get("use_dora") else "lora",
                rank=ranks.most_common(1)[0][0],
                scale=scale,
                dropout=self._number("lora_dropout", 0.0),
                where=_patterns(self.scales),
            ),
            self.tensors,
            base_of(model),
            {path: x for path, x in self.scales.items() if x != scale},
            {"imported_from": "PEFT", "names": self.names},
            self.name,
        )
        check(adapter)
        Adapters(((adapter, 1.0),)).check(built)
        return adapter

    def _steps(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Step]:
        try:
            return steps_of(self.rules, shapes, self.possible)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None

    def _is_here(self, step: Step, wanted: set[str]) -> bool:
        """Whether the model has what the step makes.

        Raises:
            CheckpointError: it never could, or of an embedding and a head that are tied
                only one is changed.
        """
        for target in step.targets:
            if target not in self.possible:
                raise CheckpointError(
                    f"{self.name}: {step.sources[0]!r:.120} is {target!r} here, which the "
                    "model cannot have; it is for another checkpoint"
                )
        tied, together = HEAD not in wanted, bool(self.config.get(TYING))
        if EMBEDDING in step.targets and tied and not together:
            raise CheckpointError(
                f"{self.name} changes the embedding and leaves the head as it was, which "
                f"the model ties to it; train it with {TYING}, or untie them in the "
                "checkpoint and convert it again"
            )
        if any(target in wanted for target in step.targets):
            return True
        # Trained together they are the same, and the embedding's are taken.
        if HEAD in step.targets and not together:
            raise CheckpointError(
                f"{self.name} changes the head by itself, which the model ties to its "
                "embedding; untie them in the checkpoint and convert it again"
            )
        # Blocks that nothing is read from, or what no rule keeps.
        self.dropped += step.sources
        return False

    def _take_pair(self, step: Step) -> None:
        """The matrices of the layers that the step's sources become."""
        modules = [x.removesuffix(".weight") for x in step.sources]
        pairs = [self.pairs[module] for module in modules]
        scales = {self._scale(module, self.pairs[module]) for module in modules}
        paths = [target.removesuffix(".weight") for target in step.targets]
        if (
            len(scales) != 1
            or paths == list(step.targets)
            or (len(pairs) > 1 and not step.gather)
            or any(pair.embedding and not step.plain for pair in pairs)
        ):
            raise self._impassable(step)
        for path, leaves in zip(paths, self._laid_out(step, pairs), strict=True):
            self.tensors |= {f"{path}.{leaf}": x for leaf, x in leaves.items()}
            self.scales[path] = next(iter(scales))
            self.names[f"{path}.weight"] = list(step.sources)

    def _laid_out(self, step: Step, pairs: list[Pair]) -> list[dict[str, mx.array]]:
        """The matrices of every target, as our layers have them."""
        pair = pairs[0]
        if step.gather:
            same = {x.A.shape + x.B.shape for x in pairs}
            expected = self.possible[step.targets[0]][0]
            if len(same) > 1 or len(pairs) != expected or not _passes(step, pair):
                raise self._impassable(step)
            a, b = (mx.stack([getattr(x, leaf) for x in pairs]) for leaf in "AB")
            return [{"lora_a": a, "lora_b": b}]
        rows, lengths = [pair.B], [] if pair.m is None else [pair.m]
        if not step.plain:
            if step.each or step.row is not None or not _passes(step, pair):
                raise self._impassable(step)
            rows = list(step.function(pair.B))
            # As columns, so that what parts rows parts them too.
            made = step.function(lengths[0][:, None]) if lengths else ()
            lengths = [x[:, 0] for x in made]
        laid = [{"lora_a": pair.A.T, "lora_b": B.T} for B in rows]
        if lengths:
            return [x | {"m": m} for x, m in zip(laid, lengths, strict=True)]
        return laid

    def _impassable(self, step: Step) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: the matrices of {step.sources[0]!r:.120} cannot become those "
            f"of {step.targets[0]!r:.120}, which is laid out in another way here; merge "
            "the adapter into its checkpoint with PEFT and convert that"
        )

    def _take_full(self, step: Step) -> None:
        """Weights that were trained in full, as conversion makes them."""
        held = {name: Held(x) for name, x in self.full.items()}
        try:
            made = dict(step.tensors(held.__getitem__))
        except ValueError:
            made = {}
        for target in step.targets:
            expected = self.possible[target]
            if target not in made or made[target].shape != expected:
                name = step.sources[0]
                raise CheckpointError(
                    f"{self.name}: {name!r:.120} of shape {list(held[name].shape)} does "
                    f"not make {target!r} of shape {list(expected)}; it is for another "
                    "checkpoint, or its vocabulary has grown"
                )
            self.tensors[target] = made[target].whole()
            self.names[target] = list(step.sources)

    def _scale(self, module: str, pair: Pair) -> float:
        """What the product of a module's matrices is multiplied by."""
        alpha, rank = self._number("lora_alpha", 8.0), pair.A.shape[0]
        if (own := self._pattern("alpha_pattern", module)) is not None:
            alpha = own
        expected = self._pattern("rank_pattern", module) or self._number("r", 8.0)
        if rank != expected:
            raise CheckpointError(
                f"{self.name}: {module!r:.120} has rank {rank}, its config says "
                f"{expected:g}; they do not belong together"
            )
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _number(self, field: str, default: float) -> float:
        value = self.config.get(field, default)
        if type(value) not in (int, float):
            raise ConfigError(f"{self.name}: {field} {value!r:.80} is not a number")
        return float(value)

    def _pattern(self, field: str, module: str) -> float | None:
        """A module's own number, where a key is its name or the end of that."""
        patterns = self.config.get(field) or {}
        if not isinstance(patterns, dict):
            raise ConfigError(f"{self.name}: {field} is not an object")
        for key, value in patterns.items():
            if not _NAME.fullmatch(key) or type(value) not in (int, float):
                raise ConfigError(
                    f"{self.name}: {field} {key!r:.80}: {value!r:.40} is not a module's "
                    "name and a number; regular expressions of others are not run"
                )
            end = key.removesuffix("$")
            whole = end.startswith("^")
            end = end.removeprefix("^")
            if module == end or (not whole and module.endswith(f".{end}")):
                return float(value)
        return None


def _passes(step: Step, pair: Pair) -> bool:
    """Whether what the step makes of B, times A, is what it makes of the product.

    Tried on whole numbers, so that products are exact.
    """
    keys = mx.random.split(mx.random.key(0), 2)
    N, D = pair.shape
    B = mx.random.randint(-9, 9, (N, 1), key=keys[0]).astype(mx.float32)
    A = mx.random.randint(-9, 9, (1, D), key=keys[1]).astype(mx.float32)
    try:
        rows, whole = step.function(B), step.function(B @ A)
    except (ValueError, CheckpointError):
        return False
    pairs = zip(rows, whole, strict=True)
    return all(
        part.ndim == 2 and part.shape[1] == 1 and mx.array_equal(part @ A, expected)
        for part, expected in pairs
    )


def _patterns(paths: Mapping[str, float]) -> tuple[str, ...]:
    """Regular expressions of these paths, of all layers alike one."""
    return tuple(
        sorted({re.sub(r"\d+", lambda _: r"\d+", re.escape(x)) for x in paths})
    )
