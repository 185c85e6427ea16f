"""S2D: while an encoder is fine-tuned, the few largest singular values from which its outliers come decay.

Paper: "S2D: Selective Spectral Decay for Quantization-Friendly Conditioning of Neural Activations", arXiv 2602.14432. No
code is published. Weights that were trained so are quantized with less loss by whatever method comes later; the model is
otherwise as it was, and nothing of this is left in it.

Reconstructed: a layer's share of outliers (PCDR) is a mean over tokens of the step's batch, at each token's largest neuron;
candidates are the linears of the encoder's blocks; singular values are those of the last decomposition (or, `tracked`, what
became of them). Queries, keys and values in one weight are three matrices (own choice). Biases do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.training.spectra import Spectrum, chosen, matrices_of, recording, shares

_KINDS = ("left", "values", "right")


class S2D:
    """A penalty on the singular values that make outliers: ``strength / (power + 1) * sum values ** (power + 1)``.

    In a loop of one's own, either as a part of the loss or by itself, with ``step`` behind the optimizer's:

        decay = S2D(model)
        loss = model(**batch).loss + decay.loss()      # or, behind backward: decay.add_gradients()
        loss.backward()
        optimizer.step()
        decay.step()

    Every ``every`` steps, in the first of these calls, the weights are decomposed anew and layers chosen by what this step's
    forward fed them. In transformers' Trainer `foveate.training.trainer.S2DCallback` does the same.

    Args:
        layers: linears by name, or the model whose `encoder_linears` are meant.
        strength: of the penalty (lambda).
        power: n of the paper; 1 with all components would be ordinary weight decay.
        threshold: share of its largest outputs that a layer's first components must make (tau), or it is left alone.
        most: components at most (K_max).
        every: steps from one decomposition to the next (m).
        tokens: rows of each call that shares are taken of.
        absolute: whether shares are those of sizes, see `shares`.
        tracked: whether singular values between two decompositions are what became of them, along the same vectors.

    Raises:
        FoveateError: if a parameter is out of range, or no layer is trained.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear] | nn.Module,
        *,
        strength: float = 5e-4,
        power: float = 2.0,
        threshold: float = 0.95,
        most: int = 3,
        every: int = 100,
        tokens: int = 256,
        absolute: bool = False,
        tracked: bool = False,
    ) -> None:
        for name, value, right in (
            ("strength", strength, strength >= 0),
            ("power", power, power >= 1),
            ("threshold", threshold, threshold > 0),
            ("most", most, most >= 1),
            ("every", every, every >= 1),
            ("tokens", tokens, tokens >= 1),
        ):
            if not right:
                least = "0 or more" if name == "strength" else "more than 0" if name == "threshold" else "1 or more"
                raise FoveateError(f"S2D: {name}={value!r}: must be {least}")
        self._matrices = {name: one for name, one in matrices_of(layers).items() if one.linear.weight.requires_grad}
        if not self._matrices:
            raise FoveateError("S2D: layers: none of them is trained; unfreeze the encoder (requires_grad_(True))")
        self.strength, self.power, self.threshold, self.most = strength, power, threshold, most
        self.every, self.tokens, self.absolute, self.tracked = every, tokens, absolute, tracked
        self.steps = 0
        self.chosen: dict[str, Spectrum] = {}
        self._due = True
        self._recording = recording(self._matrices, tokens, lambda: self._due and torch.is_grad_enabled())
        self._rows = self._recording.__enter__()

    def loss(self) -> Tensor:
        """The penalty, a number with its gradient."""
        self._refresh()
        total: Tensor = torch.zeros((), device=next(iter(self._matrices.values())).weight.device)
        for name, spectrum in self._now():
            along = spectrum.along(self._matrices[name].weight)
            slope = self.strength * spectrum.values**self.power
            # Its value is the penalty's, its gradient the closed form: what the vectors do not know of goes no other way.
            pulled, value = (slope * along).sum(), (slope * spectrum.values).sum() / (self.power + 1)
            total = total + (pulled + (value - pulled.detach())).to(total.device)
        return total

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to the weights', once for each step of the optimizer."""
        self._refresh()
        for name, spectrum in self._now():
            matrix, slope = self._matrices[name], self.strength * spectrum.slope(self.power)
            weight = matrix.linear.weight
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            matrix.of(weight.grad).add_(slope.to(weight.grad.dtype))

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the weights themselves instead, behind the optimizer's step: by rate times gradient, at most to 0."""
        self._refresh()
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for name, spectrum in self._now():
            matrix = self._matrices[name]
            rate = rates.get(id(matrix.linear.weight), 0.0)
            gone = torch.minimum(
                rate * self.strength * spectrum.values**self.power, spectrum.along(matrix.weight).clamp(min=0)
            )
            matrix.weight.sub_(((spectrum.left * gone) @ spectrum.right).to(matrix.weight.dtype))

    def step(self) -> None:
        """A step of the optimizer is done."""
        self._refresh()  # nobody asked for anything in this step, which does not matter to the next
        self.steps += 1
        self._due = self.steps % self.every == 0

    def detach(self) -> None:
        """Listen to the layers no longer."""
        self._recording.__exit__(None, None, None)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run which goes on later needs."""
        found = {"steps": torch.tensor([self.steps, int(self._due)])}
        for name, one in self.chosen.items():
            found |= {f"{name}/left": one.left, f"{name}/values": one.values, f"{name}/right": one.right}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there.

        Raises:
            FoveateError: if it is of other layers.
        """
        self.steps, due = state["steps"].tolist()
        names = dict.fromkeys(name.rpartition("/")[0] for name in state if "/" in name)
        for name in names:
            if name not in self._matrices:
                raise FoveateError(
                    f"S2D: state: has a layer {name!r} that is not among these; build it with the same layers"
                )
        self._due = bool(due)
        self.chosen = {
            name: Spectrum(*(state[f"{name}/{kind}"].to(self._matrices[name].weight.device) for kind in _KINDS))
            for name in names
        }

    def _now(self) -> Iterator[tuple[str, Spectrum]]:
        for name, one in self.chosen.items():
            if self.tracked:
                one = Spectrum(one.left, one.along(self._matrices[name].weight.detach()).clamp(min=0), one.right)
            yield name, one

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self._due:
            return
        self._due = False
        spectra: dict[str, Spectrum] = {}
        counts: list[int] = []
        for name, matrix in self._matrices.items():
            spectrum = Spectrum.of(matrix.weight)
            rows = self._rows.get(name)
            share = shares(matrix.weight, torch.cat(rows), self.most, self.absolute, spectrum) if rows else None
            counts.append(0 if share is None else chosen(share, self.threshold))
            spectra[name] = spectrum.first(self.most)
        self._rows.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Each process saw other pictures, and all of them must do the same.
            device = next(iter(self._matrices.values())).weight.device
            told = torch.tensor(counts, device=device)
            torch.distributed.broadcast(told, 0)
            counts = told.tolist()
        self.chosen = {name: spectra[name].first(count) for name, count in zip(spectra, counts, strict=True) if count}
