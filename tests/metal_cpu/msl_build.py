"""C++ text of a kernel into a program that runs it and watches every access.

clang checks the address spaces, which are real ones then. The memory instrumentation
skips them, so they are dropped from the unoptimised IR before it is optimised and built
with -fsanitize=thread, whose hooks ``runtime.cpp`` implements; no sanitizer is linked.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
# Kept between runs; git does not see it.
PROGRAMS = HERE.parents[1] / "build/metal_cpu"

OLDEST_CLANG = 17  # arithmetic on __bf16
INCLUDE = ["-std=c++17", "-I", str(HERE / "include")]
WARNINGS = [
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-unused-value",
    "-Wno-c++11-narrowing",
    "-Wno-vla-cxx-extension",
    "-Wno-psabi",
    "-ferror-limit=6",
]
# The hooks see accesses of at most 16 bytes, so loops are not widened.
INSTRUMENTED = [
    "-O1",
    "-g",
    "-ffp-contract=fast",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=thread",
    "-fPIE",
]

# clang takes a C cast from one address space into another; Metal does not.
_CAST = re.compile(r"addrspacecast ptr addrspace\(\d\).*")


class MSLError(RuntimeError):
    """Text that does not compile, or a kernel that does what it must not."""


@functools.cache
def clang() -> list[str] | None:
    """How clang is called; None where there is none that is new enough."""
    for name in [*(f"clang++-{v}" for v in range(23, 16, -1)), "clang++"]:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
            if int(re.search(r"version (\d+)", said.stdout)[1]) >= OLDEST_CLANG:
                return [path]
    try:
        import ziglang
    except ImportError:
        return None
    # Zig would compile for the very CPU that it runs on.
    return [str(Path(ziglang.__file__).parent / "zig"), "c++", "-mcpu=baseline"]


def why_not() -> str | None:
    """Why kernels cannot be run on this CPU; None where they can."""
    if os.uname().sysname != "Linux":
        return "the kernels' text is run on a CPU on Linux; here -m metal runs it"
    if not shutil.which("g++"):
        return "needs g++"
    return None if clang() else "needs clang 17 or newer, or ziglang (the test extra)"


def build(text: str) -> Path:
    """The program of a kernel; the same text is built once."""
    shim = b"".join(p.read_bytes() for p in sorted((HERE / "include").iterdir()))
    shim += (HERE / "runtime.cpp").read_bytes() + repr((clang(), INSTRUMENTED)).encode()
    folder = PROGRAMS / hashlib.sha256(text.encode() + shim).hexdigest()[:24]
    program = folder / "run"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    # Several test runs may build the same at once.
    mine = str(folder / f"{os.getpid()}")
    source, ir, kernel = f"{mine}.cpp", f"{mine}.ll", f"{mine}.o"
    Path(source).write_text(text)
    options = [*INSTRUMENTED, *_vector_units()]
    front = ["-DMSL_STRICT_AS", "-fno-exceptions", "-Xclang", "-disable-llvm-passes"]
    front += ["-Xclang", "-ffloat16-excess-precision=none", "-emit-llvm", "-S"]
    _run([*clang(), *INCLUDE, *WARNINGS, *options, *front, source, "-o", ir])
    if cast := _CAST.search(Path(ir).read_text()):
        raise MSLError(f"compile failed: {cast[0]} casts between address spaces")
    flat = re.sub(r" addrspace\([123]\)", "", Path(ir).read_text())
    Path(ir).write_text(flat.replace("addrspacecast", "bitcast"))
    _run([*clang(), *options, "-Wno-override-module", "-c", ir, "-o", kernel])
    # Linked by g++: zig would first build a C++ library of its own, for a minute.
    _run(["g++", "-pie", kernel, str(_runtime(shim)), "-o", f"{mine}.run", "-lm"])
    Path(f"{mine}.run").replace(program)
    for left in (source, ir, kernel):
        Path(left).unlink()
    return program


def _vector_units() -> list[str]:
    return ["-mf16c", "-mfma"] if os.uname().machine == "x86_64" else []


def _runtime(shim: bytes) -> Path:
    built = PROGRAMS / f"{hashlib.sha256(shim).hexdigest()[:24]}.o"
    if not built.exists():
        mine = built.with_suffix(f".{os.getpid()}")
        options = ["-O2", "-g", "-fPIE", "-c", str(HERE / "runtime.cpp")]
        _run(["g++", *INCLUDE, *options, "-o", str(mine)])
        mine.replace(built)
    return built


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MSLError("compile failed:\n" + done.stderr[-6000:])
