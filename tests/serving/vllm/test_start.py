"""What a server is not started with, refused in a line: recipes in its own process, its configuration in the worker's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from foveate import FoveateError, reference
from foveate.serving.vllm.admission import Pruning
from foveate.serving.vllm.model import refused
from tests.serving.test_plugin import config_of
from tests.serving.vllm.both import engine


@pytest.mark.parametrize(
    ("recipe", "reason"), [("fastv", "acts inside of the language model"), ("cdpruner", "reads the question")]
)
def test_a_recipe_that_does_not_fit_ends_the_start(recipe, reason):
    with pytest.raises(FoveateError, match=rf"{reason}.*serve one of divprune, hiprune"):
        engine(reference.path(), recipe)


def server(**changed):
    known = dict(
        compilation_config=SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=False, cudagraph_mode=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_encoder_attn_dtype=None, video_pruning_rate=None)),
        lora_config=None,
        speculative_config=None,
    )
    for path, value in changed.items():
        *outer, name = path.split("__")
        at = SimpleNamespace(**known) if not outer else known[outer[0]]
        for step in outer[1:]:
            at = getattr(at, step)
        if outer:
            setattr(at, name, value)
        else:
            known[name] = value
    return SimpleNamespace(**known)


def pruning(family, recipe="hiprune(keep=4)"):
    config = config_of(family)
    config.foveate = {"recipe": recipe}
    return Pruning.of(family, config)


FULL_GRAPHS = SimpleNamespace(has_full_cudagraphs=lambda: True)


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"compilation_config__compile_mm_encoder": True}, "leave out compile_mm_encoder"),
        ({"compilation_config__cudagraph_mm_encoder": True}, "leave out compile_mm_encoder and cudagraph_mm_encoder"),
        ({"parallel_config__tensor_parallel_size": 2}, "use --data-parallel-size"),
        ({"model_config__multimodal_config__mm_encoder_attn_dtype": "fp8"}, "leave out --mm-encoder-attn-dtype"),
        ({"model_config__multimodal_config__video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "--enable-tower-connector-lora"),
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_configuration_that_does_not_fit(family, changed, remedy):
    assert remedy in refused(server(**changed), pruning(family))


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "leave out --pipeline-parallel-size"),
        ({"compilation_config__cudagraph_mode": FULL_GRAPHS}, "PIECEWISE"),
        ({"speculative_config": SimpleNamespace()}, "leave out --speculative-config"),
    ],
)
def test_what_is_in_the_way_of_positions_alone(changed, remedy):
    assert remedy in refused(server(**changed), pruning("qwen2_5_vl"))
    assert refused(server(**changed), pruning("llava")) is None


def test_methods_that_hear_nothing_of_the_encoder_run_where_it_is_split():
    split = {"parallel_config__tensor_parallel_size": 2}
    assert refused(server(**split), pruning("llava", "uniform(keep=4)")) is None
    assert refused(server(), pruning("qwen2_5_vl")) is None
