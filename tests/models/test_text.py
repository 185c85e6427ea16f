"""A decoder without pictures is a family, too: what its prompts keep, what is refused, and how it is loaded and asked."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import foveate
from foveate import FoveateError, checkpoint
from foveate.core import registry
from foveate.core.traits import Traits
from foveate.models import anatomy
from tests import tiny
from tests.hub import write_text_checkpoint

KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
LENGTH = 40
RECIPE = "snapkv(keep=0.3, window=4)"


def prompts(count: int = 2) -> dict[str, Any]:
    """Of different lengths, padded on the left."""
    ids = torch.randint(11, tiny.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    there = torch.arange(LENGTH) >= 7 * torch.arange(count)[:, None]
    return {"input_ids": ids.where(there, 0), "attention_mask": there.long()}


def answer(model: Any, **options: Any) -> torch.Tensor:
    settings = {**prompts(), "max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_any_causal_decoder_is_hosted(kind: str) -> None:
    model = tiny.text(kind=kind)
    traits = anatomy(model).traits()
    plain = answer(model)

    with foveate.attach(model, "snapkv(keep=1.0, window=4)"):
        assert torch.equal(answer(model), plain)
    with foveate.attach(model, RECIPE) as session:
        answer(model)

    assert (traits.family, traits.sees, traits.encoder_layers, traits.vision_sites) == ("text", False, None, frozenset())
    assert torch.equal(answer(model), plain)
    assert session.report.original_visual_tokens == 0
    assert session.report.idle == ()


def test_a_share_is_of_each_prompts_tokens_padding_left_out() -> None:
    model = tiny.text()
    with foveate.attach(model, RECIPE) as session:
        cache = answer(model, return_dict_in_generate=True, max_new_tokens=1).past_key_values

    held = [int((layer.ledger.tokens(2, torch.device("cpu"))[0, 0] >= 0).sum()) for layer in cache.layers]
    assert held == [int(0.3 * LENGTH)] * 4
    assert session.report.kv_kept == pytest.approx([0.3] * 4)


def test_a_prompt_that_nothing_is_taken_of_is_said_to_be_left_alone() -> None:
    model = tiny.text()
    with foveate.attach(model, "snapkv(keep=0.3, window=64)") as session:
        answer(model)

    assert session.report.idle_lines() == ["snapkv(keep=0.3) changed nothing of the prompt (36.5 tokens)"]


@pytest.mark.parametrize(
    "recipe", ["fastv", "hiprune(keep=4)", "shortv(layers=(1,))", "downsample", "aircache", "hermes", "mbq"]
)
def test_what_acts_on_pictures_is_refused_by_name(recipe: str) -> None:
    name = recipe.partition("(")[0]
    with pytest.raises(
        FoveateError, match=rf"^{name}: acts on the tokens of pictures, and this is a model of text alone; use"
    ):
        foveate.attach(tiny.text(), recipe)


def test_sparing_text_is_refused_where_there_is_nothing_else() -> None:
    with pytest.raises(FoveateError, match=r"^snapkv: tokens='visual': this is a model of text alone; use tokens='all'$"):
        foveate.attach(tiny.text(), "snapkv(tokens='visual')")


def test_every_method_says_whether_it_acts_on_text() -> None:
    textual = {name for name, kind in registry.methods().items() if kind.textual}

    assert textual == {
        "awq", "flashcache", "gptaq", "gptq", "h2o", "kivi", "mixkv", "modes", "prefixkv", "press", "pyramidkv",
        "qig", "quant_experts", "random_kv", "rtn", "smoothquant", "snapkv", "streamingllm", "uat",
    }  # fmt: skip


def test_presses_rank_all_of_a_text_and_only_pictures_elsewhere() -> None:
    press = registry.get("press")()

    def fitted(model: Any) -> Any:
        traits: Traits = anatomy(model).traits()
        return press.fitted(traits).tokens

    assert fitted(tiny.text()) == "all"
    assert fitted(tiny.llava()) == "visual"


def test_a_decoder_without_rotary_positions_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    with pytest.raises(FoveateError, match="text model GPT2Model: its layers are not given rotary positions"):
        foveate.attach(model, RECIPE)


def test_a_cache_goes_on_in_a_second_turn_and_refuses_without_a_session() -> None:
    model = tiny.text()
    first = prompts(1)
    with foveate.attach(model, RECIPE) as session:
        output = model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, torch.full((1, 6), 30)], dim=1)
        second = model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=4, do_sample=False)
        held = session.report.kv_kept

    assert second.shape == (1, LENGTH + 4 + 6 + 4)
    # Later turns stay as they are.
    assert held == pytest.approx([(int(0.3 * LENGTH) + 4 + 6 + 3) / (LENGTH + 4 + 6 + 3)] * 4)
    with pytest.raises(FoveateError):
        model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=1)


def test_beams_answer_as_without_where_all_stays() -> None:
    model = tiny.text()
    plain = answer(model, num_beams=3)
    with foveate.attach(model, "streamingllm(keep=1.0, steps=False)"):
        assert torch.equal(answer(model, num_beams=3), plain)


def test_a_prompt_in_parts_is_read_without_an_owner_of_the_cache_and_refused_with_one() -> None:
    model = tiny.text()
    plain = answer(model, prefill_chunk_size=16)
    with foveate.attach(model, "none"):
        assert torch.equal(answer(model, prefill_chunk_size=16), plain)
    with foveate.attach(model, RECIPE), pytest.raises(FoveateError, match="needs the prompt in one forward"):
        answer(model, prefill_chunk_size=16)


def test_beams_of_a_compressed_prompt_stay_apart() -> None:
    model = tiny.text()
    with foveate.attach(model, RECIPE):
        one = answer(model, num_beams=1, num_return_sequences=1)
        beams = answer(model, num_beams=3, num_return_sequences=3)
    assert beams.shape == (6, LENGTH + 8)
    assert one.shape == (2, LENGTH + 8)
    assert len({tuple(row.tolist()) for row in beams[:3]}) == 3


def test_threads_are_answered_as_alone() -> None:
    model, found = tiny.text(), {}
    given = [{name: value[at : at + 1] for name, value in prompts(4).items()} for at in range(4)]
    with foveate.attach(model, RECIPE):
        alone = [answer(model, **each) for each in given]

        def work(number: int) -> None:
            found[number] = answer(model, **given[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert all(torch.equal(found[number], alone[number]) for number in range(4))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text_checkpoint(tmp_path_factory.mktemp("text")))


def test_a_text_checkpoint_is_loaded_by_name_and_asked(written: str) -> None:
    loaded = checkpoint.load(written, "cpu", "float32")
    inputs = loaded.inputs([[], []], ["what is it?", "and what is that over there?"])

    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].sum(1).tolist() == [
        len("user: what is it?</s>assistant:") - 3,
        inputs["input_ids"].shape[1],
    ]
    with loaded.attach("snapkv(keep=0.5, window=4)") as session:
        assert len(loaded.answer(inputs, 3)) == 2
        assert len(loaded.converse([], ["what is it?", "and now?"], 3)) == 2
    assert session.report.original_visual_tokens == 0


def test_a_configuration_alone_says_that_a_model_reads_text(written: str, tmp_path: Path) -> None:
    shutil.copy(Path(written, "config.json"), tmp_path)

    assert checkpoint.is_text(str(tmp_path))
    with pytest.raises(FoveateError, match=r"^model='/nowhere': must be reference,"):
        checkpoint.is_text("/nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FoveateError, match=r"^model='.*': cannot be loaded as a language model \("):
        checkpoint.is_text(str(tmp_path))


def test_answers_stand_behind_prompts(written: str) -> None:
    loaded = checkpoint.load(written, "cpu", "float32")
    answered = loaded.answered([[]], ["what is it?"], ["a hill"])
    labelled = answered["labels"][0] != -100

    assert loaded.processor.decode(answered["input_ids"][0, labelled]) == "a hill</s>"


def test_a_system_prompt_stands_in_front(written: str) -> None:
    loaded = checkpoint.load(written, "cpu", "float32", system="Be brief.")

    assert loaded.processor.decode(loaded.inputs([[]], ["why?"])["input_ids"][0]).startswith("system: Be brief.")


def test_a_picture_is_refused_in_a_line(written: str) -> None:
    loaded = checkpoint.load(written, "cpu", "float32")
    with pytest.raises(
        FoveateError, match=r"^image: the model reads text alone; leave it out, or use a vision-language model$"
    ):
        loaded.inputs([[Image.new("RGB", (8, 8))]], ["what is it?"])


def test_the_processor_is_saved_with_the_model(written: str, tmp_path: Path) -> None:
    checkpoint.load_processor(written).save_pretrained(tmp_path)

    assert (tmp_path / "tokenizer.json").is_file()
