"""The page of `benchmarks.quantization`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean, median
from typing import Any, NamedTuple

import numpy as np

from foveate.bench.statistics import ratio

DRAWS = 2000
PLAIN = {False: "rtn(clip=True)", True: "dasq(density=0.0)"}
"""Rounding to nearest with clipped ranges, of the language model and of the encoder."""
REQUESTS = (1, 16, 64)
ENCODER = ("dasq", "ls_vit")
"""Methods for the encoder stand in tables of their own."""
_LEAST = 1e-3
"""Of a ratio: one of none has no logarithm."""


class Key(NamedTuple):
    """What a record is of."""

    model: str
    sick: bool
    method: str
    setting: str
    seed: int
    keep: float | None


class Mean(NamedTuple):
    """A mean over questions and seeds, with its 95 % interval; of how many seeds."""

    value: float
    low: float
    high: float
    seeds: int


Records = Mapping[Key, Mapping[str, Any]]


def mean(records: Sequence[Mapping[str, Any]], what: str) -> Mean:
    """Over questions and seeds; both are drawn anew."""
    values = np.array([record[what] for record in records], dtype=float)
    rng, (seeds, n) = np.random.default_rng(0), values.shape
    drawn = [values[rng.integers(seeds, size=seeds)][:, rng.integers(n, size=n)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Mean(float(values.mean()), float(low), float(high), seeds)


def page(content: Mapping[str, Any], settings: Sequence[str]) -> str:
    """All of it, in Markdown."""
    records = {Key(*json.loads(key)): one for key, one in content["cells"].items()}
    cells = {key: one for key, one in records.items() if key.keep is None}
    lines = [*_head(cells), *_glance(cells, settings)]
    for model, sick in dict.fromkeys(
        (key.model, key.sick) for key in sorted(cells, key=lambda key: (key.model, not key.sick))
    ):
        lines += _copy(model, sick, cells, settings)
    lines += _spread(cells)
    lines += _sizes(cells, settings)
    lines += _together({key: one for key, one in records.items() if key.keep is not None})
    lines += _speed(content["speed"], content.get("where", ""))
    return "\n".join(lines) + "\n"


HEAD = """# Quantized models, measured

Written by `python -m benchmarks.quantization`, which goes on where it was stopped, and adds methods that are new.
Reference models in float32, {n} questions of the six spine tasks, 24 prompts with answers for calibration (others for
each seed). **KL** is that of the float model's distribution to the quantized one's (nats), where the words of the right
answer and its end are predicted, mean over words, then over questions; in brackets its 95 % interval, by drawing
questions (and seeds, where there are several) anew. *Same*: the share of these words at which the likeliest is the float
model's. *Right*: the share of answers all of whose words are the likeliest, in percent. Small models answer right long
after their distributions have moved, so KL says more.

All grids are symmetric. W4: 4 bits a weight, with a step for each row; g64: one for each 64 inputs; A8: inputs are
rounded to 8 bits. Ranges are clipped in all rows but `rtn`, `smoothquant`, `masquant` and `quant_experts`, each by the
method's own rule: below 4 bits that is worth more than most of what comes after. *Sick* copies compute the same function
(logits equal to 1e-4), with a channel of the inputs of each group of linears a hundred times larger in every other block,
and the weights that read it smaller by as much: healthy models have no outliers, so they cannot show what is gained where
there are some.

Models of 5 M weights do not tell how these methods compare on one of billions. What cannot be told apart here is
whatever lies within the other's interval. A cell that is empty has not been measured yet."""
SPEED = """
## Whole models

Four layers 1,024 wide with random weights (51 M in linears: small), a prompt of 128 words and 16 steps behind it, one
thread of a processor ({where}), in seconds of CPU; {rounds} rounds in which every arm runs once. Speed-ups are medians of
ratios within a round, with 95 % intervals (of three rounds or fewer their range). Bits of a weight are those with
steps, on disk and in memory. What has no kernel is unpacked in every forward: it saves memory, not time.
"""


def _head(cells: Records) -> list[str]:
    n = len(next(iter(cells.values()))["kl"]) if cells else 0
    return HEAD.format(n=n).splitlines()


def _glance(cells: Records, every: Sequence[str]) -> list[str]:
    """Each method beside plain rounding, over the models."""
    lines = [
        "",
        "## At a glance",
        "",
        "KL over that of rounding to nearest with clipped ranges, geometric mean over the models that were measured in that",
        "setting: below 1 is nearer to the floats. Bold: the lowest. How far each number may be trusted, the tables below",
        "say. What `quant_experts` and `masquant` add takes more bits on these narrow linears than the weights (*Size and",
        "time*).",
    ]
    kl = {key: fmean(one["kl"]) for key, one in cells.items() if key.seed == 0}
    for encoder, plain in PLAIN.items():
        for sick in (False, True):
            ratios: dict[tuple[str, str], list[float]] = {}
            for key, value in kl.items():
                base = kl.get(key._replace(method=plain))
                if key.sick == sick and _of_encoder(key.method) == encoder and key.method != plain and base:
                    ratios.setdefault((key.method, key.setting), []).append(max(value / base, _LEAST))
            found = {place: geometric_mean(values) for place, values in ratios.items()}
            shown = [setting for setting in every if any(place[1] == setting for place in found)]
            best = {setting: min(value for place, value in found.items() if place[1] == setting) for setting in shown}
            part, copies = "encoder" if encoder else "language model", "sick copies" if sick else "healthy models"
            lines += ["", f"**Weights of the {part}, {copies}**", ""]
            lines += ["| | " + " | ".join(shown) + " |", "|---|" + "--:|" * len(shown)]
            for method in dict.fromkeys(place[0] for place in found):
                values = [found.get((method, setting)) for setting in shown]
                row = ["" if v is None else f"**{v:.2g}**" if v == best[s] else f"{v:.2g}" for s, v in zip(shown, values)]
                lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return lines


def _copy(model: str, sick: bool, cells: Records, settings: Sequence[str]) -> list[str]:
    mine = {key: one for key, one in cells.items() if (key.model, key.sick) == (model, sick)}
    exact = next(iter(mine.values()))["exact"]
    lines = ["", f"## `{model}`, {'sick' if sick else 'healthy'}", "", f"The floats answer {100 * exact:.0f} % right."]
    for encoder in (False, True):
        methods = [method for method in dict.fromkeys(key.method for key in mine) if _of_encoder(method) == encoder]
        shown = [one for one in settings if any(key.setting == one and key.method in methods for key in mine)]
        if not methods:
            continue
        of = {
            (method, setting): [one for key, one in mine.items() if (key.method, key.setting) == (method, setting)]
            for method in methods
            for setting in shown
        }
        lines += ["", f"**Weights of the {'encoder' if encoder else 'language model'}**", ""]
        lines += ["| KL | " + " | ".join(shown) + " |", "|---|" + "--:|" * len(shown)]
        means = {place: mean(found, "kl") for place, found in of.items() if found}
        best = {setting: min(means[place].value for place in means if place[1] == setting) for setting in shown}
        for method in methods:
            lines.append(f"| `{method}` | " + " | ".join(_kl(means.get((method, one)), best[one]) for one in shown) + " |")
        lines += ["", "| same / right, % | " + " | ".join(shown) + " |", "|---|" + "--:|" * len(shown)]
        for method in methods:
            lines.append(f"| `{method}` | " + " | ".join(_right(of[method, one]) for one in shown) + " |")
    return lines


def _of_encoder(method: str) -> bool:
    return method.partition("(")[0] in ENCODER


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.01 else f"{value:.4f}"


def _kl(found: Mean | None, best: float) -> str:
    if found is None:
        return ""
    value = f"**{_number(found.value)}**" if found.value == best else _number(found.value)
    return f"{value} [{_number(found.low)}, {_number(found.high)}]"


def _right(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    return " / ".join(f"{100 * fmean(fmean(one[what]) for one in found):.0f}" for what in ("same", "right"))


def _spread(cells: Records) -> list[str]:
    """Least and largest KL over seeds, where there are several."""
    by: dict[tuple[str, bool, str, str], list[float]] = {}
    for key, one in cells.items():
        by.setdefault((key.model, key.sick, key.method, key.setting), []).append(fmean(one["kl"]))
    several = {key: values for key, values in by.items() if len(values) > 1}
    if not several:
        return []
    lines = [
        "",
        "## How much the samples matter",
        "",
        "Mean KL with other prompts for calibration. Rows of the tables above that differ by less do not differ.",
        "",
        "| model | method | setting | seeds | least | largest |",
        "|---|---|---|--:|--:|--:|",
    ]
    for (model, sick, method, setting), values in several.items():
        name = f"`{model}`{', sick' if sick else ''}"
        least, most = _number(min(values)), _number(max(values))
        lines.append(f"| {name} | `{method}` | {setting} | {len(values)} | {least} | {most} |")
    return lines


def _sizes(cells: Records, every: Sequence[str]) -> list[str]:
    settings = [setting for setting in every if any(key.setting == setting for key in cells)]
    lines = [
        "",
        "## Size and time",
        "",
        "Bits of a weight on disk with all that stands beside it, and seconds of CPU of quantizing (one thread; without the",
        "encoder's passes over the samples, which are the same for all), medians over models and seeds. Where a method's",
        "files differ between a healthy model and its sick copy, both are given. What has a rank weighs far more on linears",
        "192 wide than on those of a large model.",
        "",
        "| bits; seconds | " + " | ".join(settings) + " |",
        "|---|" + "--:|" * len(settings),
    ]
    for method in dict.fromkeys(key.method for key in cells):
        row = []
        for setting in settings:
            found = {key: one for key, one in cells.items() if (key.method, key.setting) == (method, setting)}
            bits = [
                round(median(one["bits"] for key, one in found.items() if key.sick == sick), 1)
                for sick in (False, True)
                if any(key.sick == sick for key in found)
            ]
            said = " / ".join(f"{one:.1f}" for one in dict.fromkeys(bits))
            row.append(f"{said}; {median(one['spent'] for one in found.values()):.0f}" if found else "")
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return lines


def _together(cells: Records) -> list[str]:
    if not cells:
        return []
    lines = [
        "",
        "## Quantized and pruned",
        "",
        "Is a model that is both worth more than one that is either, at equal memory? Weights of the language model by",
        "`vlm_ptq`, visual tokens by `hiprune`. Memory is that of the weights as they lie on disk and of the cache of so",
        "many requests at once, both as in bfloat16 where they are floats, in MB. Bold: nothing that was measured takes no",
        "more memory and has a lower KL.",
    ]
    for model in dict.fromkeys(key.model for key in cells):
        mine = {key: one for key, one in cells.items() if key.model == model}
        sizes = {
            key: [(one["weights"] + requests * one["cache"]) / 1e6 for requests in REQUESTS] for key, one in mine.items()
        }
        kl = {key: mean([one], "kl") for key, one in mine.items()}
        lines += [
            "",
            f"**`{model}`**",
            "",
            "| weights | visual tokens | KL | same / right, % | "
            + " | ".join(f"{requests} request{'s' * (requests > 1)}" for requests in REQUESTS)
            + " |",
            "|---|--:|--:|--:|" + "--:|" * len(REQUESTS),
        ]
        for key, one in mine.items():
            cost = []
            for place in range(len(REQUESTS)):
                size = sizes[key][place]
                beaten = any(
                    sizes[other][place] <= size and kl[other].value < kl[key].value for other in mine if other != key
                )
                cost.append(f"{size:.1f}" if beaten else f"**{size:.1f}**")
            share = f"{100 * (key.keep or 0):.0f} %"
            low, high = _number(kl[key].low), _number(kl[key].high)
            told = f"{_number(kl[key].value)} [{low}, {high}]" if kl[key].value else "0"
            lines.append(f"| {key.setting} | {share} | {told} | {_right([one])} | " + " | ".join(cost) + " |")
        lines += ["", *_equal(mine, sizes, kl)]
    return lines


def _equal(mine: Records, sizes: Mapping[Key, Sequence[float]], kl: Mapping[Key, Mean]) -> list[str]:
    """What is best within the memory of each model that is only pruned."""
    lines = [
        "| within the memory of | requests | MB | only pruned: KL | only quantized | both |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for key in (one for one in mine if one.setting == "floats" and one.keep != 1):
        for place, requests in enumerate(REQUESTS):
            limit = sizes[key][place]
            within = [other for other in mine if sizes[other][place] <= limit]
            kinds = {
                "pruned": [one for one in within if one.setting == "floats"],
                "quantized": [one for one in within if one.setting != "floats" and one.keep == 1],
                "both": [one for one in within if one.setting != "floats" and one.keep != 1],
            }
            told = [
                f"{_number(kl[best].value)} ({best.setting}, {100 * (best.keep or 0):.0f} %)" if best is not None else "-"
                for best in (min(of, key=lambda one: kl[one].value, default=None) for of in kinds.values())
            ]
            lines.append(f"| floats, {100 * (key.keep or 0):.0f} % | {requests} | {limit:.1f} | " + " | ".join(told) + " |")
    return lines


def _speed(rounds: Sequence[Mapping[str, Mapping[str, float]]], where: str) -> list[str]:
    if not rounds:
        return []
    lines = [
        *SPEED.format(where=where, rounds=len(rounds)).splitlines(),
        "",
        "| | bits on disk | in memory | prompt over float32 | over bfloat16 | step over float32 | over bfloat16 | kernel |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for arm, first in rounds[0].items():
        cells = []
        for what in ("prefill", "step"):
            for base in ("float32", "bfloat16"):
                found = ratio([one[base][what] / one[arm][what] for one in rounds])
                spread = "" if arm == base or found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
                cells.append(f"{found.value:.2f}{spread}")
        kernel = "-" if arm in ("float32", "bfloat16") else "none" if first["unpacked"] else "torch's"
        lines.append(f"| {arm} | {first['disk']:.2f} | {first['memory']:.2f} | " + " | ".join(cells) + f" | {kernel} |")
    return lines
