"""What a tune shows: what it tried, which recipe it found, and how far that is from plain selection at the same cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from operator import itemgetter

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.chance import Chance
from foveate.report.chance_panel import chance_panel
from foveate.report.numbers import factor, percent
from foveate.tune.evidence import Evidence, Interval
from foveate.tune.goal import Goal
from foveate.tune.journal import Tried
from foveate.tune.run import Result

_MOST_ROWS = 40


def tune_table(goal: Goal, result: Result, last_rung: int, chance: Chance | None = None) -> RenderableType:
    """The trials that came far, what became of the others, and the verdict."""
    known = [(_rank(goal, each.evidence), each, each.evidence) for each in result.tried if each.evidence]
    far = sorted(known, key=itemgetter(0))[:_MOST_ROWS]
    outcomes = Counter(each.outcome for each in result.tried)
    counted = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    title = Text(f"{goal}: {len(result.tried)} trials ({counted}), the best of those that came furthest first", style="bold")
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, justify in (("#", "right"), ("recipe", "left"), ("n", "right"), ("drop [95 %]", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for column in ("prefill", "KV %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("ended by", overflow="fold")
    for _, each, evidence in far:
        table.add_row(*_row(each, evidence), style="" if goal.within(evidence) else "dim")
    return Group(*chance_panel([chance] if chance else []), table, *_verdict(goal, result))


def standing(goal: Goal, evidence: Evidence) -> str:
    """The evidence in a few words."""
    saved = f"KV {percent(evidence.shares['kv'].value)} %"
    if goal.cost != "kv" and goal.cost in evidence.shares:
        saved = f"{goal.cost} {_speedup(evidence, goal.cost)}"
    return f"{evidence.n} questions, drop {_points(evidence.drop)}, {saved}"


def _rank(goal: Goal, evidence: Evidence) -> tuple[float, ...]:
    """First those that came far, of these the ones within the bound, of these the best."""
    return -evidence.n, not goal.within(evidence), goal.wanted(evidence).value


def _row(tried: Tried, evidence: Evidence) -> Iterator[str]:
    yield str(tried.number)
    yield tried.recipe
    yield str(evidence.n)
    yield _points(evidence.drop)
    yield _speedup(evidence, "prefill")
    yield percent(evidence.shares["kv"].value)
    yield tried.why or tried.outcome


def _verdict(goal: Goal, result: Result) -> Iterator[Text]:
    for look in result.looks:
        if look is not result.winner:
            yield Text(
                f"{look.recipe}: broke the promise on held-out questions: {standing(goal, look.evidence)}", style="yellow"
            )
    winner = result.winner
    if winner is None:
        why = "no recipe kept it" if result.looks else "no recipe seemed to keep it"
        yield Text(f"{goal}: {why}; the model is best left as it is", style="bold yellow")
        return
    proof = (
        "kept, and proved (the whole interval is within the bound)" if winner.proved else "kept (not proved: see interval)"
    )
    yield Text(f"{winner.recipe}", style="bold green")
    yield Text(f"  on held-out questions: {standing(goal, winner.evidence)}; promise {proof}")
    for each in result.baselines:
        beaten = "better than" if each.beaten else "NOT better beyond noise than"
        saved = standing(goal, each.evidence).split(", ", 1)[1]
        line = f"  {beaten} {each.recipe} at about that cost ({saved}): ahead by {_points(each.ahead)}"
        yield Text(line, style="" if each.beaten else "yellow")


def _points(interval: Interval) -> str:
    """Shares as points of a hundred."""
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def _speedup(evidence: Evidence, cost: str) -> str:
    share = evidence.shares.get(cost)
    return factor(1 / share.value if share else None)
