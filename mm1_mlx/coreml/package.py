"""A model folder -> a Core ML package of its encoder and connector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.coreml.check import StageError, check, refuse_wrong
from mm1_mlx.coreml.describe import (
    Facts,
    describe,
    digest_of,
    function_name,
    made_by,
)
from mm1_mlx.coreml.place import check_place, written_beside
from mm1_mlx.coreml.program import IMAGE, TARGET, Plan, programs
from mm1_mlx.coreml.tools import ct
from mm1_mlx.coreml.weights import Weights
from mm1_mlx.errors import ConfigError
from mm1_mlx.image import ImageSource

Progress = Callable[[str, int, int], None]
# Where a package holds its program.
SPEC = Path("Data", "com.apple.CoreML", "model.mlmodel")


def export(
    path: Path,
    out: Path,
    plan: Plan,
    sizes: Sequence[int] = (),
    *,
    pictures: Sequence[ImageSource] = (),
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[Facts, dict[int, list[StageError]]]:
    """Write a model's encoder and connector as a package.

    Args:
        path: the model's folder.
        out: the package's place, a name that ends with ``.mlpackage``.
        plan: what the program computes, but for its size.
        sizes: sides of tiles in pixels, each a function of the package; by default the
            model's own alone.
        pictures: what package and model are compared by before it stands in its place.
        overwrite: whether a package that is there is replaced.
        progress: called with a task, how much is done and how much there is.

    Returns:
        What the package says of itself, and by the side of tiles the error of every
        stage, none without pictures.

    Raises:
        CheckpointError: the model or the place cannot be used.
        ConfigError: the model cannot be computed so, or a package in fp16 or fp32 is not
            what the model is.
        PromptError: a picture cannot be read.
    """
    check_place(out, overwrite=overwrite)
    weights = Weights(path)
    config = weights.config
    assert config.image is not None
    sizes = tuple(dict.fromkeys(sizes)) or (config.image.size,)
    if plan.ane and len(sizes) > 1:
        raise ConfigError(
            "a package in chunks for the Neural Engine holds one resolution; export "
            "each into a package of its own, or without --ane"
        )
    facts = Facts(
        digest=digest_of(path, config),
        sizes=sizes,
        precision=plan.precision,
        layout="bc1s" if plan.ane else "nlc",
        input="image" if plan.as_image else "tensor",
        compute_units="CPU_AND_NE" if plan.ane else "CPU_AND_GPU",
        made_by=made_by(),
    )
    with written_beside(out, overwrite=overwrite) as made:
        plans = [replace(plan, size=size) for size in sizes]
        if len(plans) == 1:
            _write(weights, plans[0], made, progress)
        else:
            own = config.image.size
            _write_functions(weights, plans, made, own, progress)
        spec = ct.utils.load_spec(str(made))
        describe(spec.description, path, config, facts)
        (made / SPEC).write_bytes(spec.SerializeToString())
        found = check(path, made, facts, pictures, progress) if pictures else {}
        refuse_wrong(plan.precision, found)
    return facts, found


def _write(weights: Weights, plan: Plan, out: Path, progress: Progress) -> None:
    """A package of one function; of several programs it is a pipeline."""
    places = []
    for number, program in enumerate(programs(weights, plan, progress)):
        model = _convert(program, plan)
        place = out.with_name(f"part-{number}.mlpackage")
        model.save(str(place))
        places.append(place)
        del model, program
    if len(places) == 1:
        places[0].rename(out)
        return
    parts = [ct.models.MLModel(str(x), skip_model_load=True) for x in places]
    ct.utils.make_pipeline(*parts).save(str(out))


def _write_functions(
    weights: Weights, plans: Sequence[Plan], out: Path, own: int, progress: Progress
) -> None:
    """A package of a function for each size, which share their weights."""
    several = ct.utils.MultiFunctionDescriptor()
    for plan in plans:
        name = function_name(plan.size)
        place = out.with_name(f"{name}.mlpackage")
        _write(weights, plan, place, progress)
        several.add_function(str(place), "main", name)
    sizes = [plan.size for plan in plans]
    default = own if own in sizes else sizes[0]
    several.default_function_name = function_name(default)
    ct.utils.save_multifunction(several, str(out))


def _convert(program: Any, plan: Plan) -> Any:
    """The program as a model, its weights in a temporary file."""
    (name,) = program.functions["main"].inputs
    inputs = None
    if name == IMAGE and plan.as_image:
        shape = (1, 3, plan.size, plan.size)
        inputs = [ct.ImageType(IMAGE, shape, scale=1 / 255, color_layout="RGB")]
    return ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        inputs=inputs,
        minimum_deployment_target=TARGET,
        # The program says itself what is computed in half precision.
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.CLEANUP,
        skip_model_load=True,
    )
