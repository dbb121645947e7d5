"""Metal Shading Language text into C++ text that clang compiles for a CPU.

Only what clang cannot take is rewritten; line numbers stay. Beside it a lint of what
clang takes and Metal does not.
"""

import re
from dataclasses import dataclass

_THREADGROUP = re.compile(
    r"\bthreadgroup\s+([A-Za-z_][\w:]*(?:\s*<[^;{}()]*>)?)\s+([A-Za-z_]\w*)\s*"
    r"((?:\[[^\]]*\]\s*)*);"
)
_VECTOR = re.compile(r"\b((?:half|float|bfloat|u?int|u?short|u?char|u?long)[234])\s*\(")

BANNED = {
    r"\bdouble\b": "no double in MSL",
    r"\bstd::": "no std:: in MSL",
    r"\b(printf|malloc|free|memcpy|memset|assert)\s*\(": "no libc in MSL",
    r"\b(exp|log|sqrt|fabs|fma|max|min|pow|floor|ceil|rint|round|tanh|sin|cos)f\s*\(": (
        "C math name; use metal::"
    ),
    r"\b(new|delete|throw|try|catch|dynamic_cast|typeid|virtual|goto|asm"
    r"|__builtin_\w+|thread_local)\b": "not in MSL",
    r"\blong\s+(double|long)\b": "not in MSL",
    r"\[\s*[&=]?\s*\]\s*\(": "lambda: not in every MSL version",
    r"\b\d+\.\d*(?![\dfFhHeE.])(?!\w)": "double literal; add f or h",
    r"\bstatic\s+(?!constexpr|constant|const\b|inline|_?METAL)": "static variable",
}
MAX_BUFFERS = 31


def without_comments(text: str) -> str:
    """The text with as many lines, and no comments."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/",
        lambda m: "\n" * m[0].count("\n") or " ",
        text,
        flags=re.DOTALL,
    )


def to_cpp(text: str) -> str:
    """The text in the words of ``include/msl_shim.h``."""
    text = re.sub(r"\[\[\s*threadgroup\(\d+\)\s*\]\]", "", without_comments(text))
    # A hint to Apple's compiler; here it would double the time that clang takes.
    text = re.sub(r'_Pragma\("clang loop unroll\(full\)"\)', "", text)
    count = 0

    def allocate(m: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"MSL_TG({count}, {m[2]}, {m[3].strip()}, {m[1]});"

    text = _THREADGROUP.sub(allocate, text)
    return _VECTOR.sub(lambda m: f"msl_mk<{m[1]}>(", text)


def lint(text: str) -> list[str]:
    """What Metal would refuse, or does not have."""
    text = re.sub(r'"[^"\n]*"', '""', without_comments(text))
    found = [
        f"line {text[: m.start()].count(chr(10)) + 1}: {m[0]!r}: {why}"
        for pattern, why in BANNED.items()
        for m in re.finditer(pattern, text)
    ]
    buffers = len(re.findall(r"\[\[buffer\(", text))
    return found + ([f"{buffers} buffers"] if buffers > MAX_BUFFERS else [])


@dataclass
class Parameter:
    """One parameter of a kernel: ``attribute`` is buffer(0) or a place in the grid."""

    type: str
    name: str
    attribute: str


def parameters(text: str, kernel: str) -> list[Parameter]:
    """A kernel's parameters, in order."""
    start = re.search(r"\bvoid\s+" + re.escape(kernel) + r"\s*\(", text).end()
    depth, current, found = 0, "", []
    for letter in text[start:]:
        depth += {"<": 1, "(": 1, "[": 1, ">": -1, ")": -1, "]": -1}.get(letter, 0)
        if depth < 0 or (letter == "," and depth == 0):
            m = re.match(r"\s*(.*?)(\w+)\s*\[\[(.*)\]\]\s*$", current, re.DOTALL)
            if m:
                found.append(Parameter(" ".join(m[1].split()), m[2], m[3].strip()))
            current = ""
            if depth < 0:
                break
        else:
            current += letter
    return found


def entry(
    found: list[Parameter], kernel: str, arguments: str, prologue: str = ""
) -> str:
    """The C function by which the runtime calls a kernel for one thread."""
    passed = ",\n    ".join(map(_argument, found))
    return (
        f'extern "C" void msl_kernel_entry(void** b) {{\n{prologue}\n'
        "  const mslrt::Ctx& c = mslrt::ctx();\n"
        f"  {kernel}{arguments}(\n    {passed});\n}}\n"
    )


def _argument(p: Parameter) -> str:
    if m := re.match(r"buffer\((\d+)\)", p.attribute):
        place = f"b[{m[1]}]"
        if p.type.endswith("&"):
            return f"*({p.type[:-1]}*){place}"
        return f"({p.type}){place}"
    value = "c." + p.attribute.split(",")[0].strip()
    if p.type.endswith("3"):
        return f"msl_mk<{p.type}>({value}.x, {value}.y, {value}.z)"
    if p.type.endswith("2"):
        return f"msl_mk<{p.type}>({value}.x, {value}.y)"
    is_index = p.type in ("uint", "ushort")
    if is_index and not p.attribute.startswith("thread_position"):
        return value
    return f"{value}.x"
