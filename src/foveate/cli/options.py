"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="reference (embedded, no download), smol (a text model), a checkpoint folder, or a Hub id."
    ),
]
RecipeText = Annotated[
    str, typer.Option(metavar="RECIPE", help="What to apply, as text, a .yaml file or a name on the Hub.")
]
Longest = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the questions and of random methods.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help="auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.")
]
Companion = Annotated[
    str | None,
    typer.Option(
        metavar="CLIP",
        help="CLIP checkpoint (folder or Hub id) whose vision tower the model has, for methods that read its text tower; "
        "the reference model brings its own.",
    ),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Folder that foveate calibrate or quantize wrote, besides the checkpoint's own folder foveate."
    ),
]
ModelArgs = Annotated[
    str | None,
    typer.Option(
        metavar="ARGS",
        help="What your own script gives from_pretrained, in YAML: device_map=auto, attn_implementation=eager, "
        "quantization_config={...}; or a .yaml file.",
        show_default=False,
    ),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System prompt that every conversation begins with.", show_default=False)
]
Tasks = Annotated[
    str | None, typer.Option(metavar="LIST", help="Generated tasks separated by commas, or all (if nothing is given).")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own questions instead: JSON, CSV, TSV, parquet, or a folder saved by Hugging Face datasets.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How answers are scored: exact (if nothing is given; generated tasks have their own), contains, items, anls, "
        "vqa, module:function, and with --data point or box.",
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="With --data: longest answer, in tokens (16 if not given).")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Questions at once, the same for every method.")]
ProbeOut = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for probes.json and the picture; that of a bench shows them in its report."),
]
