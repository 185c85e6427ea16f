"""How much a model's loss depends on what its linears or blocks make, by a pass forward and backward for each batch.

Of all blocks only the inputs are kept for the way back, on which each runs once more: at one time the graph of one block is
there, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from foveate.core.roles import Role
from foveate.core.signal import Function
from foveate.core.weights import Rows
from foveate.engine.calibrate import Batches
from foveate.engine.functions import function
from foveate.engine.replay import Replay, first
from foveate.engine.stand_in import stand_in


class Slopes:
    """Gradients of a whole model: mean sizes at the outputs of linears, found when first asked for, for all blocks at once;
    and, at the output of a block that makes something else than it did, how far the model's answers move.
    """

    def __init__(self, replay: Replay, batches: Batches) -> None:
        self._replay, self._batches = replay, batches
        self._found: dict[str, list[list[Rows]]] = {}
        self._said: dict[int, list[Tensor]] = {}

    def pull(self, number: int, batch: int, made: Tensor, temperature: float = 1.0) -> Tensor:
        """The gradient at ``made``, were it what block ``number`` puts out for a batch, of how far the model's answers move.

        That is the divergence KL of what all other blocks, as they are, then say from what the model says, logits divided
        by ``temperature``: a mean over a sample's rows that predict its answer, summed over samples. 0 where the block's
        output goes nowhere.
        """
        block, leaves = self._replay.blocks[number], []

        def instead(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                own = original(*args, **kwargs)
            leaf = made.detach().to(first(own), copy=True).requires_grad_()
            leaves.append(leaf)
            return (leaf, *own[1:]) if isinstance(own, tuple) else leaf

        with self._again(), self._attached(), self._frozen(), ExitStack() as stack:
            if batch not in self._said:
                with torch.no_grad():
                    self._said[batch] = [rows.cpu() for rows in self._predicting(self._batches[batch])]
            stack.callback(stand_in(block, "forward", instead))
            with torch.enable_grad():
                loss = self._divergence(self._said[batch], self._predicting(self._batches[batch]), temperature)
            (leaf,) = leaves
            slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        return (torch.zeros_like(leaf) if slope is None else slope).to(made.device)

    def of(self, name: str) -> Sequence[Sequence[Rows]]:
        """For each block and batch, rows ``[n, 1]``; none for blocks without a linear of this name.

        The loss is the mean over a sample's rows that predict its answer, summed over samples, so that what a sample gives
        does not depend on those beside it.
        """
        if name not in self._found:
            found: list[list[Rows]] = [[] for _ in self._replay.blocks]
            for number, batch in enumerate(self._batches):
                for block, slope in self._batch(name, batch).items():
                    watched = self._replay.batches[number]
                    kept = (watched.role != int(Role.PAD)).flatten()
                    role, sample = watched.role.flatten()[kept], watched.sample.flatten()[kept]
                    found[block].append(Rows(slope.flatten()[kept][:, None], role, sample))
            self._found[name] = found
        return self._found[name]

    def _batch(self, name: str, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
        slopes: dict[int, Tensor] = {}

        def hear(block: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                output.register_hook(lambda slope: slopes.__setitem__(block, slope.float().abs().mean(-1).cpu()))

            return note

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        with self._again(), self._attached(), ExitStack() as stack:
            stack.callback(self._replay.blocks[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
            for number, block in enumerate(self._replay.blocks):
                linear = dict(block.named_modules()).get(name)
                if linear is not None:
                    stack.callback(linear.register_forward_hook(hear(number)).remove)
            with self._frozen(), torch.enable_grad():
                self._loss(batch).backward()  # type: ignore[no-untyped-call]
        return slopes

    def _attached(self) -> AbstractContextManager[Any]:
        """What acts before the language model is at work meanwhile; in front of hooks, as attaching tries layers."""
        return nullcontext() if self._replay.attaching is None else self._replay.attaching()

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Blocks keep their inputs alone meanwhile; below a session, which has ended its call when they run once more."""
        # Blocks of the encoder are taken apart by some of what acts there, and may have nothing below a session.
        replay, encoders = self._replay, self._replay.part == "encoder" and self._replay.attaching is None
        with ExitStack() as stack:
            for block in (*replay.parts.layers, *(replay.blocks if encoders else ())):
                stack.callback(stand_in(block, "forward", _lean))
            yield

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No parameter has a gradient meanwhile."""
        wanted = [parameter for parameter in self._replay.parts.model.parameters() if parameter.requires_grad]
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """On the answers; on the likeliest next word of samples without one."""
        head, labels = function(self._replay.parts, Function("head")), batch.get("labels")
        loss: Tensor = torch.zeros((), device=self._replay.parts.home)
        for sample, rows in enumerate(self._predicting(batch)):
            logits = head(rows).float()
            told = None if labels is None else labels[sample, 1:][labels[sample, 1:] != -100]
            loss = loss + functional.cross_entropy(logits, logits.argmax(-1) if told is None or not len(told) else told)
        return loss

    def _divergence(self, exact: Sequence[Tensor], moved: Sequence[Tensor], temperature: float) -> Tensor:
        head = function(self._replay.parts, Function("head"))
        loss: Tensor = moved[0].new_zeros((), dtype=torch.float32)
        for before, after in zip(exact, moved, strict=True):
            with torch.no_grad():
                wanted = (head(before.to(after.device)).float() / temperature).log_softmax(-1)
            said = (head(after).float() / temperature).log_softmax(-1)
            loss = loss + functional.kl_div(said, wanted, reduction="batchmean", log_target=True)
        return loss

    def _predicting(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Of each sample the last hidden states ``[n, D]`` of rows that predict its answer; of the last one without any."""
        # A session reads labels and keeps them to itself: an answer has no say in what is kept of its prompt.
        attached, labels = self._replay.attaching is not None, batch.get("labels")
        inputs = {name: value for name, value in batch.items() if attached or name != "labels"}
        hidden = self._replay.parts.multimodal(**inputs, use_cache=False).last_hidden_state
        found = []
        for sample in range(hidden.shape[0]):
            told = None if labels is None else labels[sample, 1:] != -100
            found.append(hidden[sample, -1:] if told is None or not bool(told.any()) else hidden[sample, :-1][told])
        return found


def _lean(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    calls = count()

    def run(*args: Any, **kwargs: Any) -> Any:
        # A session's cache has taken in the rows by then: they are all of the prompt.
        given = kwargs if next(calls) == 0 else {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        return original(*args, **given)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
