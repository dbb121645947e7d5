"""A model as ``.mlxfn`` functions that programs without Python run.

model folder -> functions.py -> encode.mlxfn, decoder.mlxfn
tokenizer, template, image config -> text.py, sidecar.py -> mlxfn.json
the folder -> program.py -> tokens, as ``apps/macos/mlxfn-demo`` makes them in C++
"""

from mm1_mlx.mlxfn.export import Report as Report
from mm1_mlx.mlxfn.export import export as export
from mm1_mlx.mlxfn.program import Program as Program
from mm1_mlx.mlxfn.program import open_program as open_program
from mm1_mlx.mlxfn.sidecar import Sidecar as Sidecar
