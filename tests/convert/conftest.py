"""Makes the helper modules of this folder importable, and mlx quick on Linux."""

import sys
from pathlib import Path

from mm1_mlx.blas import preload_blas

# importlib mode, which keeps equal test names apart, leaves this folder off the path.
sys.path.insert(0, str(Path(__file__).parent))
preload_blas()
