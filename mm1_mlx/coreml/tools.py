"""coremltools, imported without what it would bring along or print.

It imports torch, TensorFlow and scikit-learn wherever they are, to convert their models,
which takes seconds; warns on Linux of parts that only a Mac has; and draws bars of its
own. Everything else here imports it from this module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from mm1_mlx.errors import ConfigError

_FOREIGN = ("torch", "tensorflow", "sklearn", "xgboost", "executorch")


@contextmanager
def _unseen(*names: str) -> Iterator[None]:
    """As if these modules were not installed, unless they are already imported."""
    hidden = [name for name in names if name not in sys.modules]
    # What Python takes for "there is none".
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


logging.getLogger("coremltools").setLevel(logging.ERROR)
with _unseen(*_FOREIGN):
    try:
        import coremltools as ct
    except ImportError:
        raise ConfigError(
            'Core ML packages need coremltools; pip install "mm1-mlx[coreml]"'
        ) from None
    from coremltools.converters.mil.frontend.milproto.load import load_mil_proto
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from google.protobuf.message import DecodeError

pass_pipeline.tqdm = partial(pass_pipeline.tqdm, disable=True)

__all__ = [
    "DecodeError",
    "Function",
    "Placeholder",
    "Program",
    "ct",
    "load_mil_proto",
    "mb",
    "types",
]
