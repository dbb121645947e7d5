"""A package in place of the encoder: the same answers, and what is refused."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mm1_mlx import generate, load, runtime
from mm1_mlx.coreml.backend import NAME, CoreML, open_interpreter
from mm1_mlx.coreml.interpreter import read_spec
from mm1_mlx.coreml.package import SPEC, export
from mm1_mlx.coreml.program import Plan
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.layout import Picture
from mm1_mlx.runtime import TINY

PICTURES = [TINY / "red-star.png", TINY / "four-shapes.png"]
QUESTIONS = [
    ("What colour is the star?", PICTURES[:1]),
    ("How many shapes are there?", PICTURES[1:]),
    ("Describe the picture.", PICTURES[1:]),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The embedded model's, in single precision."""
    out = tmp_path_factory.mktemp("package") / NAME
    export(TINY, out, Plan("fp32"))
    return out


@pytest.fixture(scope="module")
def answers():
    with load() as opened:
        return [generate(opened, *asked).tokens for asked in QUESTIONS]


def test_answers_are_those_of_mlx(package, answers):
    sizes = []

    def counting(*given):
        sizes.append(given[2])
        return open_interpreter(*given)

    with load(vision_backend=CoreML(package, counting)) as opened:
        found = [generate(opened, *asked).tokens for asked in QUESTIONS]
        # Its weights went; the package is opened once.
        assert "vision" not in opened.model
    assert found == answers
    assert len({tuple(tokens) for tokens in found}) == len(found)
    assert sizes == [96]


@pytest.fixture
def blank(embedded):
    """Image tokens that say nothing."""
    shape = (1, embedded.num_image_tokens, embedded.decoder.hidden_size)
    return np.zeros(shape, np.float32)


def test_the_package_decides_what_is_seen(package, answers, blank):
    """Not the model's own encoder: other image tokens are another answer."""

    def blind(*_):
        return lambda _: blank

    with load(vision_backend=CoreML(package, blind)) as opened:
        found = [generate(opened, *asked).tokens for asked in QUESTIONS]
    assert found != answers


def test_what_is_kept_of_pictures_is_each_backends_own(package, tmp_path, blank):
    def blind(*_):
        return lambda _: blank

    question = ("Describe the picture.", PICTURES[1:])
    texts = []
    for backend in ("mlx", CoreML(package, blind), "mlx"):
        with load(features=tmp_path, vision_backend=backend) as opened:
            texts.append(generate(opened, *question).text)
    assert texts[0] == texts[2] != texts[1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="here it is not refused")
def test_elsewhere_core_ml_needs_macos(package):
    for name in ("coreml", f"coreml:{package}"):
        with pytest.raises(ConfigError, match="Core ML needs macOS; answer with"):
            load(vision_backend=name)


def test_what_does_not_fit_is_refused(package, member, tmp_path):
    def refused(kind, said, **options):
        backend = options.pop("backend", CoreML(package, open_interpreter))
        with pytest.raises(kind, match=said):
            load(vision_backend=backend, **options)

    refused(ConfigError, "'metal' is not one; expected mlx, coreml", backend="metal")
    other = tmp_path / "O.mlpackage"
    export(member(), other, Plan())
    made = CoreML(other, open_interpreter)
    refused(CheckpointError, "was made from another model than", backend=made)
    nowhere = CoreML(None, open_interpreter)
    refused(CheckpointError, r"tiny/Encoder.mlpackage' is no Core ML", backend=nowhere)
    with (
        load(
            vision_backend=CoreML(package, open_interpreter), resolution="128"
        ) as opened,
        pytest.raises(MM1Error, match=r"takes tiles of \[96\] pixels, not 128"),
    ):
        generate(opened, *QUESTIONS[0])


def test_adapters_and_regions_are_for_mlx(package, make_model):
    given = SimpleNamespace(given=[("an adapter", 1.0)])
    with pytest.raises(ConfigError, match="knows nothing of adapters; fuse them"):
        runtime._attached(CoreML(package, open_interpreter), TINY, None, given)
    pixels = np.zeros((16, 16, 3), np.float32)
    picture = Picture((pixels,), (16, 16), "x", regions=(np.zeros((1, 2), np.float32),))
    with pytest.raises(ConfigError, match="regions are read off patch features"):
        make_model().encode([picture], image_tokens=lambda x: x)


def test_a_package_that_says_nothing_is_not_taken(package, tmp_path):
    out = tmp_path / NAME
    shutil.copytree(package, out)
    spec = read_spec(out)
    spec.description.metadata.userDefined.clear()
    (out / SPEC).write_bytes(spec.SerializeToString())
    with pytest.raises(CheckpointError, match="does not say what it was made from"):
        load(vision_backend=CoreML(out, open_interpreter))
