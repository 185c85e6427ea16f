"""Where the parts of a Hugging Face vision-language model are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.artifact import FOLDER, Artifact, Fingerprint
from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.traits import TowerTraits, Traits
from foveate.models import decoder
from foveate.models.sketch import sketch


@dataclass(frozen=True)
class View:
    """One grid of visual tokens: a picture, or an overview or the details of it, or a video's frames, one below the other.

    Attributes:
        rows, columns: the grid.
        frames: frames of a video.
        cells: ``[rows * columns, g]`` on the host: the encoder's rows that each token is made of, counted over all that the
            encoder was called with (summary rows left out, in raster order); None where signals cannot be read.
        encoder: which encoder's they are, where a family has several (`Anatomy.encoders`).
    """

    rows: int
    columns: int
    frames: int = 1
    cells: Tensor | None = None
    encoder: int = 0


@dataclass(frozen=True)
class Picture:
    """What stands behind the placeholders of one image or video.

    Attributes:
        views: its grids.
        tokens: ``[T, 2]`` on the host: view and raster index of each placeholder in the prompt's order, -1 for rows that are
            no visual token (line ends); None: the views one after the other.
    """

    views: tuple[View, ...]
    tokens: Tensor | None = None

    @cached_property
    def placement(self) -> Tensor:
        """`tokens`, spelled out."""
        if self.tokens is not None:
            return self.tokens
        return torch.cat(
            [
                torch.stack([torch.full((v.rows * v.columns,), number), torch.arange(v.rows * v.columns)], dim=1)
                for number, v in enumerate(self.views)
            ]
        )

    @property
    def count(self) -> int:
        """Placeholders."""
        return len(self.placement)

    @cached_property
    def slots(self) -> list[Tensor]:
        """For each view, the placeholders of its tokens, in raster order."""
        slots = []
        for number, view in enumerate(self.views):
            there = (self.placement[:, 0] == number).nonzero()[:, 0]
            slots.append(torch.empty(view.rows * view.columns, dtype=torch.long))
            slots[-1][self.placement[there, 1]] = there
        return slots


Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projections:
    """What makes queries, keys and values ``[T, n, D]`` of rows in an encoder block, and what mixes the heads again.

    Each head has the module's ``head_dim`` numbers side by side, and logits its ``scale``; nothing turns.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection


@dataclass(frozen=True)
class Halves:
    """The parts of an encoder block, for running its halves apart: ``x += scale * f(norm(x))``, twice."""

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    projections: Projections
    scale1: Tensor | None = None
    scale2: Tensor | None = None


@dataclass(frozen=True)
class Encoder:
    """The parts of a vision encoder.

    Attributes:
        blocks: its blocks.
        attention: the attention module of each block.
        feature_layer: block whose output feeds the projector.
        prefix: summary rows (CLS) before the first patch.
        projector: module whose first input is the features.
        shuffled: whether the projector is fed a row for each token (pixel shuffle in front of it), not one for each cell.
        tile: patches of an image (tile), where all have the same number.
        sites: kinds of vision sites where rows may go (see `foveate.core.traits.Traits.vision_sites`).
        pools: whether the projector joins the rows of a whole picture to tokens itself, so that it takes nothing less.
        packed: whether all images lie in one sequence ``[P, D]`` instead of a batch ``[T, n, D]``.
        order: for packed encoders, given the bound arguments of the feature call: where the rows that block ``i`` works on
            stand in raster order (``[P]`` raster number of each row), or None where they are in the cells' own order.
        halves: takes a block apart, where its rows may run in part, or go in its middle.
        patches: pixels of each token, and the call that encodes some of them, where the patches site is open.
    """

    blocks: Sequence[nn.Module]
    attention: Sequence[nn.Module]
    feature_layer: int
    prefix: int
    projector: nn.Module
    shuffled: bool = False
    tile: int | None = None
    sites: frozenset[str] = frozenset()
    pools: bool = False
    packed: bool = False
    order: Callable[[Mapping[str, Any], int], Tensor | None] = lambda bound, layer: None
    halves: Callable[[nn.Module], Halves] | None = None
    patches: Patches | None = None

    @property
    def width(self) -> int:
        """Of its hidden states."""
        # Quantized projections need not be `nn.Linear`.
        return next(int(part.in_features) for part in self.attention[0].modules() if hasattr(part, "in_features"))  # type: ignore[arg-type]

    @property
    def heads(self) -> int:
        """Of its attention."""
        return int(self.attention[0].num_heads)  # type: ignore[arg-type]

    def project(self, cells: Tensor) -> Tensor:
        """Tokens ``[..., D']`` of the rows ``cells`` ``[..., g * D]`` that each is made of, in the wider dtype of both.

        Where a projector takes rows one by one, a token of several is the mean of what it makes of them.
        """
        if self.packed:  # it takes g rows after the other for one token
            return self._run_projector(cells.reshape(-1, self.width)).unflatten(0, cells.shape[:-1])
        if self.shuffled:
            return self._run_projector(cells)
        return self._run_projector(cells.unflatten(-1, (-1, self.width))).mean(-2)

    def _run_projector(self, x: Tensor) -> Tensor:
        weights = dict(self.projector.named_parameters())
        floating = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
        own = floating[0] if floating else x.dtype
        wide = torch.promote_types(own, x.dtype)
        # What is offloaded or quantized cannot be widened.
        if own == wide or len(floating) < len(weights) or any(weight.is_meta for weight in weights.values()):
            return self.projector(x.to(own))  # type: ignore[no-any-return]
        widened = {name: weight.to(wide) for name, weight in weights.items()}
        return torch.func.functional_call(self.projector, widened, (x,))  # type: ignore[no-any-return]

    def fed(self, view: View) -> Tensor | None:
        """``[rows * columns, g]`` rows of the projector's input that a view's tokens are made of, counted as cells are."""
        if view.cells is None or not self.shuffled:
            return view.cells
        count, group = view.cells.shape
        return (view.cells.min() // group + torch.arange(count))[:, None]


@dataclass(frozen=True)
class Patches:
    """Access to an encoder's input, so that only some cells (a cell = the pixels of one token) are encoded.

    Attributes:
        cell: ``(channels, rows, columns)`` of a cell.
        read: given args and kwargs of the vision tower: pixels ``[N, C, h, w]`` of all cells, images one after the other, in
            raster order (normalised as the encoder gets them).
        keep: given args, kwargs and the numbers ``[n]`` of the cells to encode, ascending: new args and kwargs for the
            vision tower, which then makes n tokens, in that order. None: the engine drops rows before the first block.
        merge: patches on each side of a cell.
    """

    cell: tuple[int, int, int]
    read: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]
    keep: Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    merge: int = 1


@dataclass(frozen=True)
class Audio:
    """The parts of an encoder of sound.

    Attributes:
        tower: the encoder.
        attention: the attention module of its last block.
        frames: given what it is called with, by name: frames of each sound in that block.
        pooled: frames that make one token; what is left over at the end of a sound makes none.
    """

    tower: nn.Module
    attention: nn.Module
    frames: Callable[[Mapping[str, Any]], list[int]]
    pooled: int = 1


@dataclass(frozen=True)
class Anatomy:
    """A model, taken apart.

    Attributes:
        family: the model family.
        model: the whole, with the language-modelling head.
        multimodal: the module that receives ``input_ids`` and calls the language model with embeddings; its
            ``get_image_features`` (and ``get_video_features``) encode.
        vision: the vision tower; None for a text model, whose ``multimodal`` and ``language_model`` are one module.
        language_model: the stack of decoder layers.
        layers: its decoder layers.
        image_tokens: placeholder ids of images.
        pictures: what stands behind the placeholders, given the bound arguments of ``get_image_features`` or
            ``get_video_features``.
        encoder: its parts, or None where nothing in it can be read.
        rotary_rows: rows of the rotary positions.
        video_tokens: placeholder ids of videos.
        one_grid: whether every picture gets the same grid, whatever its size.
        audio_tokens: placeholder ids of sound.
        audio: what encodes it.
        encoders: of a family whose pictures are encoded several times, each time by another encoder with a projector of its
            own; ``encoder`` is None then. Every picture has views of all of them, one encoder's behind the other's.
    """

    family: str
    model: nn.Module
    multimodal: nn.Module
    vision: nn.Module | None
    language_model: nn.Module
    layers: Sequence[nn.Module]
    image_tokens: tuple[int, ...]
    pictures: Callable[[Mapping[str, Any]], list[Picture]]
    encoder: Encoder | None = None
    rotary_rows: int = 1
    video_tokens: tuple[int, ...] = ()
    one_grid: bool = False
    audio_tokens: tuple[int, ...] = ()
    audio: Audio | None = None
    encoders: tuple[Encoder, ...] = ()
    config: Any = field(repr=False, default=None)

    @property
    def towers(self) -> tuple[Encoder, ...]:
        """All encoders whose parts are known."""
        return self.encoders or (() if self.encoder is None else (self.encoder,))

    def first_block(self, tower: int) -> int:
        """The number of the first block of a tower, counted over the blocks of all of them."""
        return sum(len(encoder.blocks) for encoder in self.towers[:tower])

    @property
    def encoder_attention(self) -> list[nn.Module]:
        """The attention module of each block of all towers."""
        return [module for encoder in self.towers for module in encoder.attention]

    @cached_property
    def weights(self) -> dict[str, tuple[float, ...]]:
        """A sketch of the weights of embedding, projector and decoder layers: a few entries of each parameter."""
        parts = {"embedding": self.model.get_input_embeddings()}  # type: ignore[operator]
        names = ["projector"] if self.encoder is not None else [f"projectors.{n}" for n in range(len(self.towers))]
        parts |= {name: encoder.projector for name, encoder in zip(names, self.towers)}
        return sketch(parts | {f"layers.{number}": layer for number, layer in enumerate(self.layers)})

    @property
    def kernel(self) -> str:
        """The attention implementation of the language model."""
        return str(self.config._attn_implementation)

    @property
    def mask_free(self) -> bool:
        """Whether that takes no mask."""
        return "flash" in self.kernel

    @property
    def home(self) -> torch.device:
        """Where the model runs, or begins to, if accelerate spread it over several devices."""
        device = _execution_device(self.model)
        return next(self.model.parameters()).device if device is None else device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states: that of the embedding, or, where its weights are integers, of what else is no integer."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
        return self.model.dtype  # type: ignore[return-value]

    def device(self, layer: int) -> torch.device | None:
        """Where accelerate runs a decoder layer; None where it does not meddle."""
        return _execution_device(self.layers[layer])

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer.

        Raises:
            FoveateError: if it has none.
        """
        found = decoder.attention_of(self.layers[layer]) if layer not in self.recurrent else None
        if found is None:
            there = ", ".join(str(i) for i in range(len(self.layers)) if i not in self.recurrent)
            raise FoveateError(
                f"decoder layer {layer}: has a recurrent state and no attention; layers with attention: {there}"
            )
        return found

    def projection(self, layer: int, name: str) -> nn.Linear:
        """The projection of a decoder layer that makes the ``query`` or ``key``, and nothing else.

        Raises:
            FoveateError: if there is none with a weight of its own.
        """
        found = getattr(self.attention(layer), f"{name[0]}_proj", None)
        # Some quantizers put a module in its place, others a tensor of a type of their own into it.
        plain = type(found) is nn.Linear and type(found.weight) is nn.Parameter
        if not self.build(layer).projected or not plain:
            raise FoveateError(
                f"decoder layer {layer}: its {name} is not made by a plain linear projection, whose weight could be read; "
                "use a model with such projections, adapters merged and weights not quantized"
            )
        return found

    def output(self, layer: int) -> nn.Module:
        """What mixes the heads of a decoder layer's attention, called with all that they made ``[B, n, H * d]``.

        Raises:
            FoveateError: if there is no such part.
        """
        found = getattr(self.attention(layer), "o_proj", None)
        if not isinstance(found, nn.Module):
            raise FoveateError(
                f"decoder layer {layer}: its attention has no output projection that is known, so no head can be taken out; "
                "use a text model of another family, such as llama or qwen2"
            )
        return found

    def build(self, layer: int) -> decoder.Build:
        """How a decoder layer is put together.

        Raises:
            FoveateError: if it has no attention, or none that methods can work with.
        """
        if layer not in self._builds:
            alike = decoder.alike(self.layers[layer], self.kinds[layer])
            if alike not in self._builds:
                self._builds[alike] = self._watch(layer)
            self._builds[layer] = self._builds[alike]
        found = self._builds[layer]
        if isinstance(found, str):
            raise FoveateError(f"decoder layer {layer}: {found}; use a text model of another family, such as llama or qwen2")
        return found

    def _watch(self, layer: int) -> decoder.Build | str:
        module = self.layers[layer]
        device = self.device(layer) or next(module.parameters()).device
        # Small, so that what the layer adds to its input cannot be lost in rounding.
        x = 0.02 * torch.randn(1, decoder.ROWS, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x = x.to(device, self.dtype)
        positions = torch.arange(1, 1 + decoder.ROWS, device=device).expand(3 if self.rotary_rows > 1 else 1, 1, -1)
        return decoder.watch(module, self.attention(layer), x, lambda: self.rotary(layer, x, positions))

    @cached_property
    def _builds(self) -> dict[Any, decoder.Build | str]:
        """How layers are put together, or why that cannot be said: by number, and by what they have in common."""
        return {}

    def experts(self, layer: int) -> nn.Module | None:
        """The experts of a decoder layer, called with rows ``[T, D]``, chosen experts ``[T, K]`` and weights ``[T, K]``.

        None where the layer is dense.
        """
        found = getattr(getattr(self.layers[layer], "mlp", None), "experts", None)
        called = inspect.signature(type(found).forward).parameters if isinstance(found, nn.Module) else ()
        return found if {"hidden_states", "top_k_index", "top_k_weights"} <= set(called) else None

    @property
    def special(self) -> frozenset[int]:
        """Ids that the configuration names: what begins, ends and pads a text, placeholders and what stands around them."""
        generation = getattr(self.model, "generation_config", None)
        named: set[int] = set()
        for config in filter(None, (self.model.config, self.config, generation)):
            for name, value in config.to_dict().items():  # type: ignore[operator]
                if name.endswith(("_token_id", "_token_ids", "_token_index")):
                    named.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
        return frozenset(each for each in named if each >= 0)

    def norm(self, layer: int | None) -> Callable[[Tensor], Tensor]:
        """The norm in front of a decoder layer's attention (nothing, where there is none), or behind the last layer."""
        if layer is None:
            return next(part for part in reversed(list(self.language_model.children())) if "Norm" in type(part).__name__)
        name = self.build(layer).norm
        return (lambda x: x) if name is None else self.layers[layer].get_submodule(name)

    def halves(self, layer: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Modules whose outputs are input and output of a layer's attention, and of its MLP (norms included).

        Raises:
            FoveateError: if it is not made of two such halves, one behind the other.
        """
        names = self.build(layer).halves
        if names is None:
            raise FoveateError(
                f"decoder layer {layer}: is not attention and then MLP, each added to the rows and with a norm in front; "
                "use a method that does not compare what enters and leaves them, such as fastv"
            )
        first, second, third, fourth = map(self.layers[layer].get_submodule, names)
        return first, second, third, fourth

    def rotary(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of ``layer`` at ``positions`` ``[R, B, n]``.

        R may be K times what the model has: the k-th of K equal parts of each axis' frequencies then turns by row k of the
        axis' K rows.
        """
        native = 3 if self.rotary_rows > 1 else 1
        parts = positions.shape[0] // native
        if parts <= 1:  # one row alone stands for all axes, as transformers passes it for text behind a cache
            return self._rotary(layer, x, positions[-native:])
        slots = [self._rotary(layer, x, positions[part::parts]) for part in range(parts)]
        part_of = upload(self._parts(parts), x.device)
        cos, sin = slots[0]
        for part, (c, s) in enumerate(slots[1:], start=1):
            cos, sin = torch.where(part_of == part, c, cos), torch.where(part_of == part, s, sin)
        return cos, sin

    @cached_property
    def typed_rotary(self) -> bool:
        """Whether the rotary module keeps a table for each kind of layer."""
        return "layer_type" in inspect.signature(self.language_model.rotary_emb.forward).parameters  # type: ignore[union-attr]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What kind of memory each decoder layer has, in transformers' words."""
        return decoder.kinds_of(self.config, len(self.layers))

    @cached_property
    def recurrent(self) -> tuple[int, ...]:
        """Decoder layers with a recurrent state instead of attention."""
        return tuple(
            layer
            for layer, kind in enumerate(self.kinds)
            if kind in decoder.RECURRENT or decoder.attention_of(self.layers[layer]) is None
        )

    def _rotary(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        ids = positions[0] if self.rotary_rows == 1 else positions
        kind = (self.config.layer_types[layer],) if self.typed_rotary else ()
        tables = self.language_model.rotary_emb(x, ids, *kind)  # type: ignore[operator]
        if not (isinstance(tables, tuple) and len(tables) == 2):
            raise FoveateError(
                f"text model {type(self.language_model).__name__}: its rotary positions are no cosines and sines, as those "
                "of llama or qwen2 are; load a model with such a decoder"
            )
        cos, sin = tables
        return cos.to(x.device), sin.to(x.device)  # it may have a device of its own

    def _parts(self, parts: int) -> Tensor:
        """``[c]`` which of ``parts`` equal parts of its axis each column of the tables belongs to."""
        axes = self.axis_of_frequency
        part_of = torch.empty_like(axes)
        for axis, count in enumerate(self.rotary_axes):
            part_of[axes == axis] = torch.arange(count) * parts // count
        return part_of[self._frequencies[1]]

    def query_key(self, layer: int, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, n, d]``, keys ``[B, Hkv, n, d]`` that the layer makes of its input rows ``x`` ``[B, n, D]``."""
        attention, normed = self.attention(layer), self.norm(layer)(x)
        if not self.build(layer).projected:
            made = decoder.ask(attention, normed, self._still(layer, x) if rope is None else rope)
            return made.query, made.key
        query, key = (decoder.project(attention, name, normed) for name in ("q", "k"))
        return (query, key) if rope is None else self.rotate(layer, query, key, rope)

    def keys_values(self, layer: int, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values ``[B, Hkv, n, d]`` that the layer makes of its input rows ``x`` ``[B, n, D]``."""
        attention, normed = self.attention(layer), self.norm(layer)(x)
        if not self.build(layer).projected:
            return decoder.ask(attention, normed, rope).cached
        key, value = (decoder.project(attention, name, normed) for name in ("k", "v"))
        # It rotates queries and keys at once; one head stands in for queries.
        return self.rotate(layer, key[:, :1], key, rope)[1], value

    def rotate(self, layer: int, query: Tensor, key: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both, turned by the rotary tables as the family does it."""
        return decoder.turn(self.attention(layer), query, key, rope, self.turned(layer))

    def turned(self, layer: int) -> int:
        """Numbers at the front of each head that the family's rotation is given, 0 where the layer turns nothing.

        Raises:
            FoveateError: if it does something else with queries and keys.
        """
        width = self.build(layer).turned
        if width is None:
            raise FoveateError(
                f"decoder layer {layer}: does more to its queries and keys than turning them; use a method that turns none "
                "itself, such as fastv"
            )
        return width

    def _still(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables that turn nothing."""
        native = 3 if self.rotary_rows > 1 else 1
        cos, sin = self.rotary(layer, x, torch.zeros(native, *x.shape[:2], dtype=torch.long, device=x.device))
        return torch.ones_like(cos), torch.zeros_like(sin)

    def traits(self, companion: bool = False, artifacts: Iterable[Artifact] = ()) -> Traits:
        """What methods may know of the model; ``artifacts`` go before those in its folder."""
        config, encoder = self.config, self.encoder
        fingerprint = Fingerprint(self.family, len(self.layers), config.hidden_size, config.vocab_size, self.weights)
        experts = getattr(self.config, "num_experts_per_tok", None)
        sparse = tuple(layer for layer in range(len(self.layers)) if experts and self.experts(layer) is not None)
        return Traits(
            family=self.family,
            decoder_layers=len(self.layers),
            encoder_layers=len(encoder.attention) if encoder else None,
            feature_layer=encoder.feature_layer if encoder else None,
            has_cls=encoder is not None and encoder.prefix > 0,
            rotary_rows=self.rotary_rows,
            mask_free=self.mask_free,
            fingerprint=fingerprint,
            artifacts=_artifacts(str(getattr(self.model, "name_or_path", ""))) | {a.method: a for a in artifacts},
            vision_sites=self._vision_sites,
            towers=tuple(
                TowerTraits(self.first_block(n), tower.feature_layer, tower.prefix > 0, tower.tile)
                for n, tower in enumerate(self.encoders)
            ),
            rotary_axes=self.rotary_axes,
            recurrent=self.recurrent,
            sliding=tuple(i for i, kind in enumerate(self.kinds) if kind in decoder.WINDOWS),
            cell=encoder.patches.cell if encoder and encoder.patches else None,
            merge=encoder.patches.merge if encoder and encoder.patches else 1,
            companion=companion,
            patches=encoder.tile if encoder else None,
            one_grid=self.one_grid,
            experts=experts if sparse else None,
            sparse=sparse,
            heads=self.config.num_attention_heads,
            projects=encoder is not None and not encoder.pools,
            reuses=encoder is not None and encoder.halves is not None,
            hears=self.audio is not None,
            sees=self.vision is not None,
        )

    @property
    def _vision_sites(self) -> frozenset[str]:
        if self.vision is None:
            return frozenset()
        return frozenset({"projected"}) | (self.encoder.sites if self.encoder else frozenset())

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """Frequencies of each rotary axis."""
        axes = self.axis_of_frequency
        return tuple(int((axes == axis).sum()) for axis in range(int(axes.max()) + 1))

    @property
    def axis_of_frequency(self) -> Tensor:
        """``[f]`` which axis of the positions turns each frequency."""
        return self._frequencies[0]

    @cached_property
    def _frequencies(self) -> tuple[Tensor, Tensor]:
        """The axis of each frequency ``[f]``, the frequency of each column of the tables; by turning one axis at a time."""
        device = self.home
        x = torch.zeros(1, 1, self.config.hidden_size, device=device)
        native = 3 if self.rotary_rows > 1 else 1
        layer = next((layer for layer in range(len(self.layers)) if layer not in self.recurrent), 0)
        turned = []
        for axis in range(native):
            positions = torch.zeros(native, 1, 1, dtype=torch.long, device=device)
            positions[axis] = 1
            sin = self._rotary(layer, x, positions)[1]
            if sin.ndim == 4:  # older transformers pick the axes' sections later, when they rotate
                sections = torch.tensor(self.config.rope_parameters["mrope_section"])
                axes = torch.arange(len(sections)).repeat_interleave(sections)
                return axes, torch.arange(len(axes)).repeat(2)
            turned.append(sin.reshape(-1).abs().cpu())
        angle, axes = torch.stack(turned).max(0)
        half = len(angle) // 2
        if torch.equal(angle[:half], angle[half:]):
            return axes[:half], torch.arange(half).repeat(2)
        if torch.equal(angle[::2], angle[1::2]):  # Cohere: the two columns of a frequency lie side by side
            return axes[::2], torch.arange(half).repeat_interleave(2)
        return axes, torch.arange(len(axes))  # GPT-OSS: one column for both


def square_pictures(side: int, group: int = 1, tiles: str = "pixel_values") -> Callable[[Mapping[str, Any]], list[Picture]]:
    """`Anatomy.pictures` of a family that makes ``side * side`` tokens of every image.

    ``group * group`` neighbouring patches make a token.
    """

    return lambda bound: squares(bound[tiles].shape[0], side, group)


def squares(count: int, side: int, group: int = 1) -> list[Picture]:
    """``count`` pictures of ``side * side`` tokens each, of ``group * group`` patches a token."""
    cells = block_cells(side, side, group)
    return [Picture((View(side, side, cells=cells + number * cells.numel()),)) for number in range(count)]


def block_cells(rows: int, columns: int, group: int) -> Tensor:
    """``[rows * columns, group * group]`` patches, in raster order, of each token of a grid of square groups."""
    patch = torch.arange(rows * columns * group * group).reshape(rows, group, columns, group)
    return patch.transpose(1, 2).reshape(rows * columns, group * group)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hooks, if any, run a module (its parameters may be kept elsewhere)."""
    hook: Any = getattr(module, "_hf_hook", None)
    found = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in found if device is not None), None)


def _artifacts(folder: str) -> dict[str, Artifact]:
    """Artifacts that lie in a local checkpoint folder; whoever uses one checks that it fits."""
    if not folder or not any(Path(folder, FOLDER).glob("*.json")):
        return {}
    return {artifact.method: artifact for artifact in Artifact.all_in(Path(folder, FOLDER))}
