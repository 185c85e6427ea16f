"""How a session ends, or does not: the model is given back, or the weights that were replaced are let go for good."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.engine.program import Program

_GONE = "its weights were given up by session.commit(); load the model again"


class Ends:
    """The part of a session that ends it.

    Attributes:
        attached: whether the recipe is still at work.
        committed: whether the weights that it replaced are gone.
    """

    recipe: Recipe
    attached: bool
    committed = False
    _program: Program
    _undo: list[Callable[[], None]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.committed:
            self.detach()

    def detach(self) -> None:
        """Give the model back as it was. Detaching twice is fine.

        Raises:
            FoveateError: after `commit`: the model cannot be what it was.
        """
        if self.committed:
            raise FoveateError(f"detach: the model cannot be given back, as {_GONE}")
        self.attached = False
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def commit(self) -> int:
        """Let go of the floats of all linears whose weights the recipe replaced, for good; returns how many bytes they took.

        The recipe goes on, with the same answers, and so it does when a ``with`` block ends. From then on the session
        cannot be detached, and the model neither copied, saved nor quantized: what it was is in its checkpoint, what it has
        become in the artifact. A second time it does nothing.

        >>> session = foveate.attach(model, "vlm_ptq(bits=3) + hiprune(keep=64)")  # doctest: +SKIP
        >>> session.commit()  # doctest: +SKIP

        Raises:
            FoveateError: if the session is detached, or its recipe replaces no weights.
        """
        if not self.attached:
            raise FoveateError("commit: the session is detached; commit while it is at work")
        if not self._program.packed:
            raise FoveateError(f"commit: {self.recipe} replaces no weights, so none can be let go")
        return 0 if self.committed else self._let_go()

    def _let_go(self) -> int:
        self.committed = True
        freed = 0
        for linear in (one.linear for one in self._program.packed):
            weight = linear.weight
            freed += weight.nbytes
            # Shape, dtype and device stay for whoever asks; whoever reads it all the same is to notice.
            linear.weight = nn.Parameter(weight.new_full((), float("nan")).expand(weight.shape), requires_grad=False)
            linear.register_state_dict_pre_hook(_refuse_saving)
            linear.__dict__["__deepcopy__"] = _refuse_copying
        return freed


def _refuse_saving(*_: Any) -> None:
    raise FoveateError(f"model: cannot be saved, as {_GONE}, or take its artifact")


def _refuse_copying(memo: dict[int, Any]) -> None:
    raise FoveateError(f"model: cannot be copied, as {_GONE}")
