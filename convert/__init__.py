"""Foreign checkpoints to the one on-disk format."""

from .compose import Report, convert
from .describe import SourceInfo, describe
from .detect import detect_format
from .source import Source

__all__ = ["Report", "Source", "SourceInfo", "convert", "describe", "detect_format"]
