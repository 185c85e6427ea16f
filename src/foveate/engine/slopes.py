"""How much a model's loss depends on what its linears make, by one pass forward and backward for each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.roles import Role
from foveate.core.signal import Function
from foveate.core.weights import Rows
from foveate.engine.calibrate import Batches
from foveate.engine.functions import function
from foveate.engine.replay import Replay


class Slopes:
    """Mean sizes of gradients at the outputs of linears; found when first asked for, for all blocks at once."""

    def __init__(self, replay: Replay, batches: Batches) -> None:
        self._replay, self._batches = replay, batches
        self._found: dict[str, list[list[Rows]]] = {}

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
        parts = self._replay.parts
        slopes: dict[int, Tensor] = {}

        def hear(block: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                output.register_hook(lambda slope: slopes.__setitem__(block, slope.float().abs().mean(-1).cpu()))

            return note

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        wanted = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            if self._replay.attaching is not None:  # first: attaching tries layers, without gradients
                stack.enter_context(self._replay.attaching())
            stack.callback(self._replay.blocks[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
            for number, block in enumerate(self._replay.blocks):
                linear = dict(block.named_modules()).get(name)
                if linear is not None:
                    stack.callback(linear.register_forward_hook(hear(number)).remove)
            for parameter in wanted:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            with torch.enable_grad():
                self._loss(batch).backward()  # type: ignore[no-untyped-call]
        return slopes

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """On the answers; on the likeliest next word of samples without one."""
        parts = self._replay.parts
        # A session reads labels and keeps them to itself: an answer has no say in what is kept of its prompt.
        attached = self._replay.attaching is not None
        inputs = {name: value for name, value in batch.items() if attached or name != "labels"}
        hidden = parts.multimodal(**inputs, use_cache=False).last_hidden_state
        head, labels = function(parts, Function("head")), batch.get("labels")
        loss: Tensor = hidden.new_zeros(())
        for sample in range(hidden.shape[0]):
            told = None if labels is None else labels[sample, 1:] != -100
            if labels is None or told is None or not bool(told.any()):
                logits = head(hidden[sample, -1:]).float()
                loss = loss + functional.cross_entropy(logits, logits.argmax(-1))
            else:
                logits = head(hidden[sample, :-1][told]).float()
                loss = loss + functional.cross_entropy(logits, labels[sample, 1:][told])
        return loss
