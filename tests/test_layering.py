"""Imports run one way: errors, config, layout, models, ... , runtime, apps."""

import ast
from pathlib import Path

import pytest

import mm1_mlx

ROOT = Path(__file__).parents[1]

# A module imports only from rows above its own; a package's modules from each other.
ROWS = [
    ["errors", "chips", "folders", "room", "sizes", "worker"],
    ["blas", "section", "files", "answer", "bias", "hold", "journal"],
    ["device", "hub", "kernels", "scores", "partial", "shard"],
    ["config", "pieces"],
    ["layout", "presets", "resize", "resolution", "templates", "work"],
    ["caches"],
    ["models", "tiling"],
    ["recipe"],
    ["budget"],
    ["limits"],
    ["image", "checkpoint"],
    ["tokenizer", "video", "writer", "original", "adapters"],
    ["messages", "grounding", "grammar", "spelling", "coreml"],
    ["regions"],
    ["prompt", "sampling", "shots", "transcript"],
    ["memory"],
    ["prefill"],
    ["speculate"],
    ["request"],
    ["engine"],
    ["runtime"],
    ["batch", "embed"],
    ["ticket"],
    ["likelihood", "captions", "pool"],
    ["train"],
    ["eval"],
    ["quantize"],
    ["bench", "fuse", "mlxfn"],
    ["convert"],
    ["apps"],
]
RANKS = {name: rank for rank, row in enumerate(ROWS) for name in row}
FOLDERS = {"mm1_mlx": "", "convert": "convert", "apps": "apps"}
HEAVY = {
    "mlx",
    "mlx_lm",
    "transformers",
    "tokenizers",
    "numpy",
    "PIL",
    "torch",
    "mm1_mlx",
}
# Costs nothing: a few classes.
LIGHT = {
    "mm1_mlx.answer",
    "mm1_mlx.errors",
    "mm1_mlx.sizes",
    "mm1_mlx.train.config",
    "mm1_mlx.train.stages",
}

# The package's own __init__ names everything, lazily.
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "mm1_mlx/__init__.py"
)
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
)


def part_of(path):
    """The row's name of a file: its module, or the package it belongs to."""
    folder, *rest = path.relative_to(ROOT).parts
    return FOLDERS[folder] or rest[0].removesuffix(".py")


def imports(tree):
    """(level, dotted name) of everything a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module in ("mm1_mlx", ""):
                yield from (
                    (node.level, f"{module}.{a.name}".strip(".")) for a in node.names
                )
            else:
                yield node.level, module


def core_imports(path):
    """The rows' names that a file imports, also by the public names of the package."""
    names = [name for level, name in imports(ast.parse(path.read_text())) if not level]
    parts = [name.split(".")[1] for name in names if name.startswith("mm1_mlx.")]
    return [mm1_mlx._HOMES.get(part, part) for part in parts if part != "__version__"]


@each_file
def test_no_import_runs_back(path):
    part = part_of(path)
    assert part in RANKS, f"give {part} a row"
    for imported in core_imports(path):
        assert RANKS[imported] < RANKS[part] or imported == part


@each_file
def test_relative_imports_stay_among_siblings(path):
    levels = {level for level, _ in imports(ast.parse(path.read_text()))}
    if path.relative_to(ROOT).parts[0] == "mm1_mlx":
        assert levels <= {0}
    else:
        # A format knows its siblings and what formats share, one folder up.
        depth = len(path.relative_to(ROOT).parts) - 1
        assert levels <= {0, *range(1, depth + 1)}
        # A package that is installed under another name finds itself relatively.
        assert part_of(path) not in core_imports(path)


class OutsideFunctions(ast.NodeTransformer):
    """What runs when a module is imported."""

    def visit_FunctionDef(self, node):  # noqa: ARG002
        return None

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def import_time_names(path):
    tree = OutsideFunctions().visit(ast.parse(path.read_text()))
    return {name for level, name in imports(tree) if not level}


@pytest.mark.parametrize(
    "path",
    [
        *sorted((ROOT / "apps").glob("*.py")),
        *sorted((ROOT / "apps/export").glob("*.py")),
        ROOT / "apps/chat/command.py",
    ],
    ids=lambda p: p.name,
)
def test_commands_import_what_they_run_inside_themselves(path):
    names = import_time_names(path) - LIGHT
    assert not {name for name in names if name.partition(".")[0] in HEAVY}


def test_the_core_knows_neither_converters_nor_commands():
    for path in (ROOT / "mm1_mlx").rglob("*.py"):
        assert not {"convert", "apps"} & set(core_imports(path))


def test_commands_meet_converters_in_functions_only():
    for path in (ROOT / "apps").rglob("*.py"):
        assert not any(n.startswith("mm1_mlx.convert") for n in import_time_names(path))
    for path in (ROOT / "convert").rglob("*.py"):
        assert "apps" not in core_imports(path)


def test_models_know_no_files_prompts_or_tokenizers():
    allowed = {
        "mlx",
        "mlx_lm",
        "numpy",
        "mm1_mlx",
        "functools",
        "math",
        "itertools",
        "collections",
        "typing",
    }
    for path in (ROOT / "mm1_mlx/models").glob("*.py"):
        names = {
            name.partition(".")[0] for _, name in imports(ast.parse(path.read_text()))
        }
        assert names <= allowed


def test_there_is_no_drawer_for_odds_and_ends():
    names = {path.stem for path in FILES}
    assert not names & {
        "utils",
        "util",
        "helpers",
        "base",
        "types",
        "constants",
        "misc",
    }
