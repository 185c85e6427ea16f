"""A CLIP text tower beside the model, and what CDPruner makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPModel

import foveate
from foveate.core.errors import FoveateError
from foveate.methods.before_llm.cdpruner import EPSILON, likeness, scaled
from foveate.models import anatomy
from foveate.ops.dpp import greedy_map
from tests import tiny
from tests.clip import clip, text_tokenizer, tokenizer
from tests.suite.bodies import BODIES, RAGGED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint."""
    made = tmp_path_factory.mktemp("clip")
    clip().save_pretrained(made)
    text_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def companion(folder: Path) -> foveate.ClipCompanion:
    return foveate.ClipCompanion.load(folder, tokenizer())


def ids_of(words: str) -> Tensor:
    return torch.tensor([int(word[1:]) for word in words.split()])


def text_features(model: CLIPModel, words: str) -> Tensor:
    with torch.no_grad():
        return model.get_text_features(**text_tokenizer()(words, return_tensors="pt")).pooler_output


def test_a_question_gets_clip_s_own_text_features(companion: foveate.ClipCompanion) -> None:
    (embeds,) = companion.question([ids_of("w20 w33 w12")])

    assert_close(embeds, text_features(clip(), "w20 w33 w12"))
    assert not torch.allclose(embeds, text_features(clip(), "w20 w12 w33"), atol=1e-3)


def test_placeholders_and_padding_are_no_words(companion: foveate.ClipCompanion) -> None:
    bare, marked = companion.question([ids_of("w20 w33"), torch.tensor([1, tiny.IMAGE, 20, 33, 0])])

    assert_close(marked, bare)


def test_features_get_clip_s_own_projection(companion: foveate.ClipCompanion) -> None:
    features, model = torch.randn(2, 5, 32), clip()

    assert_close(companion.align(features), model.visual_projection(model.vision_model.post_layernorm(features)).detach())


def test_a_long_question_is_read_in_segments_of_77(companion: foveate.ClipCompanion) -> None:
    words = [f"w{11 + number % 53}" for number in range(100)]
    long, short = companion.question([ids_of(" ".join(words)), ids_of("w20")])
    ids = text_tokenizer()(" ".join(words), return_tensors="pt").input_ids
    assert ids.shape == (1, 102)
    with torch.no_grad():
        parts = [clip().get_text_features(part, torch.ones_like(part)).pooler_output for part in ids.split(77, dim=1)]

    assert_close(long, torch.cat(parts))
    assert short.shape == (1, 12)


def test_it_comes_in_the_dtype_that_is_asked_for(folder: Path) -> None:
    half = foveate.ClipCompanion.load(folder, tokenizer(), dtype=torch.bfloat16)

    assert half.question([ids_of("w20")])[0].dtype == torch.bfloat16
    assert half.align(torch.randn(1, 5, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["cdpruner(keep=5, relevance='clip')", "cdpruner(keep=5)"])
def test_cdpruner_selects_by_the_features_and_the_question_of_each_sample(
    companion: foveate.ClipCompanion, method: str
) -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    seen: dict[str, Tensor] = {}
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda module, args, output: seen.update(features=args[0], x=output))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    sample_of = [0, 1, 1, 2]
    relevance = scaled(-likeness(companion.align(seen["features"]), texts(companion, inputs, sample_of)), EPSILON)
    expected = greedy_map(seen["x"], relevance, 5)[0].sort(dim=1).values

    with torch.no_grad(), foveate.attach(model, method, companion=companion) as session:
        model(**inputs)

    kept = [item for items in session.trace.alive(0) for item in items]
    assert torch.equal(torch.stack(kept), expected)


def texts(companion: foveate.ClipCompanion, inputs: dict[str, Tensor], sample_of: Sequence[int]) -> list[Tensor]:
    """The embeddings of each image's question: what stands behind the last image of its sample."""
    questions = [row[row.eq(tiny.IMAGE).nonzero().max() + 1 :] for row in inputs["input_ids"]]
    embeds = companion.question(questions)
    return [embeds[sample] for sample in sample_of]


class Chance:
    """A companion that is no CLIP: for encoders that pack all images into one sequence."""

    def question(self, ids: Sequence[Tensor]) -> list[Tensor]:
        return [torch.ones(1, 6) for _ in ids]

    def align(self, features: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return features @ torch.randn(features.shape[-1], 6, generator=generator)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "llava_next", "gemma3"])
def test_every_encoder_has_features_to_align(name: str) -> None:
    body, companion = BODIES[name], Chance()
    model, inputs = body.model(), body.inputs(RAGGED)
    with torch.no_grad(), foveate.attach(model, "cdpruner(keep=5, relevance='clip')", companion=companion) as session:
        together = model(**inputs).logits
        alone = model(**body.inputs(RAGGED, only=0)).logits
        last = anatomy(model).traits().decoder_layers
        assert all(len(item) == 5 for item in session.trace.alive(last)[0])
    assert_close(together[0, -1], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_a_model_with_another_vision_tower_is_refused(companion: foveate.ClipCompanion) -> None:
    with pytest.raises(FoveateError, match="companion: is for vision features of width 32, this model's have 48"):
        companion.align(torch.zeros(1, 4, 48))


def test_a_checkpoint_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    tiny.llava().config.save_pretrained(tmp_path)

    with pytest.raises(FoveateError, match=r"companion='.*': is a llava model; must be a CLIP model"):
        foveate.ClipCompanion.load(tmp_path, tokenizer())


def test_a_checkpoint_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(FoveateError, match=r"companion='./absent': cannot be loaded as a CLIP model"):
        foveate.ClipCompanion.load("./absent", tokenizer(), local_files_only=True)
