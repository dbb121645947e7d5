"""What pyproject.toml installs is what the folders hold."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mm1_mlx.kernels import metal

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Listed so that their files are installed; they hold no modules.
DATA = {"mm1_mlx.tiny", "mm1_mlx.train.data.specs"}


def test_every_folder_with_modules_is_a_listed_package():
    found = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *inner]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found | DATA)


def test_every_package_has_its_init():
    for name, folder in SETUPTOOLS["package-dir"].items():
        for package in set(SETUPTOOLS["packages"]) - DATA:
            inner = package.removeprefix(name).strip(".").replace(".", "/")
            if package == name or (
                name == "mm1_mlx" and (ROOT / folder / inner).is_dir()
            ):
                assert (ROOT / folder / inner / "__init__.py").is_file()


def test_site_packages_gains_one_name():
    assert {package.partition(".")[0] for package in SETUPTOOLS["packages"]} == {
        "mm1_mlx"
    }


def test_the_embedded_model_and_the_type_marker_are_installed():
    data = SETUPTOOLS["package-data"]
    assert (ROOT / "mm1_mlx/py.typed").is_file()
    assert data == {
        "mm1_mlx": ["py.typed"],
        "mm1_mlx.apps.page": ["dist/*", "dist/assets/*"],
        "mm1_mlx.kernels": ["*.metal"],
        "mm1_mlx.tiny": ["*"],
        "mm1_mlx.train.data.specs": ["*.json"],
    }
    # The pattern does not reach into subfolders.
    assert all(path.is_file() for path in (ROOT / "mm1_mlx").glob("tiny/*"))


def test_the_kernels_text_is_installed():
    found = {path.name for path in (ROOT / "mm1_mlx/kernels").glob("*.metal")}
    assert found == {f"{name}.metal" for name in (metal.PARTIAL, metal.MERGE)}
    assert {path.name for path in (ROOT / "mm1_mlx").rglob("*.metal")} == found


def test_the_command_exists():
    module, _, function = PROJECT["project"]["scripts"]["mm1"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", ["mm1_mlx", "mm1_mlx.convert", "mm1_mlx.apps"])
def test_packages_import_under_their_installed_names(name):
    assert import_module(name).__name__ == name


def test_torch_is_never_needed_to_run():
    needed = [d.lower() for d in PROJECT["project"]["dependencies"]]
    for name in ("torch", "torchvision", "datasets", "opencv", "coremltools"):
        assert not any(dependency.startswith(name) for dependency in needed)


def test_mlx_lm_is_pinned_to_the_minor_version_the_contract_was_tested_with():
    assert "mlx-lm>=0.32.2,<0.33" in PROJECT["project"]["dependencies"]
