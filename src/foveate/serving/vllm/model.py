"""The worker's side: pictures are encoded, and what the method keeps of them goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

from torch import Tensor
from vllm.logger import init_logger

from foveate.core.errors import FoveateError
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.models.anatomy import Anatomy, Picture
from foveate.serving.settings import FULL, Keep
from foveate.serving.vllm import metrics
from foveate.serving.vllm.admission import Pruning
from foveate.serving.vllm.encoding import Tower, encode, even, program
from foveate.serving.vllm.fields import FIELD, unpacked

LOG = init_logger("vllm.foveate")

Rows = tuple[Tensor, Tensor]
"""What stays of a picture ``[k, D]``, and where in its grid ``[k, 3]``."""


class PruningModel:
    """Beside vLLM's model of a family."""

    family: ClassVar[str]
    tokens: ClassVar[str] = "image_token_id"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.pruner: Pruner | None = None
        pruning = Pruning.of(self.family, config)
        if pruning is None:
            return
        reason = refused(vllm_config, pruning)
        if reason:
            raise FoveateError(f"recipe {pruning.label!r}: {reason}")
        parts: Any = self
        anatomy = Anatomy(
            family=self.family,
            model=parts,
            multimodal=parts,
            vision=parts.visual if hasattr(self, "visual") else parts.vision_tower,
            language_model=parts.language_model,
            layers=(),
            image_tokens=(getattr(config, self.tokens),),
            pictures=pruning.pictures,
            encoder=self.tower(config),
            rotary_rows=pruning.traits.rotary_rows,
            config=config.get_text_config(),
        )
        self.pruner = Pruner(pruning, anatomy, vllm_config.scheduler_config.max_num_encoder_input_tokens)
        LOG.info(
            "foveate: %s, requests may ask for %s to %s tokens of a picture; videos and other media stay whole",
            pruning.label,
            pruning.settings.min_keep or 1,
            pruning.most if pruning.most != FULL else "all",
        )

    def tower(self, config: Any) -> Tower:
        """The parts of the tower that vLLM has built."""
        raise NotImplementedError

    def share(self, bound: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
        """The fields of some pictures, given those of all."""
        return {
            name: value[list(chosen)] if isinstance(value, Tensor) else [value[number] for number in chosen]
            for name, value in bound.items()
        }

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """What stays of each picture."""
        keeps = kwargs.pop(FIELD, None)
        if self.pruner is None or keeps is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        tower: Callable[..., Any] = super().embed_multimodal  # type: ignore[misc]
        return [self.placed(*rows) for rows in self.pruner.encode(keeps, kwargs, tower, self.share)]

    def placed(self, rows: Tensor, place: Tensor) -> Tensor:
        """The rows as the language model takes them."""
        return rows


class Pruner:
    """Encodes pictures under the server's method.

    Attributes:
        pruning: what the operator said.
        anatomy: of vLLM's model.
        most: tokens, before any is dropped, of pictures that are encoded at a time.
    """

    def __init__(self, pruning: Pruning, anatomy: Anatomy, most: int) -> None:
        self.pruning, self.anatomy, self.most = pruning, anatomy, most
        self._scoring = metrics.Scoring(pruning.label)
        # Clients choose the keep, so only so many are remembered.
        self._program: Callable[[Keep], Program] = lru_cache(maxsize=64)(self._made)

    def encode(
        self,
        keeps: Sequence[Tensor],
        bound: Mapping[str, Any],
        tower: Callable[..., Any],
        share: Callable[..., dict[str, Any]],
    ) -> list[Rows]:
        """What stays of each picture, given all their fields; ``tower`` takes what ``share`` makes of them.

        vLLM counts kept tokens where it bounds a batch of its encoder, so pictures are encoded a few at a time; those of
        one keep together.
        """
        pictures = self.pruning.pictures(bound)
        wanted = [unpacked(numbers) for numbers in keeps]
        kept: list[Rows | None] = [None] * len(pictures)
        for chosen in self._batches(pictures, wanted):
            keep, counted = wanted[chosen[0]]
            part = bound if len(chosen) == len(pictures) else share(bound, chosen)
            shown = [pictures[number] for number in chosen]
            for number, rows in zip(chosen, self._encode(keep, counted, shown, part, partial(tower, **part))):
                kept[number] = rows
        return kept  # type: ignore[return-value]

    def _batches(self, pictures: Sequence[Picture], wanted: Sequence[tuple[Keep, bool]]) -> Iterator[list[int]]:
        """Numbers of pictures that are encoded together."""
        for one in dict.fromkeys(wanted):
            batch, tokens = list[int](), 0
            for number in (number for number, each in enumerate(wanted) if each == one):
                if batch and tokens + pictures[number].count > self.most:
                    yield batch
                    batch, tokens = [], 0
                batch.append(number)
                tokens += pictures[number].count
            yield batch

    def _encode(
        self,
        keep: Keep,
        counted: bool,
        pictures: Sequence[Picture],
        bound: Mapping[str, Any],
        tower: Callable[[], Any],
    ) -> list[Rows]:
        counts = [self.pruning.kept(keep, picture) for picture in pictures]
        whole = all(count == picture.count for count, picture in zip(counts, pictures))
        if keep == FULL or (whole and self.pruning.spares):
            return even(pictures, list(tower()), counts)
        clock = Clock(self.anatomy.home)
        try:
            kept = encode(self._program(keep), bound, tower, clock)
            found = [len(rows) for rows, _ in kept]
            if found != counts:
                raise FoveateError(f"{self.pruning.label}: kept {found} rows of pictures that were to keep {counts}")
        except Exception as error:
            if not counted:  # nobody is served yet
                raise
            # What raises in a worker would end the whole server.
            metrics.failed(self.pruning.label, len(pictures))
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            LOG.error("foveate: %s failed, an even grid stands in for it: %s", self.pruning.label, reason)
            return even(pictures, list(tower()), counts)
        if counted:
            self._scoring.add(clock)
        return kept

    def _made(self, keep: Keep) -> Program:
        return program(self.pruning.at(keep), self.anatomy, self.pruning.traits)


def refused(server: Any, pruning: Pruning) -> str | None:
    """Why a server as it is configured cannot run the recipe, with the remedy; None if it can."""
    compilation, parallel, media = server.compilation_config, server.parallel_config, server.model_config.multimodal_config
    listens = bool(pruning.at(pruning.method.keep).reads(pruning.traits))
    if compilation.compile_mm_encoder or compilation.cudagraph_mm_encoder:
        return "a compiled encoder shows nothing; leave out compile_mm_encoder and cudagraph_mm_encoder"
    if listens and parallel.tensor_parallel_size > 1:
        return "each worker sees a part of the encoder; use --data-parallel-size instead of --tensor-parallel-size"
    if media.mm_encoder_attn_dtype == "fp8":
        return "the encoder's attention is in fp8; leave out --mm-encoder-attn-dtype"
    if media.video_pruning_rate:
        return "--video-pruning-rate changes what the encoder returns; leave it out"
    if server.lora_config is not None and server.lora_config.enable_tower_connector_lora:
        return "LoRA of the tower counts its tokens by what is kept; leave out --enable-tower-connector-lora"
    if not pruning.mrope:
        return None
    if parallel.pipeline_parallel_size > 1:
        return "positions reach the first pipeline stage alone; leave out --pipeline-parallel-size"
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        return (
            'full CUDA graphs miss the positions of pictures; add --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
        )
    if server.speculative_config is not None:
        return "a drafter misses the positions of pictures; leave out --speculative-config"
    return None
