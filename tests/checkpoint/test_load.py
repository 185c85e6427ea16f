"""How a user's own model is loaded: its keywords, its system prompt, and what is said when that fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.hub import write_checkpoint
from transformers.utils import logging as transformers_logging

from foveate import FoveateError, checkpoint

PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen")))


def test_keywords_reach_the_model(qwen: str) -> None:
    loaded = checkpoint.load(qwen, "cpu", "float32", model_args={"attn_implementation": "eager"})

    assert loaded.model.config._attn_implementation == "eager"


def test_a_device_map_places_the_model(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: pytest.fail("the model was moved"))

    loaded = checkpoint.load(qwen, "cpu", "float32", model_args={"device_map": "cpu"})

    assert loaded.model.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_implementation": "nope"}, 'attn_implementation="nope"'),
        ({"device_map": "nope"}, "device_map"),
        ({"quantization_config": {"quant_method": "nope"}}, "Unknown quantization type, got nope"),
    ],
)
def test_what_transformers_refuses_is_one_line(qwen: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=rf"cannot be loaded as a language model .*{message}") as caught:
        checkpoint.load(qwen, "cpu", "float32", model_args=arguments)

    assert "\n" not in str(caught.value)


def test_a_device_and_a_device_map_are_one_too_many() -> None:
    with pytest.raises(FoveateError, match="device='cpu': the device_map of --model-args places the model"):
        checkpoint.resolve_device("cpu", {"device_map": "auto"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_not_offered() -> None:
    with pytest.raises(FoveateError, match=r"^device='cuda': is not available here; use cpu or auto$"):
        checkpoint.resolve_device("cuda")


def test_a_system_prompt_begins_every_conversation(qwen: str) -> None:
    loaded = checkpoint.load(qwen, "cpu", "float32", system="Answer in one word.")

    ids = loaded.inputs([[PICTURE], []], ["what is it?", "and you?"])["input_ids"]

    for text in loaded.processor.batch_decode(ids):
        assert text.partition("<|im_start|>")[2].startswith("system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n")


def test_a_conversation_keeps_the_system_prompt_that_it_brings(qwen: str) -> None:
    loaded = checkpoint.load(qwen, "cpu", "float32", system="Answer in one word.")
    own = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("system", "Lie."), ("user", "?"))]

    text = loaded.processor.decode(loaded.chat([own])["input_ids"][0])

    assert "Lie." in text
    assert "one word" not in text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("user: {{ messages[-1]['content'][-1]['text'] }}", "leaves it out; put it into the prompt"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
    ],
)
def test_a_template_without_a_place_for_it_is_refused(template: str, message: str, tmp_path: Path) -> None:
    folder = write_checkpoint("qwen2_5_vl", tmp_path)
    (folder / "chat_template.jinja").write_text(template)

    with pytest.raises(FoveateError, match=f"system='Be kind.': .*{message}"):
        checkpoint.load(str(folder), "cpu", "float32", system="Be kind.")


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    folder = write_checkpoint("smolvlm", tmp_path)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)

    with pytest.raises(FoveateError, match=r"pip install num2words`\.\); pip install 'foveate\[smolvlm\]'$"):
        checkpoint.load(str(folder), "cpu", "float32")


def test_what_others_see_of_transformers_stays_as_it_was(qwen: str) -> None:
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        checkpoint.load_processor(qwen)

        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_error()


def test_loading_is_logged(qwen: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="foveate")

    checkpoint.load(qwen, "cpu", "float32")

    assert any(f"{qwen}: Qwen2_5_VLForConditionalGeneration" in record.message for record in caplog.records)
