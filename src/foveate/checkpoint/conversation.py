"""What a model is asked, and what it answers: conversations as its processor's chat template takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from foveate.core.artifact import Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.text import first_line
from foveate.core.traits import Traits
from foveate.engine import Session, attach
from foveate.models import anatomy

_REFUSALS = (ValueError, RuntimeError, ArithmeticError)
"""What processors raise over pictures that they cannot take."""
_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for an answer where the chat template is asked what comes behind one."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode with its processor, the name under which it was asked for, and what lies beside it.

    Attributes:
        companion: a text tower.
        artifacts: calibrated numbers, besides those in the model's own folder.
        system: what every conversation begins with, unless it brings a system prompt of its own.
    """

    name: str
    model: Any
    processor: Any
    companion: Companion | None = None
    artifacts: tuple[Artifact, ...] = ()
    system: str | None = None

    def attach(self, recipe: Recipe | str, seed: int = 0) -> Session:
        """`foveate.attach`, with all that lies beside the model."""
        return attach(self.model, recipe, seed=seed, companion=self.companion, artifacts=self.artifacts)

    @property
    def traits(self) -> Traits:
        """What methods may know of the model, and of what lies beside it."""
        return anatomy(self.model).traits(self.companion is not None, self.artifacts)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def inputs(
        self, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str], session: Session | None = None
    ) -> dict[str, torch.Tensor]:
        """Model inputs for one conversation each, its pictures and then a prompt, padded on the left.

        ``session``: the one that they are for; its recipe may change pictures first.
        """
        try:
            return self.chat([_opening(images, prompt) for images, prompt in zip(pictures, prompts, strict=True)], session)
        except FoveateError:
            raise
        except _REFUSALS:
            for images in pictures:
                reason = refusal(self.processor, images)
                if reason is not None:
                    raise FoveateError(reason) from None
            raise

    def answered(
        self,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        answers: Sequence[str],
        session: Session | None = None,
    ) -> dict[str, torch.Tensor]:
        """As `inputs`, with an answer and its end behind each prompt, and ``labels``, which are -100 everywhere else."""
        words = self.processor.tokenizer(list(answers), add_special_tokens=False).input_ids
        pad = self.processor.tokenizer.pad_token_id or 0
        return with_answers(self.inputs(pictures, prompts, session), [[*each, self._end_of_turn] for each in words], pad)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        tokenizer = self.processor.tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*tokenizer.all_special_ids, *added})

    @cached_property
    def _end_of_turn(self) -> int:
        """What ends an answer: the first special token that the chat template puts behind one, else the tokenizer's own."""
        tokenizer = self.processor.tokenizer
        turns = [*_opening([], "?"), {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}]
        behind = self.processor.apply_chat_template(turns).rpartition(_ANSWER)[2]
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        return next((each for each in ids if each in self.special), tokenizer.eos_token_id)

    def chat(
        self, conversations: Sequence[Sequence[dict[str, Any]]], session: Session | None = None
    ) -> dict[str, torch.Tensor]:
        """Model inputs for conversations as transformers' chat templates take them, padded on the left; as `inputs`."""
        whole = [self._instructed(turns) for turns in conversations]
        if session is not None:
            whole = [[self._prepared(turn, session) for turn in turns] for turns in whole]
        inputs = _processed(self.processor, whole)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def check_system(self) -> None:
        """Refuse a system prompt that the chat template has no place for, or that it leaves out without a word."""
        if self.system is None:
            return
        try:
            rendered = self.processor.apply_chat_template(self._instructed(_opening([], "?")), add_generation_prompt=True)
        # Templates raise what they like about roles that they do not know.
        except Exception as error:
            raise FoveateError(
                f"system={self.system!r}: the model's chat template refuses it ({first_line(error)})"
            ) from error
        if self.system.strip() not in rendered:
            raise FoveateError(f"system={self.system!r}: the model's chat template leaves it out; put it into the prompt")

    def refuse_placeholders(self, prompts: Iterable[str]) -> None:
        """Refuse prompts that name the place of a picture: all pictures stand in front."""
        placeholder = getattr(self.processor, "image_token", None)
        for prompt in prompts:
            if placeholder and placeholder in prompt:
                raise FoveateError(f"prompt={prompt!r}: leave out {placeholder!r}; the picture is put in front by itself")

    @torch.inference_mode()
    def converse(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        max_new_tokens: int,
        session: Session | None = None,
        turned: Callable[[], None] | None = None,
    ) -> list[str]:
        """The greedy answer to each of several prompts about the same pictures, all turns on one cache; as `inputs`.

        ``turned`` is called behind each turn.
        """
        inputs = self.inputs([pictures], prompts[:1], session)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        output, answers = None, []
        for number, prompt in enumerate(prompts):
            if output is not None:
                ids = self.continued(output.sequences[0], prompts[number - 1], prompt)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                settings["past_key_values"] = output.past_key_values
            output = self.model.generate(**inputs, **settings)
            new = output.sequences[0, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.decode(new, skip_special_tokens=True).strip())
            if turned is not None:
                turned()
        return answers

    def _prepared(self, turn: dict[str, Any], session: Session) -> dict[str, Any]:
        """A turn with its pictures as the session's recipe wants them."""
        if isinstance(turn["content"], str):
            return turn
        pictures = [part["image"] for part in turn["content"] if part["type"] == "image"]
        changed = iter(session.pictures(pictures, self.processor))
        content = [{**part, "image": next(changed)} if part["type"] == "image" else part for part in turn["content"]]
        return {**turn, "content": content}

    def _instructed(self, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system is None or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *turns]

    def continued(self, sequence: torch.Tensor, asked: str, prompt: str) -> torch.Tensor:
        """The ids so far with the next turn behind them, ``[1, n]``: what the chat template puts behind an answer."""
        turns = [*_opening([], asked), {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}]
        turns += _opening([], prompt)
        rendered = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        behind = self.processor.tokenizer(
            rendered.rpartition(_ANSWER)[2], add_special_tokens=False, return_tensors="pt"
        ).input_ids[0]
        # The model may or may not have ended its answer itself.
        ended = int(len(behind) > 0 and bool(sequence[-1] == behind[0]))
        return torch.cat([sequence[: len(sequence) - ended], behind.to(sequence.device)])[None]

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        """The greedy answer to each conversation."""
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def refusal(processor: Any, pictures: Sequence[Image.Image]) -> str | None:
    """Why a processor refuses one of the pictures, in a line; None if it takes them all."""
    for picture in pictures:
        try:
            _processed(processor, [_opening([picture], "?")])
        except _REFUSALS as error:
            named = picture.info.get("source", "image")
            width, height = picture.size
            return f"{named}: {width} x {height} pixels, which the model's processor refuses ({first_line(error)})"
    return None


def with_answers(inputs: Mapping[str, torch.Tensor], answers: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Model inputs of prompts, padded on the left, with answers (ids) behind them and ``labels``; padded on the left."""
    ids, longest = inputs["input_ids"], max(map(len, answers))
    whole = {**inputs, "labels": torch.full_like(ids, -100)}
    rows = {name: value for name, value in whole.items() if value.shape == ids.shape and not value.is_floating_point()}
    blank = {"input_ids": pad, "labels": -100}
    for name, value in rows.items():
        longer = value.new_full((len(ids), ids.shape[1] + longest), blank.get(name, 0))
        for sample, answer in enumerate(answers):
            longer[sample, longest - len(answer) : longer.shape[1] - len(answer)] = value[sample]
            # Other rows than these say what kind a token is of: 0 is text.
            told = answer if name in blank else [int(name == "attention_mask")] * len(answer)
            longer[sample, longer.shape[1] - len(answer) :] = torch.tensor(told, dtype=value.dtype)
        whole[name] = longer
    return whole


def _processed(processor: Any, conversations: Sequence[Sequence[dict[str, Any]]]) -> Any:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def _opening(images: Sequence[Image.Image], prompt: str) -> list[dict[str, Any]]:
    """The messages of a first turn."""
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]
