"""A saved Core ML package run with numpy, where Core ML is not.

What is run is what was saved: the program out of the package and its weights as they are
stored, packed ones decoded by coremltools. Every operation computes in float32 and its
result is rounded as the program says, which is how a GPU computes halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.coreml.operations import OPERATIONS
from mm1_mlx.coreml.tools import DecodeError, ct, load_mil_proto
from mm1_mlx.errors import CheckpointError, ConfigError

Array = NDArray[Any]
# Called with the name and value of every operation.
Watch = Callable[[str, Array], None]
DTYPES = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}
# What the names of parts begin with, which name the place of an overflow.
PARTS = ("vision", "connector")


class Interpreter:
    """Results by name of a package's inputs by name.

    Args:
        package: its place.
        function: which of its functions; the only one, or the default one, if None.

    Raises:
        CheckpointError: there is no such package or function.
    """

    def __init__(self, package: Path, function: str | None = None) -> None:
        self.spec = read_spec(package)
        folder = str(package / "Data" / "com.apple.CoreML" / "weights")
        chained = self.spec.WhichOneof("Type") == "pipeline"
        models = self.spec.pipeline.models if chained else [self.spec]
        name = function or self.spec.description.defaultFunctionName or "main"
        self._functions = []
        for model in models:
            program = load_mil_proto(
                model.mlProgram, model.specificationVersion, folder
            )
            if name not in program.functions:
                raise CheckpointError(
                    f"{package} has no function {name!r}, it has "
                    f"{sorted(program.functions)}"
                )
            self._functions.append(program.functions[name])

    def __call__(
        self, inputs: Mapping[str, Array], watch: Watch = lambda *_: None
    ) -> dict[str, Array]:
        """The package's results; ``watch`` sees every operation's on the way.

        Raises:
            ConfigError: a number is beyond half precision; names the layer.
        """
        values: dict[str, Array] = dict(inputs)
        for function in self._functions:
            values = _run(function, values, watch)
        return values


def read_spec(package: Path) -> Any:
    """What a package says of itself and its program, without its weights.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if not (package / "Manifest.json").is_file():
        raise CheckpointError(f"{str(package)!r} is no Core ML package; check its name")
    try:
        return ct.utils.load_spec(str(package))
    # Of the program's parser, and of the library that reads packages.
    except (DecodeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{str(package)!r} is damaged ({reason}); export it again"
        ) from None


def _run(function: Any, inputs: Mapping[str, Array], watch: Watch) -> dict[str, Array]:
    """The results of a program's function by name."""
    values = dict(inputs)
    outputs = {output.name for output in function.outputs}
    last = {
        argument.name: number
        for number, operation in enumerate(function.operations)
        for argument in _arguments(operation)
    }
    part = "the input"
    for number, operation in enumerate(function.operations):
        kind = operation.op_type
        if kind == "const":
            continue
        if kind.startswith("constexpr_"):
            # By coremltools: this package did not decode what it encoded.
            results = [operation.materialized_val_inference()]
        else:
            results = _compute(operation, values)
        if operation.name.startswith(PARTS):
            part = operation.name
        for output, result in zip(operation.outputs, results, strict=True):
            values[output.name] = _rounded(output, result, part)
            watch(output.name, values[output.name])
        for argument in _arguments(operation):
            if last[argument.name] == number and argument.name not in outputs:
                values.pop(argument.name, None)
    return {name: values[name] for name in outputs}


def _arguments(operation: Any) -> list[Any]:
    """An operation's arguments that are values, lists of them opened."""
    found: list[Any] = []
    for value in operation.inputs.values():
        found += value if isinstance(value, list | tuple) else [value]
    return [value for value in found if value is not None]


def _compute(operation: Any, values: Mapping[str, Array]) -> list[Array]:
    def value(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [value(x) for x in argument]
        if argument.name in values:
            return values[argument.name]
        # numpy takes no scalar of its own for a flag or an axis.
        held = argument.val
        return held.item() if isinstance(held, np.bool_ | np.integer) else held

    given = {k: value(v) for k, v in operation.inputs.items() if v is not None}
    result = OPERATIONS[operation.op_type](**given)
    return list(result) if isinstance(result, list | tuple) else [result]


def _rounded(output: Any, result: Any, part: str) -> Array:
    """A result in the precision that the program gives it."""
    wide = np.asarray(result)
    kind = DTYPES[ct.converters.mil.mil.types.builtin_to_string(output.dtype)]
    if kind is np.float16:
        largest = float(np.abs(wide).max(initial=0))
        # 65,520 and more round to infinity.
        if largest >= 65520:
            raise ConfigError(
                f"{output.name} (at {part}) reaches {largest:,.0f}, beyond half "
                "precision's 65,504; export with --precision fp32"
            )
    return wide.astype(kind, copy=False)
