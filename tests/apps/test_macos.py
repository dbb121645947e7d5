"""What the Swift package and its documentation say is what this project is."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import mm1_mlx
from mm1_mlx.checkpoint import load_config
from mm1_mlx.coreml.describe import CONFIG_KEY, FACTS_KEY, Facts, digest_of
from mm1_mlx.coreml.weights import encoder_of

MACOS = Path(__file__).parents[2] / "apps/macos"
SOURCES = MACOS / "MM1Kit/Sources/MM1Kit"
ARTICLES = sorted((SOURCES / "MM1Kit.docc").glob("*.md"))
TINY = Path(mm1_mlx.__file__).parent / "tiny"
DECLARED = re.compile(r"\b(?:case|class|actor|struct|enum|func|let|var|init)\b\s*(\w*)")

# Two backticks, where three begin a snippet.
NAMED = re.compile(r"(?<!`)``([^`\n]+)``(?!`)")


def test_the_package_has_the_projects_version():
    said = re.findall(r'version = "(.+)"', (SOURCES / "Version.swift").read_text())
    assert said == [mm1_mlx.__version__]


def test_the_documentation_has_the_projects_version():
    said = re.findall(
        r"mm1-mlx (\d\S+),", (SOURCES / "MM1Kit.docc/MM1Kit.md").read_text()
    )
    assert said == [mm1_mlx.__version__]


def test_the_documentation_lists_every_article():
    listed = re.findall(r"<doc:(\w+)>", (SOURCES / "MM1Kit.docc/MM1Kit.md").read_text())
    assert sorted(listed) == [a.stem for a in ARTICLES if a.stem != "MM1Kit"]


@pytest.mark.parametrize(
    "page", [*ARTICLES, *SOURCES.rglob("*.swift")], ids=lambda p: p.stem
)
def test_what_the_documentation_names_is_there(page):
    sources = {path: path.read_text() for path in SOURCES.rglob("*.swift")}
    declared = {"MM1Kit"}.union(*map(DECLARED.findall, sources.values()))
    for name in NAMED.findall(page.read_text()):
        for part in re.sub(r"\(.*\)", "", name).split("/"):
            assert part in declared, name


def test_the_swift_tests_read_a_package_as_it_is_exported():
    metadata = json.loads((MACOS / "MM1Kit/Tests/MM1KitTests/encoder.json").read_text())
    config = encoder_of(load_config(TINY))
    assert json.loads(metadata[CONFIG_KEY]) == config.to_dict()
    facts = Facts.read(metadata)
    assert facts.digest == digest_of(TINY, config)
    assert json.loads(metadata[FACTS_KEY]).keys() == {one.name for one in fields(Facts)}
    assert facts.function(112) == "tile_112"


def test_the_supervisor_knows_a_taken_port_by_the_servers_words():
    words = re.findall(
        r'message.contains\("(.+)"\)', (SOURCES / "Supervisor.swift").read_text()
    )
    run = (MACOS.parent / "server/run.py").read_text()
    assert words
    assert all(word in run for word in words)


def test_the_sizes_are_the_measured_ones():
    results = MACOS.parents[1] / "benchmarks/results"
    macos = json.loads((results / "macos.json").read_text())
    rows = json.loads((results / "coreml.json").read_text())["rows"]
    packages, memory = macos["packages"], macos["memory"]

    def megabytes(count):
        return f"{count / 1e6:,.0f}"

    fp16, packed = (
        f"{rows[f'mm1-tiny, {kind}']['bytes'] / 1e6:.1f}" for kind in ("fp16", "4bit")
    )
    whole, mlx, transformers = (
        megabytes(packages[part])
        for part in ("bytes", "mlx_bytes", "transformers_bytes")
    )
    libmlx, metallib = (
        megabytes(packages[x]) for x in ("libmlx_bytes", "metallib_bytes")
    )
    claims = [
        f"| {whole} MB, of which mlx is {mlx} and transformers {transformers} |",
        f"| {macos['wheel_bytes'] / 1e6:.1f} MB, the wheel of mm1-mlx",
        f"| {megabytes(memory['serve_bytes'])} MB |",
        f"| {fp16} / {packed} MB |",
        f"| {megabytes(rows['mm1-3b, fp16']['bytes'])} MB |",
        f"| {libmlx} + {metallib} MB |",
        f"| {megabytes(memory['mlxfn_bytes'])} MB (float32) |",
    ]
    readme = (MACOS / "README.md").read_text()
    assert [claim for claim in claims if claim not in readme] == []
