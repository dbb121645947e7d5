"""Makes the helper modules of this folder importable."""

import sys
from pathlib import Path

# importlib mode, which keeps equal test names apart, leaves this folder off the path.
sys.path.insert(0, str(Path(__file__).parent))
