"""``mx.fast.metal_kernel`` on a CPU: the same call, the same text, every access watched.

What runs is the text that mlx itself generates: the call is traced with
``mx.export_function``, which records a custom kernel on machines without Metal too.
README.md says what is checked and what is not.
"""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from msl_build import MSLError, build
from msl_text import entry, lint, parameters, to_cpp

# Threads in ascending, descending and random order: results must not depend on it.
ALL_ORDERS = (0, 1, 2)

NUMPY = {
    mx.bfloat16: np.uint16,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.int32: np.int32,
    mx.uint32: np.uint32,
}


@dataclass
class Buffer:
    """What a kernel is given, or (``data`` None) writes ``nbytes`` of."""

    name: str
    data: bytes | None = None
    nbytes: int = 0


class CPUFactory:
    """Makes kernels that run on the CPU, and keeps what their last calls touched.

    Args:
        orders: of threads, one run each; all must give the same bytes.
        noise: ulp of error that ``fast::`` functions get, times 4.
        edit: changes a kernel's text before it is built: a planted defect.
    """

    def __init__(self, orders=ALL_ORDERS, noise=0, edit=lambda _name, text: text):
        self.orders = orders
        self.noise = noise
        self.edit = edit
        self.calls = []

    def __call__(self, *, name, input_names, output_names, source):
        traced = mx.fast.metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=self.edit(name, source),
        )

        def call(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            options = {
                "template": template,
                "grid": grid,
                "threadgroup": threadgroup,
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
            }
            kernel, text = generated(traced, inputs, options)
            if bad := lint(text):
                raise MSLError(f"{name}: " + "; ".join(bad))
            buffers = [
                Buffer(n, to_bytes(x)) for n, x in zip(input_names, inputs, strict=True)
            ]
            buffers += [
                Buffer(n, nbytes=int(np.prod(shape)) * dtype.size)
                for n, shape, dtype in zip(
                    output_names, output_shapes, output_dtypes, strict=True
                )
            ]
            written, counts = self._run(name, kernel, text, buffers, grid, threadgroup)
            self.calls.append((name, counts))
            return [
                from_bytes(written[n], shape, dtype)
                for n, shape, dtype in zip(
                    output_names, output_shapes, output_dtypes, strict=True
                )
            ]

        return call

    def _run(self, name, kernel, text, buffers, grid, threadgroup):
        instance = re.search(
            r"\ntemplate \[\[host_name\(.*?decltype\("
            + re.escape(kernel)
            + r"(<.*?>)\)",
            text,
            re.DOTALL,
        )
        arguments, text = instance[1], text[: instance.start()]
        found = parameters(text, kernel)
        by_name = {buffer.name: buffer for buffer in buffers}
        ordered = [by_name[p.name] for p in found if p.attribute.startswith("buffer")]
        program = build(
            f'#include "msl_shim.h"\n#line 1 "{name}.metal"\n{to_cpp(text)}'
            f'\n#line 1 "entry"\n{entry(found, kernel, arguments)}'
        )
        written, counts = None, None
        for order in self.orders:
            now, counts = launch(
                program, ordered, grid, threadgroup, order=order, noise=self.noise
            )
            if written is not None and not self.noise and now != written:
                raise MSLError(f"{name}: the result depends on the order of threads")
            written = written or now
        for buffer in buffers:
            missed = counts["buffers"][buffer.name]["never_written"]
            if buffer.data is None and missed:
                raise MSLError(f"{name}: {missed} bytes of {buffer.name} never written")
        return written, counts


def generated(traced, inputs, options):
    """The name and the text of the kernel that mlx would compile for a call."""
    seen = []

    def watch(node):
        if node["type"] == "primitive" and node["name"] == "CustomKernel":
            seen.append(node["arguments"])

    mx.export_function(watch, lambda *a: traced(inputs=list(a), **options), *inputs)
    return seen[0][0], seen[0][1]


def run_text(
    text, kernel, arguments, buffers, groups, threadgroup, *, prologue="", orders=(0, 1)
):
    """What a whole kernel, such as one of mlx's own, writes; ``groups`` threadgroups."""
    found = parameters(text, kernel)
    ordered = [
        buffers.get(i, Buffer(f"unused{i}", b"\0" * 16))
        for i in range(max(buffers) + 1)
    ]
    program = build(
        f'#include "msl_shim.h"\n#line 1 "raw.metal"\n{to_cpp(text)}'
        f'\n#line 1 "entry"\n{entry(found, kernel, arguments, prologue)}'
    )
    grid = [g * t for g, t in zip(groups, threadgroup, strict=True)]
    results = [
        launch(program, ordered, grid, threadgroup, order=order)[0] for order in orders
    ]
    if any(result != results[0] for result in results):
        raise MSLError(f"{kernel}: the result depends on the order of threads")
    return results[0]


def launch(program, buffers, grid, threadgroup, *, order=0, noise=0):
    """The bytes of every output, and counts of what was touched."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "grid {} {} {}".format(*grid),
            "group {} {} {}".format(*threadgroup),
            f"sched {order}",
            f"fastulp {noise}",
        ]
        paths = [Path(folder) / f"{i}.bin" for i in range(len(buffers))]
        for buffer, path in zip(buffers, paths, strict=True):
            if buffer.data is not None:
                path.write_bytes(buffer.data)
            kind = "out" if buffer.data is None else "in"
            size = buffer.nbytes if buffer.data is None else len(buffer.data)
            lines.append(f"buf {buffer.name} {kind} {path} {size} 0")
        job = Path(folder) / "job"
        job.write_text("\n".join(lines) + "\n")
        done = subprocess.run([program, job], capture_output=True, text=True)
        errors = [x for x in done.stdout.splitlines() if x.startswith("ERROR")]
        if done.returncode or errors:
            said = "\n".join(errors) or f"exit {done.returncode} {done.stderr}"
            raise MSLError(_with_lines(program, said))
        counts = json.loads(done.stdout.split("STAT ", 1)[1])
        written = {
            buffer.name: path.read_bytes()
            for buffer, path in zip(buffers, paths, strict=True)
            if buffer.data is None
        }
    return written, counts


def _with_lines(program, text):
    """Addresses as lines of the kernel, where binutils are installed."""
    if not shutil.which("addr2line"):
        return text

    def line(m):
        address = f"{int(m[1], 16) - 1:x}"
        found = subprocess.run(
            ["addr2line", "-e", program, address], capture_output=True, text=True
        )
        return "at " + found.stdout.strip().rpartition("/")[2]

    return re.sub(r"pc=0x([0-9a-f]+)", line, text)


def to_bytes(x):
    """An array's numbers, row after row."""
    x = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return np.ascontiguousarray(np.array(x)).tobytes()


def from_bytes(raw, shape, dtype):
    """The array of such numbers."""
    x = mx.array(np.frombuffer(raw, dtype=NUMPY[dtype]).reshape(shape))
    return x.view(mx.bfloat16) if dtype == mx.bfloat16 else x
