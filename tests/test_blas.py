"""What a fresh process sets up before its first import of mlx."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mm1_mlx

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a Mac has Accelerate"
)

STAR = Path(mm1_mlx.__file__).with_name("tiny") / "red-star.png"


def ask(script, **environment):
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_freed_arrays_are_kept_once_by_the_heap():
    limit, kept = ask(
        "from mm1_mlx.blas import preload_blas; preload_blas()\n"
        "import mlx.core as mx\n"
        "x = mx.ones((256, 256)) + 1; mx.eval(x); del x\n"
        "print(mx.set_cache_limit(0), mx.get_cache_memory())"
    )
    import mlx.core as mx

    if mx.cuda.is_available():
        assert int(limit) > 0
    else:
        assert (int(limit), int(kept)) == (0, 0)


def test_a_process_that_has_mlx_already_is_left_as_it_is():
    before, answer, after = ask(
        "import mlx.core as mx\n"
        "before = mx.set_cache_limit(12345678)\n"
        "from mm1_mlx.blas import preload_blas\n"
        "print(before, preload_blas(), mx.set_cache_limit(before))"
    )
    assert int(before) > 0
    assert (answer, int(after)) == ("None", 12345678)


def test_what_was_loaded_is_still_known_once_mlx_is_there():
    before, imported, after = ask(
        "from mm1_mlx.blas import preload_blas\n"
        "before = preload_blas()\n"
        "import sys, mlx.core\n"
        "print(before, 'mlx.core' in sys.modules, preload_blas())"
    )
    assert imported == "True"
    assert after == before


def test_a_model_that_is_let_go_gives_its_memory_back():
    held, left = ask(
        "from mm1_mlx.blas import give_back, preload_blas; preload_blas()\n"
        "import mlx.core as mx, gc\n"
        "from mm1_mlx.room import PROC\n"
        "def resident():\n"
        "    lines = (PROC / 'self/status').read_text().splitlines()\n"
        "    return next(int(x.split()[1]) for x in lines if x.startswith('RssAnon'))\n"
        "arrays = [mx.ones((2**20,)) * i for i in range(100)]\n"
        "mx.eval(arrays); held = resident()\n"
        # The last one holds the heap's end.
        "last = arrays.pop(); arrays.clear(); gc.collect(); give_back()\n"
        "print(held, resident())"
    )
    assert int(held) - int(left) > 350_000  # kB of 400 MB


def test_what_a_training_step_frees_is_kept_for_the_next():
    held, kept, left = ask(
        "from mm1_mlx.blas import preload_blas, steps_kept; preload_blas()\n"
        "import mlx.core as mx, gc\n"
        "from mm1_mlx.room import PROC\n"
        "def resident():\n"
        "    lines = (PROC / 'self/status').read_text().splitlines()\n"
        "    return next(int(x.split()[1]) for x in lines if x.startswith('RssAnon'))\n"
        "with steps_kept():\n"
        "    arrays = [mx.ones((2**20,)) * i for i in range(100)]\n"
        "    mx.eval(arrays); held = resident()\n"
        "    arrays.clear(); gc.collect(); kept = resident()\n"
        "print(held, kept, resident())"
    )
    assert int(held) - int(kept) < 50_000  # kB of 400 MB
    assert int(kept) - int(left) > 350_000


def test_products_side_by_side_have_a_thread_each():
    before, within, after = ask(
        "from mm1_mlx.blas import one_thread_a_product, preload_blas\n"
        "name = preload_blas()\n"
        "import ctypes\n"
        "blas = ctypes.CDLL(name) if name else None\n"
        "def threads(): return blas.openblas_get_num_threads() if name else 0\n"
        "before = threads()\n"
        "with one_thread_a_product(): within = threads()\n"
        "print(before, within, threads())",
        OPENBLAS_NUM_THREADS="2",
    )
    # Without OpenBLAS nothing is there to be told.
    assert (before, within, after) in {("2", "1", "2"), ("0", "0", "0")}


# What the C library is told, beside what mlx is.
WATCHED = (
    "import ctypes\n"
    "told, library = [], ctypes.CDLL\n"
    "class Library:\n"
    "    def __init__(self, name, **mode):\n"
    "        self.real = library(name, **mode)\n"
    "    def __getattr__(self, name):\n"
    "        told.append(name)\n"
    "        return getattr(self.real, name)\n"
    "ctypes.CDLL = Library\n"
    "from mm1_mlx import load\n"
    "from mm1_mlx.blas import heap_keeps\n"
    "import mlx.core as mx\n"
    "load().close()\n"
    "print(mx.set_cache_limit(0) == 0, heap_keeps(), *told)"
)


def test_a_host_program_may_keep_its_heap_as_it_is():
    limited, keeps, *told = ask(WATCHED, MM1_HEAP="off")
    assert (limited, keeps, told) == ("False", "False", [])
    _, keeps, *told = ask(WATCHED, MM1_HEAP="on")
    # Where the C library has the call.
    if keeps == "True":
        assert told == ["mallopt", "malloc_trim"]


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-p", "hi"),
        ("generate", "-i", str(STAR), "-p", "hi"),
        ("generate", "-i", str(STAR), "--box", "0,0,9,9", "-p", "<region>"),
        ("generate", "-i", str(STAR), "--mask", str(STAR), "-p", "<region>"),
        ("generate", "--video", str(STAR.parent), "-p", "hi"),
        ("prefix", "save", "it", "-i", str(STAR)),
        ("prefix", "save", "it", "--system", "hi"),
        ("embed", "-m", str(STAR.parent), "-i", str(STAR)),
    ],
    ids=" ".join,
)
def test_commands_find_openblas_before_mlx(command, tmp_path):
    """Once mlx is imported it has its own BLAS, and is many times slower.

    The heap is set up where OpenBLAS is loaded, and neither once mlx is there.
    """
    kept, *_ = ask(
        "import sys, io\n"
        "from mm1_mlx.apps.cli import main\n"
        f"sys.argv = ['mm1', *{command!r}]\n"
        "out, sys.stdout = sys.stdout, io.StringIO()\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.stdout = out\n"
        "from mm1_mlx.blas import heap_keeps\n"
        "import ctypes\n"
        "print(heap_keeps() == hasattr(ctypes.CDLL(None), 'mallopt'))",
        MM1_CACHE=str(tmp_path),
    )
    assert kept == "True"


def test_a_word_that_is_not_known_is_refused_before_anything_else():
    said, *_ = ask(
        "import sys\n"
        "from mm1_mlx.errors import ConfigError\n"
        "try: from mm1_mlx import load\n"
        "except ConfigError as error: print(str(error).replace(' ', '_'))",
        MM1_HEAP="no",
    )
    assert said.startswith("MM1_HEAP='no'_is_not_known;_set_it_to_'off'")


def test_a_reader_of_configs_does_not_pay_for_mlx():
    loaded, *_ = ask(
        "import sys\n"
        "from mm1_mlx import MM1Config, MM1Error, Answer, Piece\n"
        "print('mlx.core' in sys.modules)"
    )
    assert loaded == "False"


@pytest.mark.parametrize(
    ("word", "said"),
    [("on", "keeps freed memory"), ("off", r"as the system has it \(MM1_HEAP=off\)")],
)
def test_doctor_says_which(word, said):
    command = [Path(sys.executable).with_name("mm1"), "doctor", "--json"]
    environment = os.environ | {"MM1_HEAP": word}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert re.match(said, json.loads(done.stdout)["heap"])
