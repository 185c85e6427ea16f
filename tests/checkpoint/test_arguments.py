"""Keywords of ``from_pretrained`` as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate import FoveateError
from foveate.checkpoint.arguments import as_text, check_model_args, of_processor, parse_model_args

NESTED = {"device_map": "auto", "quantization_config": {"load_in_4bit": True}, "max_memory": {0: "10GiB", "cpu": "60GiB"}}


def test_pairs_have_values_in_yaml() -> None:
    text = "device_map=auto, trust_remote_code=true, quantization_config={load_in_4bit: true, llm_int8_skip_modules: [lm_head]}"

    assert parse_model_args(text) == {
        "device_map": "auto",
        "trust_remote_code": True,
        "quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
    }


def test_a_file_says_the_same(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("device_map: auto\nquantization_config:\n  load_in_4bit: true\nmax_memory: {0: 10GiB, cpu: 60GiB}\n")

    assert parse_model_args(str(file)) == NESTED


def test_nothing_is_nothing() -> None:
    assert parse_model_args(None) == parse_model_args("") == parse_model_args("{}") == {}
    assert as_text({}) is None


def test_one_text_for_all_ways_to_say_the_same() -> None:
    text = as_text(NESTED)

    assert text == as_text(dict(reversed(NESTED.items())))
    assert parse_model_args(text) == NESTED


def test_the_processor_is_loaded_from_the_same_place_by_the_same_trust() -> None:
    assert of_processor({"revision": "v1", "device_map": "auto", "trust_remote_code": True}) == {
        "revision": "v1",
        "trust_remote_code": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("revison=v1", r"model_args='revison': did you mean 'revision'\?"),
        ("colour=red", "model_args='colour': must be some of attn_implementation, cache_dir"),
        ("device_map", "model_args='device_map': has no value; give name=value"),
        ("trust_remote_code=maybe", "model_args=trust_remote_code='maybe': must be true or false"),
        ("device_map=true", r"model_args=device_map=True: must be text or a number or a mapping"),
        ("quantization_config=int4", r"model_args=quantization_config='int4': must be a mapping \{name: value\}"),
        ("quantization_config={a: [}", "model_args='quantization_config={a: \\[}': is not YAML"),
        ("dtype=float16", "model_args='dtype': give --dtype"),
        ("token=hf_secret", "model_args='token': log in with hf auth login"),
        ("missing.yaml", "model_args='missing.yaml': cannot be read"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        parse_model_args(text)

    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("- device_map\n")

    with pytest.raises(FoveateError, match=r"names no arguments; give name=value"):
        parse_model_args(str(file))


def test_keywords_are_checked_in_scripts_too() -> None:
    with pytest.raises(FoveateError, match="model_args='revison'"):
        check_model_args({"revison": "v1"})
