"""The server's side: how many placeholders a picture gets, what is refused, who a picture is in the caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from threading import Lock
from typing import Any, ClassVar

from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from foveate.core.errors import FoveateError
from foveate.models.anatomy import Picture, View
from foveate.serving.ticket import KEEP, TICKET, note
from foveate.serving.vllm import metrics
from foveate.serving.vllm.admission import Pruning
from foveate.serving.vllm.fields import DUMMY, FIELD, ours, packed
from foveate.serving.vllm.identity import identity

REMEMBERED = 65536
"""Pictures of which is remembered how many tokens they have."""


class PruningInfo:
    """Beside vLLM's ``ProcessingInfo`` of a family: the most that a picture may take of caches and budgets."""

    family: ClassVar[str]

    @cached_property
    def pruning(self) -> Pruning | None:
        """The server's recipe, None without one."""
        return Pruning.of(self.family, self.get_hf_config())  # type: ignore[attr-defined]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """By the operator's bound; of pictures that vLLM is to measure itself, the dummies have it."""
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        if self.pruning is None or most is None:
            return most  # type: ignore[no-any-return]
        # Families that know it without a dummy show each picture as one grid.
        return {**most, "image": self.pruning.kept(self.pruning.most, Picture((View(1, most["image"]),)))}


class PruningProcessor:
    """Beside vLLM's processor of a family."""

    info: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning: Pruning | None = self.info.pruning
        self._before: OrderedDict[str, int] = OrderedDict()
        self._lock = Lock()

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Pictures of the most tokens that the operator allows."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.pruning is None or "image" not in inputs.mm_data_items:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={KEEP: self.pruning.most, DUMMY: True})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Refuse what is not ours to take, and count."""
        if self.pruning is None or not inputs.mm_data_items.get("image"):
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        given = dict(inputs.hf_processor_mm_kwargs)
        ticket, dummy, keep = given.pop(TICKET, None), given.pop(DUMMY, False), self.pruning.asked(given.pop(KEEP, None))
        if given:
            raise FoveateError(
                f"mm_processor_kwargs={sorted(given)}: options of the processor are the operator's while a recipe is set; "
                f"a request may give {KEEP!r} alone"
            )
        if isinstance(inputs.mm_data_items["image"], EmbeddingItems | DictEmbeddingItems):
            raise FoveateError(
                "image_embeds: nothing is known of how they were encoded while a recipe is set; send pictures"
            )
        options = {KEEP: keep, DUMMY: True} if dummy else {KEEP: keep}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)  # type: ignore[misc]
        if not dummy:
            self._count(result, ticket)
        return result

    def _get_mm_hashes(self, inputs: Any) -> Any:
        if self.pruning is None:
            return super()._get_mm_hashes(inputs)  # type: ignore[misc]
        rest, keep, _ = ours(inputs.hf_processor_mm_kwargs)
        hashes = dict(super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=rest)))  # type: ignore[misc]
        if "image" in hashes:
            hashes["image"] = [identity(own, self.pruning.method, keep) for own in hashes["image"]]
        return hashes

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        rest, keep, dummy = ours(hf_kwargs)
        made = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        if self.pruning is not None and mm_items.get("image"):
            made[FIELD] = packed(keep, counted=not dummy).expand(len(mm_items["image"]), -1).contiguous()
        return made

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, ours(hf_processor_mm_kwargs)[0]))  # type: ignore[misc]
        if FIELD in hf_inputs:
            fields[FIELD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        rest, keep, _ = ours(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        if self.pruning is None:
            return updates  # type: ignore[no-any-return]

        def shorter(whole: Any, number: int) -> list[int]:
            tokens: list[int] = whole(number)
            picture = self._picture(out_mm_kwargs["image"][number])
            if picture.count != len(tokens):
                raise FoveateError(f"a picture of {len(tokens)} placeholders has {picture.count} tokens; please report this")
            return tokens[: self.pruning.kept(keep, picture)]  # type: ignore[union-attr]

        return [
            replace(update, replacement=partial(shorter, update.replacement)) if update.modality == "image" else update
            for update in updates
        ]

    def _picture(self, fields: Any) -> Picture:
        """What stands behind a picture's placeholders, from its fields."""
        bound = {name: field.data[None] for name, field in fields.items() if isinstance(field.data, Tensor)}
        return self.pruning.pictures(bound)[0]  # type: ignore[union-attr, no-any-return]

    def _count(self, result: Any, ticket: Any) -> None:
        """Fields of a picture are gone once it is cached: what it had is remembered by its identity."""
        pruning = self.pruning
        assert pruning is not None
        fields = result["mm_kwargs"].get("image", ())
        for one, known, place in zip(fields, result["mm_hashes"]["image"], result["mm_placeholders"]["image"]):
            before = self._had(known, None if one is None else self._picture(one).count, place.length)
            after = place.length
            metrics.count(pruning.label, before, after)
            if ticket is not None:
                note(int(ticket), before, after)

    def _had(self, known: str, seen: int | None, otherwise: int) -> int:
        """Placeholders that a picture had, by its identity."""
        with self._lock:
            before = self._before.pop(known, otherwise) if seen is None else seen
            self._before[known] = before
            if len(self._before) > REMEMBERED:
                self._before.popitem(last=False)
        return before
