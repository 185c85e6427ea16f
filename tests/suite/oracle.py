"""What a method must equal: the whole conversation at full length, with rows that are not there masked, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.report import Trace
from foveate.core.roles import Role
from foveate.engine.attention import visible
from foveate.engine.cache import FoveateLayer
from foveate.engine.decoding import Decoding
from foveate.engine.exiting import Exiting
from foveate.engine.rows import Rows
from foveate.engine.run import Run
from foveate.engine.stored import Turning
from foveate.models import anatomy
from foveate.models.taps import TAP, tapped
from foveate.ops.attention import row_logits
from foveate.ops.rebuilt import Rebuilt


@dataclass
class Notes:
    """What a session did, forward by forward.

    Attributes:
        arriving: rows ``[B, n, D]`` that entered layer 0 in each forward that read images, None if the layer was routed.
        deepstack: with them, what the model adds to them in its first layers ``[B, n, L, D]``, if it does.
        remade: with them, for each layer before which rows were merged or given new values: the tokens ``[B, k]`` in whose
            places they stand, their hidden states ``[B, k, D]``, and what the model adds to them later.
        entering: with them, for each layer what entered it and what is added to it (as the above), after its edits.
        trace: of all turns, one after the other (that of a session is of the last one).
        held: for each forward: first query, number of queries, and for each layer the tokens ``[B, h, m]`` attended to.
        moving: rows of which an edit has moved positions (not those of ``"anchor"`` with text that keeps its own).
        moved: for each forward that read images, whether that had happened when each layer was entered.
        stored: for each layer and forward that read a store that makes keys and values anew: first query, number of queries,
            the tokens ``[B, n]`` in the store, and the keys and values ``[B, Hkv, n, d]`` that were read of them.
        skipped: of each layer whose experts a method weighs, forward by forward: tokens ``[B, n]``, and which of the experts
            chosen for them ``[B, n, K]`` did not run.
        passing: of each layer, forward by forward without images: tokens ``[B, n]`` that it did not run for, the others -1.
        leaving: forward by forward: tokens ``[B, q]`` that left before the last layer, the others -1, and what then left the
            last layer in their place ``[B, q, D]``.
        leaning: of each layer in which a method adds to attention, forward by forward: tokens ``[B, n]``, and what was added
            to the logits of each two of them ``[B, H, n, n]``, by the method's own word on all at once.
    """

    arriving: list[Tensor | None] = field(default_factory=list)
    deepstack: list[Tensor | None] = field(default_factory=list)
    remade: list[dict[int, tuple[Tensor, Tensor, Tensor | None]]] = field(default_factory=list)
    entering: list[list[tuple[Tensor, Tensor | None]]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    held: list[tuple[int, int, list[Tensor | None]]] = field(default_factory=list)
    moving: list[Rows] = field(default_factory=list)
    moved: list[list[bool]] = field(default_factory=list)
    stored: dict[int, list[tuple[int, int, Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    skipped: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    passing: dict[int, list[Tensor]] = field(default_factory=dict)
    leaving: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    leaning: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


@contextmanager
def noting() -> Iterator[Notes]:
    """Take notes of every forward of every session."""
    notes = Notes()
    enter, begin, apply, edit, weigh = Run.enter, Decoding.begin, Run._apply, Rows.edit, Run.weigh
    close = Exiting.close
    attend, attend_step = Run.attend, Decoding.attend

    def reading(cache: Any, layer: int, query: Tensor, turn: Any) -> None:
        if isinstance(cache, FoveateLayer) and isinstance(cache.store, Rebuilt):
            tokens = cache.ledger.tokens(len(query), query.device)[:, 0, : cache.store.columns]
            notes.stored.setdefault(layer, []).append((*notes.held[-1][:2], tokens, *cache.store.rebuilt(turn)))

    def attended(run: Run, layer: int, query: Tensor, *args: Any) -> Any:
        reading(run.keeping.layers[layer], layer, query, Turning().of(run.program.anatomy, layer))
        for method in run.program.leaning.get(layer, ()) if run.rows.has_pictures else ():
            (key, _, mask, scale), layout = args, run.rows.layout
            every = torch.arange(query.shape[2]).expand(len(query), -1)
            allowed = visible(mask, every, query.shape[2], key.shape[2])
            logits = row_logits(query, key, scale).masked_fill(~allowed, float("-inf"))
            bias = method.bias(layer, logits, slice(0, query.shape[2]), layout, run._read(method), run.state)
            if bias is not None:
                bias = bias.expand_as(logits)[..., -query.shape[2] :]
                notes.leaning.setdefault(layer, []).append((run.rows.tokens, bias))
        return attend(run, layer, query, *args)

    def attended_in_a_step(decoding: Decoding, layer: int, query: Tensor, *args: Any) -> Any:
        reading(decoding.layers[layer], layer, query, Turning().of(decoding.program.anatomy, layer))
        return attend_step(decoding, layer, query, *args)

    def applied(run: Run, layer: int, change: Edit, x: Tensor) -> Tensor:
        out = apply(run, layer, change, x)
        if layer > 0 and change.inserted is None and (change.values is not None or change.reduction.entries is not None):
            notes.remade[-1][layer] = run.rows.layout.origin, out, run.state.get("prefill", "deepstack")
        return out

    def edited(rows: Rows, change: Edit) -> None:
        if not (isinstance(change.positions, str) and change.positions == "anchor" and change.text_after == "keep"):
            notes.moving.append(rows)
        edit(rows, change)

    def noted(run: Run, layer: int, x: Tensor, kwargs: dict[str, Any]) -> Any:
        if layer == 0 and run.rows.has_pictures:
            notes.remade.append({})
        result = enter(run, layer, x, kwargs)
        if layer == 0:
            notes.held.append((run.rows.past, run.rows.given, []))
            if run.rows.has_pictures:
                notes.arriving.append(None if run.routes[0] is not None else result[0])
                notes.deepstack.append(run.state.get("prefill", "deepstack"))
                notes.entering.append([])
                notes.trace.log.append(run.layouts)
                notes.trace.routes.append(run.routes)
                notes.moved.append([])
        if run.rows.has_pictures:
            notes.moved[-1].append(any(run.rows is rows for rows in notes.moving))
            notes.entering[-1].append((result[0], run.state.get("prefill", "deepstack")))
        elif (plan := run.routes[layer]) is not None:
            notes.passing.setdefault(layer, []).append(run.rows.tokens.masked_fill(plan.active, -1))
        cache = run.keeping.layers[layer]
        ledger = getattr(cache, "ledger", None)  # layers with a recurrent state have none
        notes.held[-1][2].append(None if ledger is None else ledger.tokens(x.shape[0], x.device))
        return result

    def stepped(decoding: Decoding, kwargs: dict[str, Any], given: Tensor, past: int) -> Any:
        def tokens(cache: Any) -> Tensor | None:
            ledger = getattr(cache, "ledger", None)
            if ledger is None:
                return None
            coming = ledger if cache.writes else ledger.extended(1)
            return coming.tokens(given.shape[0], given.device)

        notes.held.append((past, 1, [tokens(cache) for cache in decoding.layers]))
        return begin(decoding, kwargs, given, past)

    def closed(exiting: Exiting, x: Tensor, *args: Any) -> Tensor:
        out = close(exiting, x, *args)
        if exiting.left:
            assert exiting._index is not None
            index = exiting._index
            tokens = exiting._rows.tokens.gather(1, index.clamp(min=0)).masked_fill(~exiting._left, -1)
            notes.leaving.append((tokens, exiting._out))
        return out

    def weighed(run: Run, layer: int, index: Tensor, weights: Tensor) -> Tensor:
        new = weigh(run, layer, index, weights)
        if run.routes[layer] is None:  # else rows are fewer, and others stand for them
            gone = ((new == 0) & (weights != 0)).unflatten(0, (run.rows.batch, -1))
            notes.skipped.setdefault(layer, []).append((run.rows.tokens, gone))
        return new

    with (
        patch.object(Run, "weigh", weighed),
        patch.object(Exiting, "close", closed),
        patch.object(Run, "enter", noted),
        patch.object(Run, "_apply", applied),
        patch.object(Decoding, "begin", stepped),
        patch.object(Rows, "edit", edited),
        patch.object(Run, "attend", attended),
        patch.object(Decoding, "attend", attended_in_a_step),
    ):
        yield notes


def masked_logits(
    model: Any, inputs: dict[str, Tensor], trace: Trace, starts: tuple[int, ...], notes: Notes | None = None
) -> Tensor:
    """Logits ``[B, L, V]`` of the plain model over the full sequence.

    Args:
        model: the model, no session attached.
        inputs: the whole conversation.
        trace: of the session that this is the oracle for.
        starts: where each turn that brought images began.
        notes: taken of that session; without them nothing was merged, and no cache was compressed.
    """
    parts = anatomy(model)
    ids = inputs["input_ids"]
    batch, length = ids.shape
    layers = len(parts.layers)
    groups = parts.config.num_attention_heads // parts.config.num_key_value_heads
    gone = [_gone(ids, parts, trace, starts, layer) for layer in range(layers)]
    positions: list[Tensor] = []

    def before(layer: int) -> Any:
        closed = gone[layer][:, None, None]
        for start, log in zip(starts, trace.routes):
            plan = log[layer]
            if plan is not None and not plan.frozen:
                closed = closed | _places(trace, start, starts, layer, ~plan.active, length)[:, None, None]
        if notes is not None:
            closed = closed | _unheld(notes, layer, batch, length, groups)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0]
            if layer == 0 and notes is not None:
                x = _arrived(x, notes, trace, starts)
            elif notes is not None:
                x = _remade(x, notes, starts, layer)
            if layer == 0:
                given = positions[0] if positions else torch.arange(length).expand(1, batch, -1)
                positions[:] = [_positions(given, trace, starts, number, notes) for number in range(layers)]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            # A row that sees nothing would give NaN; what it computes is masked everywhere.
            shut = closed & ~torch.eye(length, dtype=torch.bool)
            float_mask = mask.is_floating_point()
            mask = mask.masked_fill(shut, torch.finfo(mask.dtype).min) if float_mask else mask & ~shut
            for tokens, added in () if notes is None else notes.leaning.get(layer, ()):
                mask = _leant(mask, tokens, added, length).to(x.dtype)
            rope = parts.rotary(layer, x, positions[layer])
            return (x, *args[1:]), dict(kwargs, attention_mask=mask, position_embeddings=rope)

        return hook

    def after(layer: int) -> Any:
        still = torch.zeros(batch, length, dtype=torch.bool)
        for start, log in zip(starts, trace.routes):
            if log[layer] is not None:
                still |= _places(trace, start, starts, layer, ~log[layer].active, length)

        for tokens in [] if notes is None else notes.passing.get(layer, ()):
            still |= _marked(tokens, length)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            output = torch.where(still[..., None], args[0], output)
            for tokens, rows in notes.leaving if notes is not None and layer == layers - 1 else ():
                index = tokens.masked_fill((tokens < 0) | (tokens >= length), length)[..., None].expand_as(rows)
                output = torch.cat([output, output[:, :1]], dim=1).scatter(1, index, rows)[:, :length]
            return output

        return hook

    def router(skipped: list[tuple[Tensor, Tensor]]) -> Any:
        def hook(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            gone = torch.zeros(batch, length + 1, output[1].shape[1], dtype=torch.bool)
            for tokens, some in skipped:
                index = tokens.masked_fill((tokens < 0) | (tokens >= length), length)[..., None].expand_as(some)
                gone = gone.scatter(1, index, some)
            return output[0], output[1].masked_fill(gone[:, :length].flatten(0, 1), 0), output[2]

        return hook

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids")
        if given is None:
            given = torch.arange(length)[None]
        positions.append((given if given.ndim == 3 else given[None]).expand(-1, batch, -1))
        if notes is None or kwargs.get("deepstack_visual_embeds") is None:
            return None
        rows = torch.zeros(batch, length + 1, *notes.deepstack[0].shape[2:])  # type: ignore[union-attr]
        for added, start, log, remade in zip(notes.deepstack, starts, trace.log, notes.remade):
            changes = {0: (log[0].origin, added), **{layer: (at, more) for layer, (at, _, more) in remade.items()}}
            for layer, (origin, added) in changes.items():
                assert added is not None
                index = torch.where(origin >= 0, origin + start, length)[..., None, None].expand_as(added[:, :, layer:])
                rows[:, :, layer:] = rows[:, :, layer:].scatter(1, index, added[:, :, layer:])
        # Merged rows may stand in the places of others, so that any place may be added to.
        everywhere = torch.ones(batch, length, dtype=torch.bool)
        levels = [level.flatten(0, 1) for level in rows[:, :length].unbind(2)]
        return args, dict(kwargs, visual_pos_masks=everywhere, deepstack_visual_embeds=levels)

    handles = [parts.language_model.register_forward_pre_hook(ask, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(before(i), with_kwargs=True) for i, module in enumerate(parts.layers)]
    handles += [module.register_forward_hook(after(i), with_kwargs=True) for i, module in enumerate(parts.layers)]
    for layer, skipped in ({} if notes is None else notes.skipped).items():
        handles.append(parts.layers[layer].mlp.gate.register_forward_hook(router(skipped)))
    if parts.rotary_rows == 1 and "attention_mask" in inputs:
        inputs = dict(inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    try:
        with torch.no_grad(), ExitStack() as stack:
            for layer, stored in () if notes is None else notes.stored.items():
                stack.enter_context(_reading(parts, layer, stored, torch.arange(length)))
            return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _read_from_stores(
    stored: list[Any], numbers: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of the tokens ``numbers`` ``[L]``, some of which read other keys and values of tokens than were written."""

    def attention(rows: Tensor, *entries: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in entries)
        return torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows], keys, values, attn_mask=mask[:, :, rows], scale=scale
        )

    length = len(numbers)
    out = attention(torch.arange(length), key, value)
    place = torch.full((int(numbers.max()) + 2,), length)  # the last one is that of -1
    place[numbers] = torch.arange(length)
    for first, count, tokens, *read in stored:
        rows = ((numbers >= first) & (numbers < first + count)).nonzero()[:, 0]
        if not len(rows):
            continue
        spare = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
        index = place[tokens][:, None, :, None]
        changed = [x.scatter(2, index.expand_as(new), new)[:, :, :-1] for x, new in zip(spare, read)]
        out[:, :, rows] = attention(rows, *changed)
    return out


@contextmanager
def _reading(parts: Any, layer: int, stored: list[Any], numbers: Tensor) -> Iterator[None]:
    """Meanwhile a layer's attention reads what was ``stored``, where anything was."""
    attention = parts.attention(layer) if stored else None
    if attention is None:
        yield
        return
    attention.__dict__[TAP] = partial(_read_from_stores, stored, numbers)
    try:
        with tapped([attention]):
            yield
    finally:
        del attention.__dict__[TAP]


@torch.no_grad()
def short_logits(model: Any, inputs: dict[str, Tensor], trace: Trace, notes: Notes) -> Tensor:
    """Logits ``[B, L, V]`` of the decoder layers run on just the rows that are there, sample by sample (0 elsewhere).

    The oracle of models with a recurrent state, where a row that is gone was never there, and of methods that put rows in;
    one turn with images.
    """
    parts, ids = anatomy(model), inputs["input_ids"]
    out = torch.zeros(*ids.shape, parts.config.vocab_size, dtype=parts.dtype)
    layouts, arriving = trace.log[0], notes.arriving[0]
    assert arriving is not None
    prompt = int(layouts[0].origin.max()) + 1
    for sample in range(len(ids)):
        there = layouts[0].valid[sample]
        later = torch.arange(prompt, ids.shape[1])
        tokens = torch.cat([layouts[0].origin[sample, there], later])
        x = torch.cat([arriving[sample, there], model.get_input_embeddings()(ids[sample, prompt:])])[None]
        inserted = torch.zeros_like(tokens, dtype=torch.bool)
        for layer, module in enumerate(parts.layers):
            layout = layouts[layer]
            mine = layout.valid[sample]
            now = torch.cat([layout.origin[sample, mine], later])
            new = torch.cat([layout.role[sample, mine] == Role.INSERTED, torch.zeros_like(later, dtype=torch.bool)])
            entered, added = notes.entering[0][layer]
            rows = x.new_empty(1, len(now), x.shape[2])
            rows[:, ~new] = x[:, ~inserted & torch.isin(tokens, now[~new])]
            if bool(new.any()):
                put_in = entered[sample, layout.role[sample] == Role.INSERTED]
                rows[:, new] = x[:, inserted] if bool(inserted.any()) else put_in[None]
            x, tokens, inserted = rows, now, new
            if layer in notes.remade[0]:
                origin, made, _ = notes.remade[0][layer]
                there = torch.isin(tokens, origin[sample]) & ~inserted
                x = x.masked_scatter(there[:, None], made[sample, origin[sample] >= 0])
            last = layout.positions[:, sample, -1:]
            positions = torch.cat([layout.positions[:, sample, mine], last + 1 + later - prompt], dim=1)[:, None]
            held = [(past, rows, layers[layer]) for past, rows, layers in notes.held]
            mask = None if held[0][2] is None else _held_mask(tokens, held, sample)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.repeat_interleave(parts.config.num_attention_heads // mask.shape[1], dim=1)
            positions = positions[1:] if len(positions) == 4 else positions
            mine_stored = [
                (first, count, *(part[sample, None] for part in rest)) for first, count, *rest in notes.stored.get(layer, ())
            ]
            with _reading(parts, layer, mine_stored, tokens):
                x = module(x, position_embeddings=parts.rotary(layer, x, positions), attention_mask=mask)
            if added is not None and layer < added.shape[2]:
                x[:, : int(mine.sum())] += added[sample, mine, layer]
        out[sample, tokens[~inserted]] = model.lm_head(parts.language_model.norm(x))[0, ~inserted]
    return out


def _held_mask(tokens: Tensor, held: list[tuple[int, int, Any]], sample: int) -> Tensor:
    """``[1, h, n, n]``: causal, and only what the cache held when each query came."""
    row = torch.arange(len(tokens))
    mask = ((tokens < tokens[:, None]) | ((tokens == tokens[:, None]) & (row <= row[:, None])))[None]
    for past, rows, keys in held:
        now = (tokens >= past) & (tokens < past + rows)
        there = torch.stack([torch.isin(tokens, head[sample]) for head in keys.unbind(1)])
        mask = torch.where(now[:, None], mask & there[:, None], mask)
    return mask[None]


def _leant(mask: Tensor, tokens: Tensor, added: Tensor, length: int) -> Tensor:
    """The mask with what is ``added`` ``[B, H, n, n]`` to the logits of each two of ``tokens`` ``[B, n]``, as numbers."""
    if not mask.is_floating_point():
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    index = torch.where(tokens >= 0, tokens, length)[:, None]
    spare = added.new_zeros(*added.shape[:2], added.shape[2], length + 1)
    wide = spare.scatter(3, index[:, :, None].expand_as(added), added)
    whole = wide.new_zeros(*added.shape[:2], length + 1, length + 1)
    return mask + whole.scatter(2, index[..., None].expand_as(wide), wide)[..., :length, :length]


def _turn(trace: Trace, start: int, starts: tuple[int, ...], layer: int) -> Layout:
    return trace.log[starts.index(start)][layer]


def _marked(tokens: Tensor, length: int) -> Tensor:
    """``[B, L]``: which tokens of the conversation are among ``tokens`` ``[B, n]`` (-1 = none)."""
    index = tokens.masked_fill((tokens < 0) | (tokens >= length), length)
    return torch.zeros(tokens.shape[0], length + 1, dtype=torch.bool).scatter(1, index, True)[:, :length]


def _places(trace: Trace, start: int, starts: tuple[int, ...], layer: int, chosen: Tensor, length: int) -> Tensor:
    """``[B, L]``: where the ``chosen`` rows of a turn's layout stand in the conversation."""
    layout = _turn(trace, start, starts, layer)
    out = torch.zeros(layout.shape[0], length + 1, dtype=torch.bool)
    index = torch.where(chosen & (layout.origin >= 0), layout.origin + start, length)
    return out.scatter(1, index, True)[:, :length]


def _gone(ids: Tensor, parts: Any, trace: Trace, starts: tuple[int, ...], layer: int) -> Tensor:
    """``[B, L]``: placeholders that are not alive in a layer."""
    length = ids.shape[1]
    alive = torch.zeros_like(ids, dtype=torch.bool)
    for start in starts:
        alive |= _places(trace, start, starts, layer, _turn(trace, start, starts, layer).valid, length)
    shown = torch.isin(ids, torch.tensor((*parts.image_tokens, *parts.video_tokens)))
    return shown & ~alive


def _unheld(notes: Notes, layer: int, batch: int, length: int, groups: int) -> Tensor:
    """``[B, H, L, L]``: keys that are not in the cache when a query comes."""
    closed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for past, rows, layers in notes.held:
        if past >= length:
            continue
        tokens = layers[layer]
        there = torch.zeros(*tokens.shape[:2], length + 1, dtype=torch.bool)
        fits = (tokens >= 0) & (tokens < length)
        there = there.scatter(2, torch.where(fits, tokens, length), True)[..., :length]
        if there.shape[1] > 1 and closed.shape[1] == 1:
            closed = closed.expand(-1, there.shape[1] * groups, -1, -1).clone()
        by_head = there.repeat_interleave(groups, 1) if there.shape[1] > 1 else there
        closed[:, :, past : past + rows] = ~by_head[:, :, None]
    return closed


def _arrived(x: Tensor, notes: Notes, trace: Trace, starts: tuple[int, ...]) -> Tensor:
    """Hidden states with the rows that really entered layer 0 in their places."""
    for rows, start, log in zip(notes.arriving, starts, trace.log):
        if rows is None:
            continue
        spare = torch.cat([x, x[:, :1]], dim=1)
        index = torch.where(log[0].origin >= 0, log[0].origin + start, x.shape[1])
        x = spare.scatter(1, index[..., None].expand_as(rows), rows.to(x.dtype))[:, : x.shape[1]]
    return x


def _remade(x: Tensor, notes: Notes, starts: tuple[int, ...], layer: int) -> Tensor:
    """Hidden states with the rows that were merged or given new values before ``layer`` in their places."""
    for start, remade in zip(starts, notes.remade):
        if layer in remade:
            origin, rows, _ = remade[layer]
            spare = torch.cat([x, x[:, :1]], dim=1)
            index = torch.where(origin >= 0, origin + start, x.shape[1])
            x = spare.scatter(1, index[..., None].expand_as(rows), rows.to(x.dtype))[:, : x.shape[1]]
    return x


def _positions(given: Tensor, trace: Trace, starts: tuple[int, ...], layer: int, notes: Notes | None) -> Tensor:
    """Rotary positions ``[R, B, L]`` in a layer: as its layouts say, and on from there for text that came later.

    Where all edits left text where it was, so does later text, even if a picture that ended the prompt has lost its end.
    """
    length = given.shape[2]
    given = given[-3:]  # a fourth row in front numbers the text
    down = torch.zeros(given.shape[1], 1, dtype=torch.long)  # what earlier turns saved
    for turn, (start, log) in enumerate(zip(starts, trace.log)):
        layout = log[layer]
        told = (layout.positions[1:] if layout.positions.shape[0] == 4 else layout.positions) - down
        count = told.shape[0]
        last = start + int(log[0].origin.max())
        parts = max(count // given.shape[0], 1)
        table = given.repeat_interleave(parts, 0)
        index = torch.where(layout.origin >= 0, layout.origin + start, length).expand(count, -1, -1)
        spare = torch.cat([table, table[..., :1]], dim=2)
        spare = spare.scatter(2, index, told)
        # Later text goes on from the largest position: the last row's, unless that is one of a picture.
        moved = (given[:, :, start : last + 1].amax((0, 2)) - told.masked_fill(~layout.valid, 0).amax((0, 2)))[:, None]
        if notes is not None and not notes.moved[turn][layer]:
            moved = torch.zeros_like(moved)
        spare[:, :, last + 1 : length] -= moved
        down = down + moved
        given = spare[..., :length]
    return given
