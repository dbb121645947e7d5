"""What transformers computes of a source, stage by stage: run as a child process.

``python reference.py REQUEST.npz RESULT.npz``: torch stays out of the process that asks,
and its memory goes back before ours is needed. Everything is computed in float32.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
# Said, not left out: else transformers asks on the terminal.
NO_CODE: Arrays = {"trust_remote_code": False}


def main(request_path: str, result_path: str) -> None:
    """Write the stages' arrays; any error is one sentence."""
    try:
        import torch
        import transformers
    except ImportError:
        raise SystemExit(
            'comparing with a source needs torch: pip install "mm1-mlx[torch]"'
        ) from None
    request = dict(np.load(request_path))
    folder = str(request["source"])
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    # Without a class the model's type at least says what was given.
    kind = str((config.get("architectures") or [config.get("model_type")])[0])
    run = next((f for ending, f in STAGES.items() if kind.endswith(ending)), None)
    # Never a repository's own code: a class of transformers' own, and not one of those
    # that look for a class themselves (AutoModelForCausalLM).
    cls = getattr(transformers, kind, None) if run else None
    own = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if run is None or cls is None or not own:
        raise SystemExit(
            f"transformers has no model of the kind {kind!r} to compare with; compared "
            f"are those that end in {', '.join(STAGES)}"
        )
    # A kernel that the config names would be somebody's code too.
    safe = NO_CODE | {"attn_implementation": "eager", "dtype": torch.float32}
    try:
        model = cls.from_pretrained(folder, **safe).eval()
        with torch.no_grad():
            result = run(model, request, torch)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"transformers cannot run {folder}: {reason}") from None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    np.savez(result_path, **result, **versions)


def _processed(folder: str, picture: str) -> Arrays:
    """The picture as the source's own processor makes it."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **NO_CODE)
    made = processor(Image.open(picture).convert("RGB"), return_tensors="np")
    return dict(made)


def _tiles(request: Arrays, torch: Any) -> Any:
    """Our own tiles [N, 3, S, S], so that later stages do not inherit a difference."""
    return torch.from_numpy(request["tiles"].transpose(0, 3, 1, 2).copy())


def _decoder(model: Any, request: Arrays, torch: Any, **pictures: Any) -> Arrays:
    tokens = request["tokens"].tolist()
    logits = None
    greedy: list[int] = []
    while len(greedy) < int(request["num_tokens"]):
        ids = torch.tensor([[*tokens, *greedy]])
        made = model(input_ids=ids, **pictures).logits[0]
        logits = made if logits is None else logits
        greedy.append(int(made[-1].argmax()))
    assert logits is not None
    return {"logits": logits.numpy(), "greedy": np.array(greedy)}


def _llava(model: Any, request: Arrays, torch: Any) -> Arrays:
    """Features and image tokens as they pass the projector, then the decoder's."""
    seen: Arrays = {}

    def keep(_: Any, inputs: Any, output: Any) -> None:
        seen.setdefault("vision", inputs[0].numpy())
        seen.setdefault("connector", output.numpy())

    model.model.multi_modal_projector.register_forward_hook(keep)
    request["tokens"][request["places"]] = model.config.image_token_id
    pictures = {"pixel_values": _tiles(request, torch)}
    if "image_grid_pinpoints" in model.config:
        pictures["pixel_values"] = pictures["pixel_values"][None]
        width, height = request["size"].tolist()
        pictures["image_sizes"] = torch.tensor([[height, width]])
    made = _decoder(model, request, torch, **pictures)
    pixels = _processed(str(request["source"]), str(request["picture"]))["pixel_values"]
    return {**made, **seen, "pixels": pixels.reshape(-1, *pixels.shape[-3:])}


def _clip(model: Any, request: Arrays, torch: Any) -> Arrays:
    tower = getattr(model, "vision_model", model)
    states = tower(_tiles(request, torch)).last_hidden_state
    made: Arrays = {"vision": tower.post_layernorm(states)[:, 1:].numpy()}
    if hasattr(model, "visual_projection"):
        image = model.visual_projection(tower.post_layernorm(states[:, 0]))
        made["image vectors"] = image.numpy()
    if "texts" in request:
        ids = torch.from_numpy(request["texts"])
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        made["text vectors"] = text.numpy()
        scores = model(input_ids=ids, pixel_values=_tiles(request, torch))
        made["logits"] = scores.logits_per_image.numpy()
    pixels = _processed(str(request["source"]), str(request["picture"]))["pixel_values"]
    return {**made, "pixels": pixels}


STAGES: dict[str, Callable[[Any, Arrays, Any], Arrays]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava,
    "CLIPModel": _clip,
    "CLIPVisionModel": _clip,
    "CLIPVisionModelWithProjection": _clip,
    "ForCausalLM": _decoder,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
