"""What the Swift package says of itself is what this project is."""

import re
from pathlib import Path

import mm1_mlx

KIT = Path(__file__).parents[2] / "apps/macos/MM1Kit/Sources/MM1Kit"


def test_the_package_has_the_projects_version():
    said = re.findall(r'version = "(.+)"', (KIT / "Version.swift").read_text())
    assert said == [mm1_mlx.__version__]
