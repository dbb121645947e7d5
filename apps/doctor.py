"""``mm1 doctor``: this machine, the libraries, and whether an answer comes out."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time

from .common import AsJson, human_bytes, print_json

PACKAGES = (
    "mm1-mlx",
    "mlx",
    "mlx-lm",
    "transformers",
    "numpy",
    "pillow",
    "safetensors",
)


def doctor(as_json: AsJson = False) -> None:
    """Check the machine, the versions and the embedded model."""
    from mm1_mlx.blas import preload_blas

    facts = {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **_versions(),
        **_device(preload_blas()),
        **_kernels(),
        "mm1-tiny": _self_test(),
    }
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def _device(blas: str | None) -> dict[str, str]:
    import mlx.core as mx

    from mm1_mlx.checkpoint import device_dtypes

    info = mx.device_info()
    facts = {"device": str(info.get("device_name", mx.default_device()))}
    if limit := info.get("max_recommended_working_set_size"):
        facts["GPU memory"] = f"{human_bytes(float(limit))} recommended at most"
    kinds = [str(kind).removeprefix("mlx.core.") for kind in device_dtypes()]
    facts["weights"] = f"in {' or '.join(kinds)}, stored ones in another type are cast"
    if sys.platform.startswith("linux"):
        facts["BLAS"] = blas or (
            "reference, 50 times slower than OpenBLAS; install it: "
            "apt install libopenblas0-pthread"
        )
        facts["heap"] = _heap()
        facts["C++ compiler"] = shutil.which("g++") or (
            "none; mlx compiles some CPU kernels and needs it: apt install g++"
        )
    return facts


def _heap() -> str:
    """What becomes of freed memory, in words."""
    from mm1_mlx.blas import HEAP_VARIABLE, heap_keeps

    if heap_keeps():
        return (
            f"keeps freed memory for the next array ({HEAP_VARIABLE}=off: it does not)"
        )
    if os.environ.get(HEAP_VARIABLE) == "off":
        return f"as the system has it ({HEAP_VARIABLE}=off)"
    return "as the system has it"


def _kernels() -> dict[str, str]:
    """What attends over packed keys and shared prefixes, and why."""
    from mm1_mlx.checkpoint import device_dtypes
    from mm1_mlx.kernels import kernel_report

    rows = kernel_report(device_dtypes()[0])
    if len({row.runs for row in rows}) == 1:
        return {"kernels": rows[0].runs}
    return {f"kernel: {row.kernel}": row.runs for row in rows}


def _self_test() -> str:
    from mm1_mlx.errors import MM1Error
    from mm1_mlx.runtime import TINY, generate, load

    start = time.perf_counter()
    try:
        with load(TINY) as runtime:
            picture = TINY / "red-star.png"
            answer = generate(runtime, "What colour is the star?", [picture])
    except MM1Error as error:
        return f"does not answer: {error}"
    seconds = time.perf_counter() - start
    return f"answers {answer.text.strip()!r} about a red star, {seconds:.1f} s in all"
