"""S2D in transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from foveate.core.errors import FoveateError
from foveate.training.s2d import S2D

FILE = "s2d.safetensors"
"""Beside the weights of each checkpoint."""

_LOG = logging.getLogger(__name__)


class S2DCallback(TrainerCallback):
    """``Trainer(..., callbacks=[S2DCallback(S2D(model))])``: its gradient is added once for each step of the optimizer.

    That is behind clipping, which so goes by the task's gradient alone. A run that is resumed goes on with the vectors of
    its checkpoint.

    Args:
        decay: of the model that is trained.
        decoupled: whether weights decay by themselves behind the optimizer's step, instead of by gradients.
    """

    def __init__(self, decay: S2D, decoupled: bool = False) -> None:
        self.decay, self.decoupled = decay, decoupled

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go on where a checkpoint was written."""
        if args.fp16:
            raise FoveateError("S2D: fp16=True: gradients are scaled when it adds its own; train in bf16 or float32")
        if state.global_step:
            path = self._file(args, state)
            if path.exists():
                self.decay.load_state_dict(load_file(path))
            else:
                _LOG.warning(f"S2D: {path} is not there; layers are chosen anew in the next step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind clipping."""
        if not self.decoupled:
            self.decay.add_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind the step."""
        if self.decoupled:
            self.decay.shrink(kwargs["optimizer"])
        self.decay.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside the checkpoint."""
        if state.is_world_process_zero and self._file(args, state).parent.is_dir():
            save_file(self.decay.state_dict(), self._file(args, state))

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FILE)
