"""What is installed is what the sources say, small, and takes nothing from elsewhere."""

import gzip
import json
import re
import subprocess

import pytest
from browser_needed import PAGE, need_modules

from mm1_mlx.apps.page import DIST, POLICY

MOST = 300 * 1024
FILES = sorted(path for path in DIST.rglob("*") if path.is_file())
INDEX = (DIST / "index.html").read_text()


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_page_is_there_and_small():
    assert names(DIST) == [
        "assets/icon.svg",
        "assets/licences.txt",
        "assets/main.css",
        "assets/main.js",
        "index.html",
    ]
    assert sum(len(gzip.compress(path.read_bytes())) for path in FILES) < MOST


def test_the_page_is_what_its_sources_build(tmp_path):
    need_modules()
    subprocess.run(["node", "build.js", str(tmp_path / "dist")], cwd=PAGE, check=True)
    assert names(tmp_path / "dist") == names(DIST)
    for name in names(DIST):
        built = (tmp_path / "dist" / name).read_bytes()
        assert built == (DIST / name).read_bytes(), f"{name} is old; run make page"


@pytest.mark.parametrize("command", [["biome", "ci", "."], ["tsc"]])
def test_the_sources_are_formatted_and_typed(command):
    tool = need_modules() / ".bin" / command[0]
    run = subprocess.run(
        [tool, *command[1:]], cwd=PAGE, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_page_needs_nothing_that_its_policy_forbids():
    assert not re.search(r"<style|style=|<script(?![^>]*\bsrc=)|\son\w+=", INDEX)
    for address in re.findall(r'(?:src|href)="(.*?)"', INDEX):
        assert (DIST / address).is_file()
    css = (DIST / "assets/main.css").read_text()
    assert not re.search(r"@import|@font-face|url\(", css)
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


def test_every_bundled_package_brings_its_licence():
    wanted = json.loads((PAGE / "package.json").read_text())["dependencies"]
    texts = (DIST / "assets/licences.txt").read_text()
    for name, version in wanted.items():
        assert f"{name} {version}\n" in texts
    assert texts.lower().count("permission") >= len(wanted)


def test_the_packages_are_pinned_and_name_no_host():
    package = json.loads((PAGE / "package.json").read_text())
    for group in ("dependencies", "devDependencies"):
        assert all(re.fullmatch(r"[\d.]+", v) for v in package[group].values())
    lock = json.loads((PAGE / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all(entry["integrity"] for entry in packages.values())
    assert not any("resolved" in entry for entry in packages.values())
