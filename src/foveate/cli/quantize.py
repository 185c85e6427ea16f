"""``foveate quantize``: a model's weights as whole numbers, block by block, and a checkpoint of them for other loaders."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.text import Text

from foveate import checkpoint
from foveate.cli.calibrate import CalibrateRequest, batches_of, named, questions
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.progress import StepProgress
from foveate.cli.quiet import quiet
from foveate.core.artifact import FOLDER, SIZE, Artifact
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable
from foveate.engine.before import pictures
from foveate.engine.export import export as write_checkpoint
from foveate.engine.export import refuse_export
from foveate.engine.quantize import quantize as make_artifact
from foveate.engine.quantize import to_quantize

OUT = Path("runs/quantize")


@dataclass(frozen=True)
class QuantizeRequest(CalibrateRequest):
    """The options of the command, as they were given."""

    export: Path | None = None


@quiet()
def quantize(request: QuantizeRequest) -> None:
    """Make the artifact of a method, and keep it in a folder."""
    method, others = to_quantize(request.method)
    folder = request.out or OUT / named(request.model)
    make_writable(folder)
    if request.export is not None:
        refuse_export(method)
        make_writable(request.export, "export")
    asked = questions(request) if method.streams else []
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, model_args=arguments, system=request.system)
    loaded.refuse_placeholders(turn.prompt for each in asked for turn in each.turns)
    resizing = pictures(others)
    with loaded.attach(resizing) if asked and resizing.methods else nullcontext() as session:
        batches = batches_of(loaded, asked, request, answered=True, session=session)
    try:
        with StepProgress(diagnostics()) as progress:
            artifact = make_artifact(
                loaded.model,
                request.method,
                batches,
                out=folder,
                seed=request.seed,
                watcher=progress,
                companion=loaded.companion,
                artifacts=loaded.artifacts,
            )
        if request.export is not None:
            with redirect_stderr(io.StringIO()):  # where the library draws bars of its own
                write_checkpoint(loaded.model, artifact, request.export)
            loaded.processor.save_pretrained(request.export)
    except KeyboardInterrupt:
        diagnostics().print("foveate: interrupted; blocks that are finished are kept, the same command goes on with them")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        raise FoveateError(f"out={str(folder)!r}: cannot be written ({error.strerror}); name another folder") from error
    for line in artifact.numbers["said"]:
        diagnostics().print(Text(line))
    output().print(said_of(artifact))
    typer.echo(f"{folder / f'{method.name}.json'}")
    if request.export is not None:
        typer.echo(f"{request.export}")
    own = checkpoint.local_folder(request.model)
    if own is None or folder.resolve() != (own / FOLDER).resolve():
        diagnostics().print(Text(f"other commands take it with --artifacts {folder}"))


def said_of(artifact: Artifact) -> str:
    """How large it is."""
    size = artifact.numbers[SIZE]
    bits = {kind: 8 * count / size["weights"] for kind, count in size.items() if kind != "weights"}
    parts = ", ".join(f"{kind} {value:.3g}" for kind, value in bits.items() if value)
    return f"{size['weights'] / 1e6:.3g} M weights, {sum(bits.values()):.3g} bits each on disk ({parts})"
