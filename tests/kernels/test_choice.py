"""The kernels run only where they agree, and only where they were seen to be faster."""

import itertools
import re

import mlx.core as mx
import pytest
from metal_cpu import CPUFactory

from mm1_mlx.errors import ConfigError
from mm1_mlx.files import read_json
from mm1_mlx.kernels import choice, kernel_report, metal, plain, report
from mm1_mlx.kernels.choice import Kernels, Variant
from mm1_mlx.kernels.run import Run

PACKED = Variant(8, 64, mx.float32, 64)
SHARED = Variant(0, 0, mx.float16, 64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What is timed is timed by a made-up clock, so it may be small."""
    for name, value in [
        ("TIMED_STEPS", ((40, 1), (80, 1), (40, 3))),
        ("TIMED_HEADS", 2),
        ("TIMED_KV_HEADS", 1),
        ("TIMED_BATCH", 2),
        ("TIMED_SUFFIX", 8),
        ("TIMED_CALLS", 3),
    ]:
        monkeypatch.setattr(choice, name, value)


def right(*, name, **_):
    """A factory whose kernels compute what they should, in plain operations."""

    def partial(*, inputs, template, output_shapes, output_dtypes, **_):  # noqa: ARG001
        q, k, ks, kb, values, vs, vb, starts, sizes, scale = inputs
        how = dict(template)
        bits, group = how["BITS"], how["GS"]
        B, H, rows, blocks, D = output_shapes[0]
        sides = ((k, ks, kb), (values, vs, vb)) if bits else (k, values)
        run = Run(*sides, sizes[6].item(), starts, bits, group)
        T = sizes[2].item()
        q = q.reshape(B, H * rows // T, T, D)
        state = plain.state(q, run, scale=scale.item(), mask="causal")
        # All in the first part; the others saw nothing.
        none = [(0, 0)] * 3 + [(0, blocks - 1)]
        return [
            mx.pad(state.o, [*none, (0, 0)]),
            mx.pad(state.m, none, constant_values=plain.NEVER),
            mx.pad(state.l, none),
        ]

    def merge(*, inputs, output_shapes, output_dtypes, **_):
        *state, _ = inputs
        like = mx.zeros(output_shapes[0], output_dtypes[0])
        return [plain.merge([plain.State(*state)], like)]

    return partial if name.endswith(metal.PARTIAL) else merge


def clock(kernels, alternative, unpacked=4):
    """Seconds that pass between two looks: those of each call in turn."""
    steps = itertools.cycle([kernels, 0, alternative, 0, unpacked, 0])
    total = [0.0]

    def look():
        now = total[0]
        total[0] += next(steps)
        return now

    return look


def zeros(**_):
    """A factory whose kernels write zeros."""

    def call(*, output_shapes, output_dtypes, **_):
        shapes = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    return call


def nans(**_):
    def call(*, output_shapes, output_dtypes, **_):
        shapes = zip(output_shapes, output_dtypes, strict=True)
        return [mx.full(shape, float("nan"), dtype) for shape, dtype in shapes]

    return call


def broken(**_):
    def call(**_):
        raise RuntimeError("[metal::Device] Unable to build metal library\nline 3")

    return call


@pytest.mark.parametrize("variant", [PACKED, SHARED], ids=["packed", "shared"])
@pytest.mark.parametrize(("seconds", "use"), [((1, 2), True), ((2, 1), False)])
def test_right_kernels_are_used_where_faster(variant, seconds, use, tmp_path):
    kernels = Kernels("M9", right, tmp_path / "k.json", clock=clock(*seconds))
    verdict = kernels.verdict(variant)
    assert (verdict.use, verdict.seconds, verdict.plain_seconds) == (use, *seconds)
    assert verdict.error <= choice.TOLERANCES[variant.dtype]


def test_a_measurement_is_kept_per_device_and_text(tmp_path, monkeypatch):
    store = tmp_path / "new" / "k.json"
    assert Kernels("M9", right, store, clock=clock(1, 2)).use(PACKED)
    never = pytest.fail
    assert Kernels("M9", right, store, clock=never).use(PACKED)
    # Another device, or another kernel text, is measured anew.
    assert not Kernels("M1", right, store, clock=clock(2, 1)).use(PACKED)
    monkeypatch.setattr(metal, "digest", lambda: "changed")
    assert not Kernels("M9", right, store, clock=clock(2, 1)).use(PACKED)
    assert len(read_json(store)) == 3


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"a": 1}', '{"a": {"b": [0, "x"]}}', "\xff"]
)
def test_a_damaged_file_is_measured_again(damage, tmp_path):
    store = tmp_path / "k.json"
    store.write_text(damage, encoding="latin-1")
    assert Kernels("M9", right, store, clock=clock(1, 2)).use(PACKED)
    assert Kernels("M9", right, store, clock=pytest.fail).use(PACKED)


def test_no_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = tmp_path / "file" / "k.json"
    assert Kernels("M9", right, store, clock=clock(1, 2)).use(PACKED)


def test_on_skips_the_measurement_and_not_the_check(tmp_path):
    def kernels(factory):
        return Kernels(
            "M9", factory, tmp_path / "k.json", timed=False, clock=pytest.fail
        )

    assert kernels(right).use(PACKED)
    assert not kernels(zeros).use(PACKED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (zeros, "differs from plain operations by 1.0e"),
        (nans, "differs from plain operations by inf"),
        (broken, "does not run: .*Unable to build metal library$"),
    ],
)
def test_wrong_kernels_are_never_used_and_the_reason_is_known(
    factory, reason, tmp_path
):
    kernels = Kernels("M9", factory, tmp_path / "k.json", clock=pytest.fail)
    verdict = kernels.verdict(PACKED)
    assert not verdict.use
    assert re.match(reason, verdict.reason)


@pytest.mark.parametrize("dtype", metal.DTYPES)
def test_half_precisions_may_differ_in_the_last_bit_only(dtype, tmp_path):
    variant = Variant(8, 64, dtype, 64)

    def off(by):
        def factory(*, name, **_):
            made = right(name=name)
            if name.endswith(metal.PARTIAL):
                return made
            return lambda **call: [x * (1 + by) for x in made(**call)]

        return Kernels("M9", factory, tmp_path / "k.json", timed=False)

    bit = max(mx.finfo(dtype).eps, 5e-6)
    assert off(0).use(variant)
    assert choice.TOLERANCES[dtype] < 2.2 * bit
    assert not off(3 * bit).use(variant)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
@pytest.mark.parametrize("variant", [PACKED, SHARED], ids=["packed", "shared"])
def test_the_check_passes_the_kernels_themselves(variant, tmp_path):
    factory = CPUFactory(orders=(0,))
    assert Kernels("M9", factory, tmp_path / "k.json", timed=False).use(variant)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("% T_q + 1)", "% T_q)"),
        ("max(int(starts[b]), block * chunk)", "block * chunk"),
        ("o += weight *", "o +="),
    ],
)
def test_the_check_finds_defects(old, new, tmp_path):
    def edit(_, text):
        return text.replace(old, new, 1)

    factory = CPUFactory(orders=(0,), edit=edit)
    kernels = Kernels("M9", factory, tmp_path / "k.json", timed=False)
    assert not kernels.use(PACKED)


def test_the_check_leaves_the_users_random_numbers_alone(tmp_path):
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    Kernels("M9", zeros, tmp_path / "k.json").use(PACKED)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_the_switch(monkeypatch):
    choice._of_this_device.cache_clear()
    monkeypatch.setattr(choice, "has_metal", lambda: True)
    for value, timed in [("", True), ("on", False)]:
        monkeypatch.setenv(choice.SWITCH, value)
        assert choice.current()._timed is timed
    monkeypatch.setenv(choice.SWITCH, "off")
    assert choice.current() is None
    monkeypatch.setenv(choice.SWITCH, "yes")
    with pytest.raises(ConfigError, match="MM1_KERNELS='yes' is not known; set it to"):
        choice.current()
    choice._of_this_device.cache_clear()


def test_there_is_no_metal_here():
    assert mx.metal.is_available() or choice.current() is None


def test_the_report_says_what_runs_and_why(monkeypatch, tmp_path):
    rows = kernel_report()
    assert len(rows) == 6
    if not mx.metal.is_available():
        assert {row.runs for row in rows} == {"plain operations: no Metal here"}
    monkeypatch.setenv(choice.SWITCH, "off")
    assert {row.runs for row in kernel_report()} == {
        "plain operations: MM1_KERNELS=off"
    }
    kernels = Kernels("M9", zeros, tmp_path / "k.json")
    monkeypatch.setattr(report, "current", lambda: kernels)
    row = kernel_report()[0]
    assert (row.kernel, row.device) == ("8 bits in 64s, float16, head of 64", "M9")
    assert (row.check, row.chosen) == ("failed", False)
    assert row.runs.startswith("plain operations: differs from plain operations by")


def test_the_report_says_the_times(monkeypatch, tmp_path):
    kernels = Kernels("M9", right, tmp_path / "k.json", clock=clock(1, 2))
    monkeypatch.setattr(report, "current", lambda: kernels)
    row = kernel_report(mx.float32, head_dims=(64,))[0]
    assert (row.seconds, row.other_seconds, row.chosen) == (1, 2, True)
    assert row.unpacked_seconds == 4
    assert row.runs == (
        "the kernel: 2.00 times as fast as plain operations, 4.00 as mlx's over keys "
        "that are plain and each row's own"
    )
    assert row.check.startswith("agrees to ")


def test_kernels_that_lose_at_one_length_are_not_used(tmp_path):
    # Twice as fast at first, then half as fast, then twice as fast again.
    fast, slow = [1, 0, 2, 0, 4, 0], [2, 0, 1, 0, 4, 0]
    seconds = iter(fast * 3 + slow * 3 + fast * 3)
    total = [0.0]

    def look():
        now = total[0]
        total[0] += next(seconds)
        return now

    verdict = Kernels("M9", right, tmp_path / "k.json", clock=look).verdict(PACKED)
    assert (verdict.use, verdict.seconds, verdict.plain_seconds) == (False, 2, 1)


def test_what_plain_keys_would_take_decides_nothing(tmp_path):
    kernels = Kernels("M9", right, tmp_path / "k.json", clock=clock(2, 3, 1))
    verdict = kernels.verdict(PACKED)
    assert (verdict.use, verdict.unpacked_seconds) == (True, 1)


def test_the_report_names_heads_that_the_kernels_do_not_read(monkeypatch, tmp_path):
    kernels = Kernels("M9", pytest.fail, tmp_path / "k.json")
    monkeypatch.setattr(report, "current", lambda: kernels)
    rows = kernel_report(head_dims=(80, 96))
    assert {row.runs for row in rows} == {
        "plain operations: the kernels read heads of 64 and 128"
    }


def test_kernels_can_be_tried_while_mlx_traces(tmp_path):
    kernels = Kernels("M9", right, tmp_path / "k.json", clock=clock(1, 2))
    used = []

    def traced(x):
        used.append(kernels.use(PACKED))
        return x

    mx.compile(traced)(mx.zeros(1))
    assert used == [True]
