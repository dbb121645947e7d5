"""Run, assemble and train MM1-type multimodal LLMs with MLX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm1_mlx.answer import Answer, Piece
    from mm1_mlx.batch import Ask, generate_batch, stream_batch
    from mm1_mlx.config import MM1Config
    from mm1_mlx.errors import MM1Error
    from mm1_mlx.models import MM1
    from mm1_mlx.pool import Pool
    from mm1_mlx.prompt import Prompt
    from mm1_mlx.runtime import Runtime, astream, forecast, generate, load, stream

    __version__: str

# Where each public name lives; imported on first use, so that a command's --help and a
# reader of configs do not pay for the model.
_HOMES = {
    "Answer": "answer",
    "Ask": "batch",
    "MM1": "models",
    "MM1Config": "config",
    "MM1Error": "errors",
    "astream": "runtime",
    "forecast": "runtime",
    "Piece": "answer",
    "Pool": "pool",
    "Prompt": "prompt",
    "Runtime": "runtime",
    "generate": "runtime",
    "generate_batch": "batch",
    "load": "runtime",
    "stream": "runtime",
    "stream_batch": "batch",
}
_WITHOUT_MLX = {"answer", "config", "errors"}

__all__ = [
    "MM1",
    "Answer",
    "Ask",
    "MM1Config",
    "MM1Error",
    "Piece",
    "Pool",
    "Prompt",
    "Runtime",
    "__version__",
    "astream",
    "forecast",
    "generate",
    "generate_batch",
    "load",
    "stream",
    "stream_batch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mm1-mlx")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] not in _WITHOUT_MLX:
        from mm1_mlx.blas import preload_blas

        # Before the first import of mlx; does nothing on a Mac.
        preload_blas()
    return getattr(import_module(f"mm1_mlx.{_HOMES[name]}"), name)
