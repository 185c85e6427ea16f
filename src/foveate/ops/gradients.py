"""Gradients inside of a model's forward, which users run under ``torch.no_grad`` or in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from foveate.core.errors import FoveateError


@contextmanager
def recorded() -> Iterator[None]:
    """Meanwhile gradients are recorded, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def constant(x: Tensor) -> Tensor:
    """``x`` as gradients may pass by it: without a history, and a copy if it was made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return x.clone() if x.is_inference() else x.detach()


def descended(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float, decay: float = 0.0) -> Tensor:
    """Where ``steps`` of AdamW lead from ``start``, each clamped to [0, 1].

    Only the gradient with regard to what is sought is formed: parameters of a model inside of ``loss`` get none.

    Args:
        loss: ``f(x)``, a scalar; the sum over samples, which then do not feel each other.
        start: floats of any shape.
        steps: of descent.
        rate: step size.
        decay: decoupled weight decay.

    Raises:
        FoveateError: if no gradient comes through ``loss``.
    """
    with recorded():
        x = constant(start).clone().requires_grad_()
        fit = torch.optim.AdamW([x], lr=rate, weight_decay=decay)
        for _ in range(steps):
            value = loss(x)
            if not value.requires_grad:
                raise FoveateError(
                    "model: no gradient comes through its decoder layers, as with some quantized weights; load it without"
                )
            (gradient,) = torch.autograd.grad(value, x)
            # In half precision a gradient may overflow; that token then waits for the next step.
            x.grad = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            fit.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        return x.detach()
