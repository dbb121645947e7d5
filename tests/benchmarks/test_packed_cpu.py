"""Packed layers are measured as ``mm1 quantize`` makes them, and it is said where."""

import json
from dataclasses import replace

from benchmarks import packed_cpu
from benchmarks.packed_cpu import CONFIG, chosen, main
from mm1_mlx.recipe import RECIPES


def test_the_head_is_the_recipes_unless_it_is_said():
    assert chosen("4bit", None).ways == RECIPES["4bit"].ways
    assert chosen("4bit", None).ways["head"].bits == 6
    assert chosen("4bit", "4").ways["head"].bits == 4
    assert chosen("4bit", "4").ways["mlp"] == RECIPES["4bit"].ways["mlp"]


def test_results_say_what_was_packed_and_where(tmp_path, monkeypatch):
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    decoder = replace(CONFIG.decoder, **small, **heads, num_hidden_layers=1)
    monkeypatch.setattr(packed_cpu, "CONFIG", replace(CONFIG, decoder=decoder))
    monkeypatch.setattr(packed_cpu, "ROWS", 8)
    out = tmp_path / "packed.json"
    monkeypatch.setattr("sys.argv", ["packed_cpu", "--rounds", "1", "--json", str(out)])
    main()
    figures = json.loads(out.read_text())
    assert figures["machine"].keys() >= {"chip", "commit", "versions", "blas"}
    assert figures["ways"]["head"]["bits"] == 6
    assert figures["ways"]["attention"]["bits"] == 4
    assert max(figures["difference_from_mlx"].values()) < 1e-4
    assert len(figures["decode_seconds"]["float32"]) == 1
