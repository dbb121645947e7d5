"""Every source tensor has one rule, every tensor of the model one source."""

import mlx.core as mx
import pytest
from sources import Held, whole

from mm1_mlx.convert.plan import Shapes, plan
from mm1_mlx.convert.rules import (
    Rules,
    add,
    conv,
    divide,
    each,
    join,
    split,
    squeeze,
    stack,
    transpose,
    unstack,
)
from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import ALL


def apply(
    rules: Rules, tensors: dict[str, mx.array], wanted: Shapes
) -> dict[str, mx.array]:
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    steps = plan(rules, found, wanted, wanted).steps
    held = {name: Held(x) for name, x in tensors.items()}
    made = (pair for step in steps for pair in step.tensors(held.__getitem__))
    return {name: whole(tensor) for name, tensor in made}


def test_conv_moves_channels_last() -> None:
    x = mx.random.normal((2, 3, 4, 5))
    made = apply({"a": conv("b")}, {"a": x}, {"b": (2, 4, 5, 3)})
    assert mx.array_equal(made["b"], x.moveaxis(1, -1))


def test_conv_leaves_what_has_its_channels_last_already() -> None:
    x = mx.random.normal((2, 4, 5, 3))
    made = apply({"a": conv("b")}, {"a": x}, {"b": (2, 4, 5, 3)})
    assert mx.array_equal(made["b"], x)


def test_transpose_turns_a_matrix() -> None:
    x = mx.random.normal((2, 3))
    assert mx.array_equal(
        apply({"a": transpose("b")}, {"a": x}, {"b": (3, 2)})["b"], x.T
    )


def test_squeeze_leaves_out_the_named_axes() -> None:
    x = mx.random.normal((2, 1, 1, 1))
    made = apply({"a": squeeze("b", 2, 3)}, {"a": x}, {"b": (2, 1)})
    assert mx.array_equal(made["b"], x[:, :, 0, 0])


def test_split_fills_several_targets_in_order() -> None:
    x = mx.random.normal((6, 2))
    wanted = dict.fromkeys("qkv", (2, 2))
    made = apply({"qkv": split("q", "k", "v")}, {"qkv": x}, wanted)
    assert mx.array_equal(mx.concatenate([made[name] for name in "qkv"]), x)


def test_split_cuts_along_another_axis() -> None:
    x = mx.random.normal((3, 4, 2))
    made = apply(
        {"x": split("a", "b", axis=1)}, {"x": x}, {"a": (3, 2, 2), "b": (3, 2, 2)}
    )
    assert mx.array_equal(mx.concatenate([made["a"], made["b"]], axis=1), x)


def test_divide_cuts_parts_as_long_as_their_targets_are() -> None:
    x = mx.random.normal((7, 2))
    wanted = {"q.0": (4, 2), "k.0": (1, 2), "v.0": (2, 2)}
    made = apply({"qkv.{}": divide("q.{}", "k.{}", "v.{}")}, {"qkv.0": x}, wanted)
    assert mx.array_equal(mx.concatenate([made[f"{name}.0"] for name in "qkv"]), x)


@pytest.mark.parametrize("length", [6, 8])
def test_a_fused_tensor_of_another_length_is_refused(length: int) -> None:
    wanted = {"q": (4, 2), "k": (1, 2), "v": (2, 2)}
    with pytest.raises(CheckpointError, match=rf"'qkv' has shape \[{length}, 2\]"):
        apply({"qkv": divide("q", "k", "v")}, {"qkv": mx.zeros((length, 2))}, wanted)


def test_add_adds_in_float32_and_keeps_the_precision() -> None:
    x = mx.array([0.25, -0.5, 0.001], mx.bfloat16)
    made = apply({"a": add("b", 1.0)}, {"a": x}, {"b": (3,)})["b"]
    assert made.dtype == mx.bfloat16
    assert mx.array_equal(made, (x.astype(mx.float32) + 1).astype(mx.bfloat16))


def test_unstack_gives_every_layer_its_own() -> None:
    x = mx.random.normal((3, 2, 5))
    wanted = {f"l.{i}.w": (5, 2) for i in range(3)}
    made = apply({"w": unstack(transpose("l.{}.w"))}, {"w": x}, wanted)
    assert all(mx.array_equal(made[f"l.{i}.w"], x[i].T) for i in range(3))


def test_unstack_divides_each_layer_by_its_own_targets() -> None:
    x = mx.random.normal((2, 3, 2))
    wanted = {"a.0": (1, 2), "b.0": (2, 2), "a.1": (2, 2), "b.1": (1, 2)}
    made = apply({"w": unstack(divide("a.{}", "b.{}"))}, {"w": x}, wanted)
    assert mx.array_equal(mx.concatenate([made["a.1"], made["b.1"]]), x[1])


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, r"1 tensors of the model have no source, e.g. \['l.1'\]"),
        (3, "'w' is 'l.2' here"),
    ],
)
def test_a_stack_of_another_depth_is_refused(count: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        apply(
            {"w": unstack("l.{}")},
            {"w": mx.zeros((count, 2))},
            {"l.0": (2,), "l.1": (2,)},
        )


def test_join_lays_first_rows_before_other_tensors() -> None:
    xs = {"a": mx.random.normal((5, 2)), "b": mx.random.normal((1, 2))}
    made = apply({"a": join("w", "b", rows=3)}, xs, {"w": (4, 2)})["w"]
    assert mx.array_equal(made, mx.concatenate([xs["a"][:3], xs["b"]]))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (5, 2)}, "'a' belongs with 'b', which is missing; the source is incom"),
        (
            {"a": (5, 2), "b": (2, 2)},
            r"'a' has shape \[5, 2\], which does not make 'w'",
        ),
        ({"b": (1, 2)}, r"1 tensors of the model have no source, e.g. \['w'\]"),
    ],
)
def test_what_cannot_be_joined_is_named(found: Shapes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan({"a": join("w", "b", rows=3)}, found, {"w": (4, 2)}, {})


def test_stack_gathers_by_the_last_number_in_its_order() -> None:
    experts = {f"l.3.e.{i}.w": mx.full((2,), i) for i in range(12)}
    made = apply({"l.{}.e.{}.w": stack("m.{}.w")}, experts, {"m.3.w": (12, 2)})
    assert made["m.3.w"][:, 0].tolist() == list(range(12))


def test_pieces_of_a_stack_of_several_shapes_are_refused() -> None:
    experts = {"e.0": mx.zeros((2, 3)), "e.1": mx.zeros((3, 2))}
    with pytest.raises(CheckpointError, match=r"'e.0' has shape \[2, 3\], which does"):
        apply({"e.{}": stack("w")}, experts, {"w": (2, 2, 3)})


def test_pieces_of_a_stack_of_several_types_are_refused() -> None:
    experts = {"e.0": mx.zeros(2), "e.1": mx.zeros(2, mx.float16)}
    message = "'e.1' holds mlx.core.float16, but 'e.0', .* mlx.core.float32; save both"
    with pytest.raises(CheckpointError, match=message):
        apply({"e.{}": stack("w")}, experts, {"w": (2, 2)})


def test_experts_that_are_one_tensor_are_made_one_by_one() -> None:
    x = mx.random.normal((3, 4, 2))
    wanted = dict.fromkeys("ab", (3, 2, 2))
    made = apply({"x": each(split("a", "b"))}, {"x": x}, wanted)
    assert mx.array_equal(mx.concatenate([made["a"], made["b"]], axis=1), x)


def test_a_stack_reads_one_piece_at_a_time() -> None:
    found = {f"e.{i}": (2,) for i in range(8)}
    read: list[str] = []

    def find(name: str) -> Held:
        held = Held(mx.full((2,), int(name[2:])))
        held.read = lambda _=None: read.append(name) or held.array  # type: ignore
        return held

    (step,) = plan({"e.{}": stack("w")}, found, {"w": (8, 2)}, {}).steps
    ((_, tensor),) = step.tensors(find)
    assert read == []
    for i, piece in enumerate(tensor.pieces()):
        assert piece.tolist() == [i, i]
        assert read == [f"e.{j}" for j in range(i + 1)]


def test_a_layer_of_a_stack_is_read_alone() -> None:
    x = mx.random.normal((3, 2, 5))
    rows: list[slice] = []
    held = Held(x)
    held.read = lambda part=ALL: rows.append(part) or x[part]  # type: ignore
    wanted = {f"l.{i}.w": (5, 2) for i in range(3)}
    steps = plan({"w": unstack(transpose("l.{}.w"))}, {"w": x.shape}, wanted, {}).steps
    for step in steps:
        for _, tensor in step.tensors(lambda _: held):
            whole(tensor)
    assert rows == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize("names", [("e.0", "e.2"), ("e.1", "e.2"), ("e.0", "e.00")])
def test_a_stack_that_lacks_a_piece_or_has_one_twice_is_refused(
    names: tuple[str, str],
) -> None:
    experts = {name: mx.zeros(2) for name in names}
    with pytest.raises(CheckpointError, match="'w' is made of tensors numbered"):
        apply({"e.{}": stack("w")}, experts, {"w": (2, 2)})


def test_numbers_may_count_from_one() -> None:
    made = apply({"b{}": "blocks.{-1}"}, {"b1": mx.zeros(2)}, {"blocks.0": (2,)})
    assert list(made) == ["blocks.0"]


def test_an_explicit_drop_is_reported() -> None:
    result = plan({"a": "x", "b.{}": None}, {"a": (1,), "b.7": (2,)}, {"x": (1,)}, {})
    assert result.dropped == ("b.7",)


def test_a_tensor_that_the_model_does_not_build_is_dropped() -> None:
    rules = {"l.{}": "m.{}"}
    found = {"l.0": (1,), "l.1": (1,)}
    result = plan(rules, found, {"m.0": (1,)}, {"m.0": (1,), "m.1": (1,)})
    assert result.dropped == ("l.1",)


@pytest.mark.parametrize(
    ("rules", "found", "message"),
    [
        (
            {"a": "x"},
            {"a": (1,), "b": (1,), "c": (1,), "d": (1,)},
            r"3 source tensors have no rule, e.g. \['b', 'c', 'd'\]",
        ),
        ({"a": "x", "{}": "x"}, {"a": (1,), "1": (1,)}, "'x' has two sources"),
        ({"a": "x"}, {}, r"1 tensors of the model have no source, e.g. \['x'\]"),
        ({"a": "x"}, {"a": (2,)}, r"'a' has shape \[2\], which does not make 'x' of"),
        (
            {"a": conv("x")},
            {"a": (1,)},
            r"'a' has shape \[1\], which does not make 'x'",
        ),
        ({"a": "y"}, {"a": (1,)}, "'a' is 'y' here, which config.json says the model"),
        # One name, two rules: neither is taken.
        ({"a.{}": "x", "a.1": "x"}, {"a.1": (1,)}, "1 source tensors have no rule"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    rules: Rules, found: Shapes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(rules, found, {"x": (1,)}, {"x": (1,)})


@pytest.mark.parametrize("number", ["9" * 5000, "\u0660", "1234567"])
def test_what_is_no_plain_number_is_no_layer(number: str) -> None:
    """Names come from somebody else's file."""
    with pytest.raises(CheckpointError, match="1 source tensors have no rule"):
        plan({"layers.{}": "x.{}"}, {f"layers.{number}": (1,)}, {"x.0": (1,)}, {})
