"""Calls of vLLM's towers, as they were recorded, and a stand-in that makes them again.

python -m tests.serving.recorded        # in the environment of `make test-serving`: records them anew
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.engine.clock import Clock
from foveate.models.anatomy import Anatomy
from foveate.models.qwen_vision import rows_of
from foveate.serving.vllm.admission import Pruning
from foveate.serving.vllm.encoding import Tower, encode, program

FOLDER = Path(__file__).parents[1] / "data" / "serving"
MODELS = {"llava": "reference", "qwen2_5_vl": "reference-qwen"}
RECIPES = {
    "llava": ("hiprune(keep=32)", "scope(keep=32)"),
    "qwen2_5_vl": ("hiprune(keep=0.5)", "scope(keep=0.5, saliency='received')"),
}
"""Of which the rows are there that they read."""
SIZES = {"llava": (96, 96), "qwen2_5_vl": (160, 112)}
"""The latter is several windows, of different sizes."""


class Said(nn.Module):
    """A module that says what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["query"]


def replayed(family: str, recipe: str, config: Any, recording: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What `encode` makes of the recorded calls of one picture."""
    config.foveate = {"recipe": recipe}
    pruning = Pruning.of(family, config)
    assert pruning is not None
    tower = _tower(pruning, recording)
    anatomy = Anatomy(
        family=family,
        model=nn.Linear(1, 1),
        multimodal=nn.Identity(),
        vision=nn.Identity(),
        language_model=nn.Identity(),
        layers=(),
        image_tokens=(6,),
        pictures=pruning.pictures,
        encoder=tower,
        rotary_rows=pruning.traits.rotary_rows,
        config=config.get_text_config(),
    )
    bound = {"pixel_values": torch.zeros(1), "image_grid_thw": recording.get("grid")}

    def run() -> list[Tensor]:
        for layer, module in enumerate(tower.attention):
            if f"query.{layer}" in recording:
                module(query=recording[f"query.{layer}"], key=recording[f"key.{layer}"], value=recording[f"key.{layer}"])
        for module in (tower.output, tower.first):
            if module is not None:
                module(recording["features"])
        return [recording["rows"]]

    return encode(program(pruning.at(pruning.asked()), anatomy, pruning.traits), bound, run, Clock(torch.device("cpu")))


def _tower(pruning: Pruning, recording: dict[str, Tensor]) -> Tower:
    """The stand-in: the order of rows and the windows are the recorded ones, too."""
    traits, packed = pruning.traits, pruning.family.packed
    attention = [Said() for _ in range(traits.encoder_layers or 0)]
    heads = int(recording["heads"])
    for module in attention:
        known = recording["query.0" if "query.0" in recording else next(n for n in recording if n.startswith("query."))]
        module.head_size = known.shape[-1] if known.ndim == 4 else known.shape[-1] // heads
        module.scale = module.head_size**-0.5
    unit = pruning.config.vision_config.spatial_merge_size**2 if packed else 1
    return Tower(
        blocks=attention,
        attention=attention,
        feature_layer=traits.feature_layer or 0,
        prefix=int(traits.has_cls),
        projector=Said(),
        tile=traits.patches,
        packed=packed,
        order=(lambda bound, layer: rows_of(recording["order"], unit)) if packed else (lambda bound, layer: None),
        sites=pruning.family.sites,
        hidden=recording["features"].shape[-1],
        output=None if packed else Said(),
        first=Said() if packed else None,
        segments=(lambda bound, layer: recording[f"segments.{layer}"].tolist()) if packed else None,
    )


def read(family: str) -> dict[str, Tensor]:
    """A recording, in float32."""
    whole = load_file(FOLDER / f"{family}.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}


def record(family: str) -> None:
    """Write the recording of a family: a picture's calls of what its recipes read."""
    from foveate import reference
    from foveate.models.processors import read_processor
    from foveate.tasks import questions
    from tests.serving.vllm.both import ask, change, engine, stop, watch

    folder = reference.path(MODELS[family])
    llm = engine(folder, RECIPES[family][0])
    made: dict[str, Tensor] = {}

    def install(model: Any) -> None:
        tower = model.pruner.anatomy.encoder
        made["heads"] = torch.tensor(tower.attention[0].num_heads)
        for layer in sorted({site.layer for site in _sites(family, model.pruner.pruning)}):
            tower.attention[layer].register_forward_pre_hook(_note(made, layer), with_kwargs=True)
        if tower.output is not None:
            tower.output.register_forward_hook(lambda _, args, out: made.update(features=out.clone()))
        if tower.first is not None:
            tower.first.register_forward_pre_hook(lambda _, args: made.update(features=args[0].clone()))
        plain = model.pruner._encode

        def once(keep: Any, counted: bool, pictures: Any, bound: Any, run: Any) -> Any:
            made["rows"] = next(iter(run())).clone()
            if "image_grid_thw" in bound:
                made["grid"] = bound["image_grid_thw"].clone()
                made["order"] = tower.order(bound, 0)[:: pictures[0].views[0].cells.shape[1]] // 4
                for layer in range(len(tower.attention)):
                    made[f"segments.{layer}"] = torch.tensor(tower.segments(bound, layer))
            return plain(keep, counted, pictures, bound, run)

        model.pruner._encode = once

    llm.apply_model(install)
    kept = {}
    asked = [
        replace(each, images=tuple(image.resize(SIZES[family]) for image in each.images))
        for each in questions("counting", 1, seed=3)
    ]
    for number, recipe in enumerate(RECIPES[family]):
        if number:
            change(llm, recipe)
        seen = watch(llm)
        ask(llm, read_processor(folder), asked)
        kept[f"kept.{number}"] = torch.tensor(seen[0][0])
    stop(llm)
    FOLDER.mkdir(parents=True, exist_ok=True)
    small = {name: value.half() if value.is_floating_point() else value for name, value in made.items()}
    save_file({name: value.contiguous() for name, value in (small | kept).items()}, FOLDER / f"{family}.safetensors")


def _sites(family: str, pruning: Pruning) -> list[Any]:
    from foveate.core.recipe import Recipe

    methods = [Recipe.of(recipe).methods[0] for recipe in RECIPES[family]]
    return [signal.site for method in methods for signal in method.reads(pruning.traits) if hasattr(signal, "site")]  # type: ignore[attr-defined]


def _note(made: dict[str, Tensor], layer: int) -> Any:
    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = SimpleNamespace(**(dict(zip(("query", "key", "value"), args)) | kwargs))
        made[f"query.{layer}"], made[f"key.{layer}"] = given.query.clone(), given.key.clone()

    return note


if __name__ == "__main__":
    for name in MODELS:
        record(name)
