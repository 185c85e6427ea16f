"""The report of a bench: one HTML file that holds all it needs, made from the bench's folder."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foveate.bench.cells import REFERENCE_POINTS, keep_text
from foveate.bench.chance import REASONS
from foveate.bench.difficulty import LEAST, difficulties
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import beats
from foveate.bench.summary import kept_everything, means, no_better_than_random, random_beside
from foveate.core.errors import FoveateError
from foveate.core.files import write_whole
from foveate.report import heat, numbers, story
from foveate.report.across import across
from foveate.report.bench_charts import layer_charts, mean_charts, mean_front, probe_chart, task_charts
from foveate.report.gallery import gallery
from foveate.report.looks import MARKERS, method_looks
from foveate.report.places import by_place
from foveate.report.training_mark import needs_training

_MOST_LINES = 9
"""More methods than that, and a chart begins with those on the front alone."""


@dataclass(frozen=True)
class Row:
    """A record, and whether it is weaker than random selection."""

    record: Record
    weak: bool


def write_page(folder: Results, path: Path) -> None:
    """Write the report of a bench to ``path``."""
    try:
        write_whole(path, page(folder).encode())
    except OSError as error:
        raise FoveateError(f"out={str(path)!r}: cannot be written ({error.strerror}); name another file") from error


def page(folder: Results) -> str:
    """The report of a bench as HTML."""
    records = folder.records
    if not records:
        raise FoveateError(f"folder={str(folder.path)!r}: holds no finished cell yet; foveate bench --resume goes on there")
    axis = across(records)
    over_tasks, drawn = axis.of(means(records, folder.pairs)), axis.of(records)
    weak = no_better_than_random(folder, records)
    compared = [r for r in records if r.method not in REFERENCE_POINTS and random_beside(folder, r) is not None]
    notes = folder.document("tasks.json") or {}
    tasks = list(dict.fromkeys(record.task for record in records))
    look = method_looks(record.method for record in records)
    best = mean_front(over_tasks)
    on_front = {mean.method for mean in over_tasks if (mean.speedup, mean.retention) in best}
    methods = list(look)
    environment = _environment()
    script = Markup(_source(environment, "report.js"))
    return environment.get_template("report.html").render(
        about=folder.document("settings.json"),
        across=axis,
        style=Markup(_source(environment, "report.css")),
        script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        markers=MARKERS,
        looks=look,
        shown=methods if len(methods) <= _MOST_LINES else on_front | set(REFERENCE_POINTS),
        tasks=tasks,
        keeps=list(dict.fromkeys(keep_text(record.keep) for record in records if record.keep is not None)),
        notes=notes,
        chances=[note["chance"] for note in notes.values() if note.get("chance")],
        reasons=REASONS,
        below_floor=[task for task in tasks if notes.get(task, {}).get("below_floor")],
        rankings=story.rankings(over_tasks),
        offers=story.offers(over_tasks),
        for_training=[method for method in methods if needs_training(method)],
        idle=story.by_method(kept_everything(records)),
        weak=story.by_method(weak),
        weak_count=len(weak),
        compared=len(compared),
        worse=story.by_method(_worse_than_random(folder, weak)),
        failures=folder.document("failures.json") or [],
        places=by_place(methods, str),
        mean_charts=mean_charts(over_tasks, look, axis),
        task_charts=task_charts(drawn, notes, look, axis),
        maps=heat.maps(records, over_tasks, weak),
        ramp_style=heat.ramp_style(),
        layer_charts=layer_charts(folder, look),
        probes=_probes(folder),
        gallery=gallery(folder),
        rows=[Row(record, record in weak) for record in records],
        references=REFERENCE_POINTS,
        apart=[each for each in difficulties(folder, records) if each.simple or each.difficult],
        least=LEAST,
    )


def _worse_than_random(folder: Results, weak: list[Record]) -> list[Record]:
    """Of the records that do not beat ``random``, those that it beats."""
    against = [(record, random_beside(folder, record)) for record in weak]
    return [record for record, random in against if random and beats(folder.scores(random), folder.scores(record))]


def _probes(folder: Results) -> dict[str, Any] | None:
    """What ``probes.json`` has to show: ``{"title", "figures"}``, of which the title may be left out."""
    found = folder.document("probes.json")
    if found is None:
        return None
    try:
        return {"title": found.get("title", "Probes"), "charts": [probe_chart(figure) for figure in found["figures"]]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FoveateError(f"probes.json: must hold figures with series of x and y ({error!r})") from error


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("foveate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (
        numbers.between,
        numbers.percent,
        numbers.points,
        numbers.fixed,
        numbers.factor,
        numbers.seconds,
        numbers.size,
        keep_text,
    )
    environment.filters.update({function.__name__: function for function in shown})
    return environment


def _source(environment: Environment, name: str) -> str:
    """A template as it is: style sheet and script hold no data, and braces of their own."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
