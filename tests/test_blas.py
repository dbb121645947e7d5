"""What a fresh process sets up before its first import of mlx."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a Mac has Accelerate"
)


def ask(script):
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
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
