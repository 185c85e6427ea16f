"""The commands and their options. What they do lives beside, and is imported only when it is asked for."""

from __future__ import annotations

import signal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.one_line import OneLineErrors
from foveate.cli.options import (
    Artifacts,
    BatchSize,
    Companion,
    Data,
    Device,
    Dtype,
    Longest,
    MaxNewTokens,
    Metric,
    Model,
    ModelArgs,
    ProbeOut,
    RecipeText,
    Seed,
    System,
    Tasks,
)
from foveate.cli.ray_option import RayMayStandAlone

app = typer.Typer(
    name="foveate",
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

bench_app = typer.Typer(
    cls=RayMayStandAlone, rich_markup_mode=None, invoke_without_command=True, subcommand_metavar="[compare A B]"
)
app.add_typer(bench_app, name="bench")

probe_app = typer.Typer()
reference_app = typer.Typer()


def run_command() -> None:
    """Do what the arguments of this process say, and exit."""
    # Being terminated is being interrupted: what is finished is kept, and said to be.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="foveate")


@app.callback(invoke_without_command=True)
def foveate(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Make vision-language models fast, and measure honestly what it costs.

    \b
    foveate run --image cat.jpg --prompt "What is on the sofa?" --recipe "hiprune(keep=64)"
    foveate bench --methods fastv,hiprune,scope --keep 0.33,0.22,0.11
    """
    if show_version:
        typer.echo(version("foveate"))
    else:
        help_if_alone(context)


@bench_app.callback()
def bench(
    context: typer.Context,
    model: Model = "reference",
    tasks: Tasks = None,
    data: Data = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Names or recipes separated by commas, or all that the model takes; none, random and uniform are always "
            "measured.",
        ),
    ] = "random,uniform,fastv,hiprune,scope",
    keep: Annotated[
        str,
        typer.Option(metavar="LIST", help="Budgets: ratios (0.22) or counts (64), for each keep that a recipe leaves open."),
    ] = "0.33,0.22,0.11",
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Questions per task; of --data the first N.")] = 200,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results.json, report.html, a picture and every answer.")
    ] = Path("runs/bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on in DIR; finished cells are not measured again.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 25,
    timed: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Batches of each cell on which the unmodified model and the limit are timed."),
    ] = 3,
    films: Annotated[
        bool,
        typer.Option(
            "--films",
            help="Tasks of videos (events, moment, stream): methods meet the frames as one video, not as pictures; budgets "
            "are of the whole.",
        ),
    ] = False,
    companion: Companion = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Measure cells side by side on Ray: here, or on the cluster at ADDRESS (auto: the one that runs here).",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --ray, cells at a time; without, as many as there are cores or GPUs."),
    ] = None,
) -> None:
    """Compare methods on quality, tokens and time.

    Every task is measured under every method at every budget, beside random selection and the physical limit. Each such cell
    is kept in DIR as soon as it is finished; one that fails is reported, the others go on, and the exit code is 1.

    \b
    foveate bench --methods "fastv,hiprune(alpha=0.2),scope + fastv(layer=4, keep=0.5)" --keep 0.22,32 --out runs/mine
    foveate bench --data receipts.jsonl --metric anls --model llava-hf/llava-1.5-7b-hf --out runs/receipts
    foveate bench compare runs/mine:hiprune@0.22 runs/mine:scope@0.22
    """
    if context.invoked_subcommand is not None:
        return
    from foveate.cli.bench import BenchRequest
    from foveate.cli.bench import bench as work
    from foveate.cli.own_data import OwnData

    own = OwnData(data, metric, max_new_tokens)
    common = (model, tasks, methods, keep, n, seed, out, resume, device, dtype, batch_size, companion)
    work(BenchRequest(*common, own, ray, workers, timed, artifacts, model_args, system, films))


@bench_app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The folder of a bench, or DIR:method@keep for one of its methods.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, with answers to the same questions, or the same again.")],
) -> None:
    """Say whether B answers better than A, task by task.

    Cells of the same task, method and budget are paired question by question; DIR:method@keep picks others.

    \b
    foveate bench compare runs/before runs/after
    foveate bench compare runs/mine:hiprune@0.22 runs/mine:scope@0.22
    """
    from foveate.cli.compare import compare as work

    work(a, b)


@app.command()
def claims(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A system, or a .yaml file of your own.", show_default=False)
    ] = None,
) -> None:
    """Show what papers claim: model, benchmark, recipe, tokens kept, score kept, speed-up, hardware.

    \b
    foveate claims
    foveate claims hiprune
    """
    from foveate.cli.claims import claims as work

    work(name)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A system with claims, or a .yaml file of your own.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs and reproduction.json.")],
    row: Annotated[int, typer.Option(metavar="N", min=1, help="Which of its claims, as foveate claims numbers them.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="So many questions of each benchmark; all, if not given.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Benchmarks of lmms-eval instead of the claim's own.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds runs.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 1,
    companion: Companion = None,
    artifacts: Artifacts = None,
) -> None:
    """Run a claim's benchmark on its model, without and with the recipe, and print the claim beside what was measured.

    \b
    foveate reproduce hiprune --row 3 --tasks pope --limit 500 --out runs/hiprune-64
    """
    from foveate.cli.claims import ReproduceRequest
    from foveate.cli.claims import reproduce as work

    work(ReproduceRequest(name, row, out, limit, tasks, resume, device, dtype, batch_size, companion, artifacts))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a bench, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it, if not to DIR/report.html.", show_default=False),
    ] = None,
) -> None:
    """Write a bench as one HTML page: charts, heat map, layers, examples with the kept tokens, all numbers.

    \b
    foveate report runs/mine --out mine.html
    """
    from foveate.cli.report import report as work

    work(folder, out)


@app.command()
def tune(
    model: Model = "reference",
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="Bound: the mean score may drop by so much (0.02: two points).")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="COST",
            help="With --max-drop, what is to be least: prefill (default), ttft, decode, total or kv (for text models).",
        ),
    ] = None,
    max_kv: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Bound: KV bytes, as a share of the unmodified model's.")
    ] = None,
    max_prefill: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Bound: prefill seconds, as a share of the unmodified model's.")
    ] = None,
    tasks: Tasks = None,
    data: Data = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    methods: Annotated[
        str, typer.Option(metavar="LIST", help="Names separated by commas, or all; random and uniform always take part.")
    ] = "all",
    compose: Annotated[bool, typer.Option("--compose", help="Also pairs of methods that act at different places.")] = False,
    minutes: Annotated[
        float, typer.Option(metavar="M", min=0.01, help="Time for search and validation; the last trial is finished.")
    ] = 15.0,
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most trials.", show_default=False)] = None,
    rungs: Annotated[
        str, typer.Option(metavar="LIST", help="Questions after which a trial must have earned the next.")
    ] = "50,200,800",
    validate: Annotated[int, typer.Option(metavar="N", min=1, help="Held-out questions for the winner.")] = 1500,
    hints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder in which probes ran; what they say is tried first.", show_default=False),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for recipe.yaml, evidence.json and trials.json.")] = Path(
        "runs/tune"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on in DIR; finished trials are not repeated.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 25,
    companion: Companion = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Find the fastest recipe within a quality bound, or the best one within a budget.

    Recipes are drawn, answer more and more questions beside the unmodified model, and stop as soon as nothing is to be hoped
    of them. The winner has to keep the promise on held-out questions, and is compared with random and uniform selection at
    its cost.

    \b
    foveate tune --max-drop 0.02 --target prefill
    foveate tune --max-kv 0.25 --methods snapkv,mixkv,prefixkv --minutes 10
    foveate tune --max-drop 0.02 --data receipts.jsonl --metric anls --model llava-hf/llava-1.5-7b-hf
    """
    from foveate.cli.own_data import OwnData
    from foveate.cli.tune import TuneRequest
    from foveate.cli.tune import tune as work

    work(
        TuneRequest(
            model=model,
            max_drop=max_drop,
            target=target,
            max_kv=max_kv,
            max_prefill=max_prefill,
            tasks=tasks,
            data=OwnData(data, metric, max_new_tokens),
            methods=methods,
            compose=compose,
            minutes=minutes,
            trials=trials,
            rungs=rungs,
            validate=validate,
            hints=hints,
            seed=seed,
            out=out,
            resume=resume,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            companion=companion,
            artifacts=artifacts,
            model_args=model_args,
            system=system,
        )
    )


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reference model, a checkpoint folder, or a Hub id.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS OF VLLM]", help="Handed on to vllm serve.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="What to apply, as text, a .yaml file or a name on the Hub; without one the model runs as it is.",
            show_default=False,
        ),
    ] = None,
    min_keep: Annotated[
        str | None,
        typer.Option(
            metavar="K", help="Fewest tokens of a picture that a request may ask for, a count or share.", show_default=False
        ),
    ] = None,
    max_keep: Annotated[
        str | None, typer.Option(metavar="K", help="Most; all, if nothing is given.", show_default=False)
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="auto (vllm where it is installed, else transformers), vllm, transformers.")
    ] = "auto",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="At which port.")] = 8000,
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="On vLLM, engines side by side on this machine.")] = 1,
    shadow: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0, max=1, help="Greedy requests answered a second time, with all tokens, to compare."
        ),
    ] = 0.0,
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Pixels of a picture.")] = 16_000_000,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Bytes of a request.")] = 32 * 2**20,
    max_queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests inside at a time, running or waiting; others get a 429.")
    ] = 256,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="A host that pictures are fetched from; repeat it for several.", show_default=False
        ),
    ] = None,
    allow_other_media: Annotated[
        bool, typer.Option("--allow-other-media", help="On vLLM, let videos and sound pass; nobody looks into them.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    companion: Companion = None,
    artifacts: Artifacts = None,
) -> None:
    """Serve a model with a recipe behind OpenAI's API.

    On vLLM where it is installed, else on transformers. Clients may ask for a keep of their own, within your bounds:
    "foveate": {"keep": 64}. What behind a -- follows goes to vllm serve.

    \b
    foveate serve reference --recipe "hiprune(keep=36)" --min-keep 16 --engine transformers
    foveate serve llava-hf/llava-1.5-7b-hf --recipe "hiprune(keep=0.22)" --replicas 2 -- --max-model-len 4096
    """
    from foveate.cli.serve import ServeRequest
    from foveate.cli.serve import serve as work

    request = ServeRequest(
        model=model,
        recipe=recipe,
        min_keep=min_keep,
        max_keep=max_keep,
        engine=engine,
        host=host,
        port=port,
        replicas=replicas,
        shadow=shadow,
        max_images=max_images,
        max_pixels=max_pixels,
        max_body=max_body,
        max_queue=max_queue,
        media_domains=allow_media_domain or (),
        other_media=allow_other_media,
        device=device,
        dtype=dtype,
        companion=companion,
        artifacts=artifacts,
        more=more or (),
    )
    raise typer.Exit(work(request))


@app.command()
def run(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The question.")],
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A picture that Pillow reads, or the URL of one; repeat it for several. None for a text model.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeText = "none",
    model: Model = "reference",
    max_new_tokens: Longest = 64,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    companion: Companion = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Answer a question about a picture, or, for a text model, a prompt, with and without a recipe.

    \b
    foveate run --image scene.png --prompt "what does the sign say?" --recipe "hiprune(keep=64) + fastv(layer=4)"
    foveate run --image a.png --image https://example.org/b.png --prompt "what differs?" --system "Be brief." \\
      --model Qwen/Qwen2.5-VL-3B-Instruct --model-args "device_map=auto,attn_implementation=eager"
    foveate run --model smol --prompt "$(cat README.md) What is this about?" --recipe "snapkv(keep=0.2)"
    """
    from foveate.cli.run import RunRequest
    from foveate.cli.run import run as work

    common = (image or (), prompt, recipe, model, max_new_tokens, seed, device, dtype, companion)
    work(RunRequest(*common, artifacts, model_args, system))


@app.command()
def batch(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Rows with id, image and question, as --data of foveate bench has them: JSON, CSV, TSV, parquet, or a "
            "folder saved by Hugging Face datasets.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File for the answers, a line of JSON for each id.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="What to apply, as text, a .yaml file or a name on the Hub.  [default: none]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="reference (embedded, no download; if nothing is given), a checkpoint folder, or a Hub id; with --server "
            "one of those that it serves.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask this running server, which speaks the protocol of OpenAI, instead of loading a model.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="With --server of foveate serve: tokens of each picture, a count, a share or full.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens, of rows without max_new_tokens.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random methods.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Rows that a worker is at together (8; with --server 16 requests).",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="The Ray that workers run on: local starts one here, auto finds it."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="How many; without, as many as there are cores or GPUs, with --server 2.",
            show_default=False,
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed; those lines are dropped first.")
    ] = False,
    companion: Companion = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Answer a file of questions on Ray, with one line for each id, whatever is killed meanwhile.

    The same command goes on where it was interrupted. A row that fails gets a line that says why, and the exit code is 1.

    \b
    foveate batch in.jsonl out.jsonl --recipe "hiprune(keep=0.22)" --model llava-hf/llava-1.5-7b-hf
    foveate batch in.jsonl out.jsonl --server http://localhost:8000
    """
    from foveate.cli.batch import BatchRequest
    from foveate.cli.batch import batch as work

    asked = (data, out, recipe, model, server, keep, max_new_tokens, seed, device, dtype, batch_size, address, workers)
    work(BatchRequest(*asked, retry_failed, companion, artifacts, model_args, system))


@app.command()
def watch(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video file, or camera:0 for the first camera.")],
    ask: Annotated[list[str], typer.Option(metavar="TEXT", help="A question; repeat it for several.")],
    at: Annotated[
        list[float] | None,
        typer.Option(metavar="SECONDS", help="When to ask, one for each question; without, at the video's end."),
    ] = None,
    recipe: RecipeText = "hermes(keep=4000)",
    fps: Annotated[float, typer.Option(metavar="N", help="Frames a second that the model is shown at most.")] = 1.0,
    chunk: Annotated[int, typer.Option(metavar="N", min=1, help="Frames that the model reads at once.")] = 1,
    model: Model = "reference",
    max_new_tokens: Longest = 64,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Watch a video or a camera as a stream, and answer questions about what has come so far.

    \b
    foveate watch film.mp4 --ask "what moves?" --at 12 --ask "what has happened?" --at 60 --recipe "hermes(keep=2000)" \\
      --model llava-hf/llava-onevision-qwen2-7b-ov-hf
    """
    from foveate.cli.watch import WatchRequest
    from foveate.cli.watch import watch as work

    common = (video, ask, at or (), recipe, model, fps, chunk, max_new_tokens, seed, device, dtype)
    work(WatchRequest(*common, artifacts, model_args, system))


@app.command()
def inspect(
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="What to look at, as text, a .yaml file or a name on the Hub.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Another one, drawn beside it.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A picture, the URL of one, or sample:astronaut and others that libraries carry; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question about it.", show_default=False)] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A generated question instead, whose evidence is known.", show_default=False),
    ] = None,
    index: Annotated[int, typer.Option(metavar="N", min=0, help="Number of the question of --task.")] = 0,
    model: Model = "reference",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for inspect.png and inspect.html.")] = Path(
        "runs/inspect"
    ),
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer to --prompt, in tokens.")] = 32,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    companion: Companion = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Draw which patches of a picture survive where, and what they were ranked by.

    \b
    foveate inspect --image sample:astronaut --prompt "what is there?" --recipe "scope(keep=32)" --against "fastv(keep=32)"
    foveate inspect --task attribute --index 3 --recipe "tome(keep=32)"
    """
    from foveate.cli.inspect import InspectRequest
    from foveate.cli.inspect import inspect as work

    work(
        InspectRequest(
            image or [],
            prompt,
            task,
            index,
            recipe,
            against,
            model,
            out,
            max_new_tokens,
            seed,
            device,
            dtype,
            companion,
            artifacts,
            model_args,
            system,
        )
    )


@app.command()
def calibrate(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="A method that needs numbers from the model: shortv, 'alvts(steps=500)'."),
    ],
    model: Model = "reference",
    data: Data = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            min=1,
            help="Questions per generated task (16 if not given), or of --data the first N (96). index_preserving learns "
            "from N drawn pictures, or from the evidence in the first N rows of --data (2000). dtr compares all prompts of "
            "--data, or the first N.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for METHOD.json.  [default: runs/calibrate/MODEL]", show_default=False),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Make the numbers that a method needs from a model.

    Other commands take the folder with --artifacts; those in the folder foveate of a checkpoint are always found.

    \b
    foveate calibrate shortv --model checkpoints/llava --data receipts.jsonl --out runs/receipts
    foveate calibrate alvts --model checkpoints/llava --out checkpoints/llava/foveate
    """
    from foveate.cli.calibrate import CalibrateRequest
    from foveate.cli.calibrate import calibrate as work

    work(CalibrateRequest(method, model, data, n, out, seed, device, dtype, batch_size, model_args, system))


@app.command()
def quantize(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="A method that replaces weights: 'rtn(bits=4, group_size=64)'. In a recipe, samples are read by what acts "
            "before the language model.",
        ),
    ],
    model: Model = "reference",
    data: Data = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            min=1,
            help="Questions per generated task (16 if not given), or of --data the first N (96), for methods that look at "
            "samples: with their answers.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for METHOD.json and its blocks; a run that was cut short is gone on with.  "
            "[default: runs/quantize/MODEL]",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for a checkpoint that other loaders read, too (compressed-tensors), where the method allows it.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 4,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """Replace a model's weights by whole numbers, block by block; the model's own files stay as they are.

    Other commands take the folder with --artifacts; what lies in the folder foveate of a checkpoint is always found.

    \b
    foveate quantize "rtn(bits=4, group_size=64)" --model checkpoints/llava --out runs/llava-w4
    foveate quantize "rtn(bits=8)" --model checkpoints/llava --export checkpoints/llava-w8
    foveate quantize "vlm_ptq(bits=3) + hiprune(keep=64)" --model checkpoints/llava --out runs/llava-w3
    """
    from foveate.cli.quantize import QuantizeRequest
    from foveate.cli.quantize import quantize as work

    work(QuantizeRequest(method, model, data, n, out, seed, device, dtype, batch_size, model_args, system, export))


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Everything about one of them.", show_default=False)
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Which of them run on which model family, and why not.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --matrix: on this model (reference, a folder, or a Hub id).")
    ] = None,
    artifacts: Artifacts = None,
    model_args: ModelArgs = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods: where they act, what they need, and with --matrix where they run.

    \b
    foveate methods hiprune
    foveate methods --matrix --model llava-hf/llava-1.5-7b-hf
    """
    if model is not None and not matrix:
        raise typer.BadParameter(f"{model!r} is for --matrix; give both", param_hint="--model")
    if name is not None and matrix:
        raise typer.BadParameter(f"{name!r} says where that method runs; give one of them", param_hint="--matrix")
    for option, given in {"--artifacts": artifacts, "--model-args": model_args}.items():
        if given is not None and model is None:
            raise typer.BadParameter(f"{given!r} is for the matrix of one model; give --model", param_hint=option)
    if name is not None:
        from foveate.cli.method import method as explain

        explain(name, as_json=as_json)
    elif matrix:
        from foveate.cli.matrix import matrix as show

        show(model, artifacts, model_args, as_json=as_json)
    else:
        from foveate.cli.methods import methods as work

        work(as_json=as_json)


@probe_app.command("information-horizon")
def information_horizon(
    model: Model = "reference",
    tasks: Tasks = None,
    data: Data = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Questions per task.")] = 50,
    windows: Annotated[
        int, typer.Option(metavar="N", min=0, help="Questions per task of which every window is looked at by itself.")
    ] = 4,
    window: Annotated[int, typer.Option(metavar="N", min=1, help="Side of a window, in tokens.")] = 2,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="What is lost without a window, not what it adds to none.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="A smaller loss (of score, of probability) is none.")
    ] = 0.01,
    out: ProbeOut = Path("runs/probe"),
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 25,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """See from which layer on the visual tokens no longer matter.

    All of them leave before a layer, or all but one window of the picture: what does that do to the score, and to the
    probability of the right answer? Goes on where it was interrupted.

    \b
    foveate probe information-horizon --tasks reading,counting --n 100 --out runs/mine
    """
    from foveate.bench.probes.horizon_run import HorizonOptions
    from foveate.cli import probe
    from foveate.cli.own_data import OwnData

    own = OwnData(data, metric, max_new_tokens)
    request = probe.ProbeRequest(model, tasks, own, n, seed, out, device, dtype, batch_size, model_args, system)
    probe.information_horizon(request, HorizonOptions(batch_size, windows, window, leave_one_out, tolerance))


@probe_app.command()
def embedlens(
    model: Model = "reference",
    tasks: Tasks = None,
    data: Data = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Questions per task; pictures as many again.")] = 50,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="A token is of a kind if one of its K nearest words is.  [default: 3; 1 if there are few words]",
            show_default=False,
        ),
    ] = None,
    out: ProbeOut = Path("runs/probe"),
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 25,
    model_args: ModelArgs = None,
    system: System = None,
) -> None:
    """See which visual tokens are sinks, which are dead, and which are alive.

    Visual tokens are read as the words whose embeddings they are nearest to. Those that are the same in every picture are
    then removed, to see whether anything is lost. Goes on where it was interrupted.

    \b
    foveate probe embedlens --tasks reading,counting --n 100 --out runs/mine
    """
    from foveate.cli import probe
    from foveate.cli.own_data import OwnData

    own = OwnData(data, metric, max_new_tokens)
    request = probe.ProbeRequest(model, tasks, own, n, seed, out, device, dtype, batch_size, model_args, system)
    probe.embedlens(request, top_k)


def help_if_alone(context: typer.Context) -> None:
    """Show the help of a group that is called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.add_typer(
    probe_app,
    name="probe",
    help="See what a model does with its visual tokens.",
    callback=help_if_alone,
    invoke_without_command=True,
    no_args_is_help=False,
)
app.add_typer(
    reference_app,
    name="reference",
    help="Train what the embedded reference model needs.",
    callback=help_if_alone,
    invoke_without_command=True,
    no_args_is_help=False,
)
