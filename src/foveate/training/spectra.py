"""How linears make their largest outputs: by how few of their weight's components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.engine.linears import blocks_of, linears_of
from foveate.models import anatomy

TINY = 1e-12
"""Outputs that are taken for 0."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The first singular values ``[k]`` of a weight ``[out, in]``, left vectors ``[out, k]`` and right ones ``[k, in]``."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Spectrum:
        """All of them, in float32."""
        return cls(*torch.linalg.svd(weight.detach().float(), full_matrices=False))

    def first(self, count: int) -> Spectrum:
        """The largest of them."""
        return Spectrum(self.left[:, :count].clone(), self.values[:count].clone(), self.right[:count].clone())

    def along(self, weight: Tensor) -> Tensor:
        """``[k]`` what has become of the values in ``weight``, along the same vectors."""
        return (self.left * (weight.float() @ self.right.T)).sum(0)

    def slope(self, power: float) -> Tensor:
        """``[out, in]`` gradient of ``sum values ** (power + 1) / (power + 1)``."""
        return (self.left * self.values**power) @ self.right


def shares(weight: Tensor, x: Tensor, most: int, absolute: bool = False, spectrum: Spectrum | None = None) -> Tensor:
    """``[most]`` the share (PCDR) of the first 1, 2, ... components in the largest output of each row, a mean over rows.

    Args:
        weight: ``[out, in]``.
        x: ``[n, in]`` inputs; rows whose outputs are all 0 do not count.
        absolute: whether components are summed by their sizes, so that a share is in ``[0, 1]`` and grows with their number;
            without, those that cancel the others make it larger than 1.
        spectrum: of the weight, if it is known.
    """
    spectrum = Spectrum.of(weight) if spectrum is None else spectrum
    made = x.float() @ weight.detach().float().T
    neuron = made.abs().argmax(-1)
    parts = (x.float() @ spectrum.right.T) * spectrum.values * spectrum.left[neuron]
    if absolute:
        parts, whole = parts.abs(), parts.abs().sum(-1)
    else:
        whole = made.gather(-1, neuron[:, None])[:, 0].abs()
    found = parts[:, :most].cumsum(-1).abs() / whole[:, None]
    found = found[whole > TINY]
    return found.mean(0) if len(found) else torch.zeros(min(most, parts.shape[1]), device=x.device)


def chosen(shares: Tensor, threshold: float) -> int:
    """How many components it takes for a share of at least ``threshold``; 0 = none of these numbers is enough."""
    enough = (shares >= threshold).nonzero()
    return int(enough[0]) + 1 if len(enough) else 0


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears in the blocks of a model's vision encoder, by their names in the model.

    Args:
        model: a vision-language model, or an encoder alone, whose blocks are then its longest list of modules.

    Raises:
        FoveateError: if there are none.
    """
    try:
        blocks = blocks_of(anatomy(model), "encoder")
    except FoveateError:
        config = getattr(model, "config", None)
        if hasattr(config, "text_config") or hasattr(config, "vocab_size"):  # its longest list may be the language model's
            raise
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = list(max(lists, key=len, default=[]))
    names = {module: name for name, module in model.named_modules()}
    found = {
        f"{names[block]}.{name}": linear
        for number, block in enumerate(blocks)
        for name, linear in linears_of(block, f"block {number}").items()
    }
    if not found:
        raise FoveateError(f"model {type(model).__name__}: has no blocks with linears; name them: {{'layer': model.layer}}")
    return found


@dataclass(frozen=True)
class Diagnosis:
    """How a linear makes its largest outputs.

    Attributes:
        shares: of the first 1, 2, ... components in them.
        largest: singular value.
        activation: largest output, in size, biases not counted.
    """

    shares: tuple[float, ...]
    largest: float
    activation: float


@torch.no_grad()
def diagnose(
    layers: Mapping[str, nn.Linear] | nn.Module,
    feed: Callable[[], Any],
    *,
    most: int = 3,
    tokens: int = 256,
    absolute: bool = False,
) -> dict[str, Diagnosis]:
    """How each linear makes its largest outputs while ``feed`` runs the model on some pictures.

    Args:
        layers: linears by name, or the model whose `encoder_linears` are meant.
        feed: runs the model.
        most: components.
        tokens: rows that are looked at of each call of a linear, spread evenly.
        absolute: see `shares`.
    """
    with recording(matrices_of(layers), tokens, lambda: True) as rows:
        feed()
    found = {}
    for name, matrix in matrices_of(layers).items():
        if rows.get(name):
            weight, x = matrix.weight.detach().float(), torch.cat(rows[name])
            spectrum = Spectrum.of(weight)
            share, activation = shares(weight, x, most, absolute, spectrum), (x @ weight.T).abs().amax()
            found[name] = Diagnosis(tuple(share.tolist()), float(spectrum.values[0]), float(activation))
    return found


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear's weight, or some rows of it."""

    linear: nn.Linear
    rows: slice

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view."""
        return self.of(self.linear.weight)

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that is like the linear's whole weight."""
        return tensor[self.rows]


def matrices_of(layers: Mapping[str, nn.Linear] | nn.Module) -> dict[str, Matrix]:
    """Each weight by itself; queries, keys and values that are in one, one after the other, apart."""
    linears = encoder_linears(layers) if isinstance(layers, nn.Module) else layers
    found: dict[str, Matrix] = {}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise FoveateError(f"S2D: layers: {name!r} is no linear with plain floats; load the model unquantized")
        out = linear.out_features
        if "qkv" in name.rpartition(".")[2] and out % 3 == 0:
            third = out // 3
            found |= {f"{name}.{part}": Matrix(linear, slice(n * third, (n + 1) * third)) for n, part in enumerate("qkv")}
        else:
            found[name] = Matrix(linear, slice(0, out))
    return found


@contextmanager
def recording(matrices: Mapping[str, Matrix], tokens: int, when: Callable[[], bool]) -> Iterator[dict[str, list[Tensor]]]:
    """Rows ``[n, in]`` that the linears are called with meanwhile, ``tokens`` of each call at most."""
    rows: dict[str, list[Tensor]] = {}
    names: dict[nn.Linear, list[str]] = {}
    for name, matrix in matrices.items():
        names.setdefault(matrix.linear, []).append(name)

    def listen(mine: list[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if when():
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                some = x[:: -(-len(x) // tokens)].float()
                for name in mine:
                    rows.setdefault(name, []).append(some)

        return note

    handles = [linear.register_forward_pre_hook(listen(mine)) for linear, mine in names.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
