"""Cases of attention: every kernel that can be compiled, and every pair of values."""

import itertools
from dataclasses import dataclass

import mlx.core as mx
from attention_runs import exact, make_run, numbers

from mm1_mlx.kernels import metal

# What a kernel is compiled for comes first: every combination of it is a case.
COMPILED = {
    "packing": [(0, 0), *itertools.product((4, 8), (32, 64, 128))],
    "dtype": [mx.float16, mx.bfloat16, mx.float32],
    "D": [64, 128],
}
VALUES = COMPILED | {
    "G": [1, 4, 8],
    "T": [1, 2, 3, 8],
    "keys": [1, 2, 33, 128, 301],
    "spare": [0, 19],
    "starts": ["none", "ragged", "one key", "no key"],
    "prefix": [0, 1, 41],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Queries over a run of their own, behind a prefix that a batch shares."""

    packing: tuple[int, int]  # bits and numbers of a group; zeros where plain
    dtype: mx.Dtype
    D: int
    G: int
    T: int
    keys: int
    spare: int = 0  # places behind the keys
    starts: str = "none"
    prefix: int = 0  # its keys
    chunk: int | None = None

    def __str__(self):
        bits, group = self.packing
        dtype = str(self.dtype).removeprefix("mlx.core.")
        kind = f"{bits}b{group}" if bits else "plain"
        shape = f"D{self.D}-G{self.G}-T{self.T}-{self.prefix}+{self.keys}"
        return f"{kind}-{dtype}-{shape}-{self.starts.replace(' ', '_')}"

    @property
    def num_kv_heads(self):
        return 2 if self.G < 8 else 1

    @property
    def firsts(self):
        """Every row's first key that counts; None where all of the only row's do."""
        return {
            "none": None,
            "ragged": [0, self.keys // 3],
            "one key": [self.keys - 1, 0],
            "no key": [self.keys, 0, self.keys // 2],
        }[self.starts]

    @property
    def side_bytes(self):
        """Of a key, and of its scales."""
        bits, group = self.packing
        if not bits:
            return self.D * self.dtype.size, 0
        return self.D * bits // 8, self.D // group * self.dtype.size

    def attend(self, factory):
        """The kernels' attention, and float64's."""
        B = len(self.firsts or [0])
        bits, group = self.packing
        kind = {"dtype": self.dtype, "bits": bits, "group": group}
        own = make_run(
            *(B, self.num_kv_heads, self.keys, self.D),
            room=self.keys + self.spare,
            starts=self.firsts,
            seed=5,
            **kind,
        )
        runs = [own]
        if self.prefix:
            room = self.prefix + self.spare
            shape = (1, self.num_kv_heads, self.prefix, self.D)
            runs.insert(0, make_run(*shape, room=room, **kind))
        q = numbers((B, self.num_kv_heads * self.G, self.T, self.D), self.dtype, 0)
        scale = self.D**-0.5
        states = [
            metal.partial(
                q,
                run,
                scale=scale,
                causal=run is own,
                factory=factory,
                chunk=self.chunk,
            )
            for run in runs
        ]
        out = metal.merge(states, q, factory=factory)
        return out, exact(q, runs, scale, causal=True)


def is_possible(fields):
    """Whether mlx packs so: a group is no longer than a head."""
    return fields.get("packing", (0, 0))[1] <= fields.get("D", 128)


def wanted():
    """What some case must hold, as sets of named values, in a fixed order."""
    for a, b in itertools.combinations(VALUES, 2):
        for x, y in itertools.product(VALUES[a], VALUES[b]):
            if is_possible({a: x, b: y}):
                yield frozenset({(a, x), (b, y)})
    # A threadgroup of 1, 2, 4 and 8 rows is compiled each by itself.
    for packing, T in itertools.product([(0, 0), (4, 64), (8, 64)], VALUES["T"]):
        yield frozenset({("packing", packing), ("G", 1), ("T", T)})


def cover():
    """Cases that hold all that is wanted, few because each takes the best value next."""
    missing = dict.fromkeys(wanted())

    def met(fields):
        return [some for some in missing if some <= fields.items()]

    def fill(fields):
        for name in VALUES:
            if name not in fields:
                tried = [fields | {name: value} for value in VALUES[name]]
                fields = max(filter(is_possible, tried), key=lambda x: len(met(x)))
        for some in met(fields):
            del missing[some]
        return Case(**fields)

    compiled = (
        dict(zip(COMPILED, values, strict=True))
        for values in itertools.product(*COMPILED.values())
    )
    cases = [fill(fields) for fields in compiled if is_possible(fields)]
    while missing:
        cases.append(fill(dict(next(iter(missing)))))
    return cases


CASES = cover()
