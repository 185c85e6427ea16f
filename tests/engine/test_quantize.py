"""The driver: resumable to identical bits, in bounded memory, and one line for whatever cannot be."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.weights import Block, Stream, Weights
from foveate.engine.quantize import bound, quantize
from foveate.engine.shelf import block_of
from foveate.methods import RTN
from tests import tiny
from tests.leaves import tensors
from tests.suite.bodies import BODIES, ONE, RAGGED

BODY = BODIES["llava-clip"]


class Looking(RTN):
    """Rounding that looks at both streams, and may be cut short."""

    streams: ClassVar[tuple[Stream, ...]] = ("exact", "reached")
    stop: ClassVar[int] = 99
    seen: ClassVar[list[int]] = []

    def quantize(self, block: Block) -> None:
        """Steps are those of weights times what reaches them, so that one block depends on those before."""
        if block.number == self.stop:
            raise KeyboardInterrupt
        self.seen.append(block.number)
        super().quantize(block)
        for names in block.groups:
            for exact, reached in zip(block.exact(names[0]), block.reached(names[0]), strict=True):
                assert torch.equal(exact.role, reached.role)
                assert block.number or names != block.groups[0] or torch.equal(exact.x, reached.x)
                assert not block.number or not torch.equal(exact.x, reached.x)


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> type[Looking]:
    monkeypatch.setattr(Looking, "stop", 99)
    monkeypatch.setattr(Looking, "seen", [])
    monkeypatch.setattr("foveate.engine.quantize.to_quantize", lambda method: (method, Recipe()))
    return Looking


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(
    looking: type[Looking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = BODY.model(), [BODY.inputs(RAGGED), BODY.inputs(ONE)]
    quantize(model, looking(), batches, out=tmp_path / "whole")
    looking.seen.clear()
    monkeypatch.setattr(looking, "stop", 2)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, looking(), batches, out=tmp_path / "cut")
    assert sorted(files(tmp_path / "cut")) == ["block-00.safetensors", "block-01.safetensors", "run.json"]
    monkeypatch.setattr(looking, "stop", 99)
    artifact = quantize(model, looking(), batches, out=tmp_path / "cut")

    assert looking.seen == [0, 1, 2, 3]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert Artifact.load(tmp_path / "cut" / "rtn.json").numbers == artifact.numbers
    looking.seen.clear()
    quantize(model, looking(clip=True), batches, out=tmp_path / "cut")  # something else: from the beginning
    assert looking.seen == [0, 1, 2, 3]
    looking.seen.clear()
    quantize(model, looking(clip=True), batches[:1], out=tmp_path / "cut")
    assert looking.seen == [0, 1, 2, 3]


def test_a_folder_is_an_artifact_like_any_other(tmp_path: Path) -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    held = quantize(model, "rtn(bits=3)")
    kept = quantize(model, "rtn(bits=3)", out=tmp_path / "one")
    kept.save(tmp_path / "two" / "rtn.json")
    shutil.rmtree(tmp_path / "one")
    found = []
    for artifacts in ([held], tmp_path / "two"):
        with foveate.attach(model, "rtn(bits=3)", artifacts=artifacts):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)
    size = kept.numbers["size"]
    on_disk = sum(len(content) for name, content in files(tmp_path / "two").items() if name.startswith("block"))
    declared = size["integers"] + size["steps"] + size["sides"]
    assert declared <= on_disk <= declared + 4 * 28 * 120  # names and shapes
    held.save(tmp_path / "three" / "rtn.json")
    with foveate.attach(model, "rtn(bits=3)", artifacts=tmp_path / "three"):
        assert torch.equal(model(**inputs).logits, found[0])


def test_linears_that_share_what_they_divide_by_are_written(tmp_path: Path) -> None:
    model = BODY.model()
    kept = quantize(model, "smoothquant", [BODY.inputs(ONE)], out=tmp_path)
    held = quantize(model, "smoothquant", [BODY.inputs(ONE)])
    for name, replaced in block_of(kept, 0).items():
        divide = held.numbers.get(f"0.{name}.divide")
        assert (divide is None) == (replaced.divide is None)
        assert divide is None or torch.equal(divide, replaced.divide)  # type: ignore[arg-type]


def test_fine_tunes_of_one_shape_are_told_apart_and_dtypes_of_one_checkpoint_are_not() -> None:
    model = BODY.model()
    artifact = quantize(model, "rtn")
    with foveate.attach(BODY.model().to(torch.bfloat16), "rtn", artifacts=[artifact]):
        pass
    tuned = BODY.model()
    with torch.no_grad():
        tuned.model.language_model.layers[3].mlp.up_proj.weight[5] *= 1.001
    with pytest.raises(FoveateError, match="rtn: made of other weights than this model's, as block 3 of the decoder shows"):
        foveate.attach(tuned, "rtn", artifacts=[artifact])
    with pytest.raises(FoveateError, match=r"artifact of rtn: made on other weights.*; quantize it again"):
        foveate.attach(BODY.model(seed=1), "rtn", artifacts=[artifact])
    with pytest.raises(FoveateError, match=r"artifact of rtn: made with bits=4; use that, or .* bits=3"):
        foveate.attach(model, "rtn(bits=3)", artifacts=[artifact])
    assert "_foveate_session" not in vars(model)


def test_fine_tunes_of_an_encoder_are_told_apart_in_any_dtype() -> None:
    model = BODY.model()
    artifact = quantize(model, "dasq(bits=4)")
    with foveate.attach(BODY.model().to(torch.bfloat16), "dasq(bits=4)", artifacts=[artifact]):
        pass
    tuned = BODY.model()
    with torch.no_grad():
        tuned.model.vision_tower.encoder.layers[2].mlp.fc1.weight *= 1.1
    for dtype, where in ((torch.float32, "block 2"), (torch.bfloat16, r"block 2\.mlp\.fc1\.weight")):
        with pytest.raises(FoveateError, match=f"dasq: made of other weights than this model's, as {where} of the encoder"):
            foveate.attach(tuned.to(dtype), "dasq(bits=4)", artifacts=[artifact])


def test_what_cannot_be_is_said_in_a_line(tmp_path: Path) -> None:
    model, inputs = BODY.model(), [BODY.inputs(ONE)]
    for recipe, batches, message in (
        (
            "rtn(group_size=32)",
            (),
            "rtn: group_size=32: does not divide the 48 inputs of self_attn.q_proj in decoder block 0; "
            "must be one of 16, 8, -1",
        ),
        ("rtn + gptq", (), "must have one method that replaces weights, such as 'rtn(bits=4)'; has 2"),
        ("none", (), "must have one method"),
        ("hiprune", (), "hiprune: replaces no weights"),
        ("rtn(bits=16)", (), "rtn: bits=16: leaves the model as it is"),
        ("gptq", (), "gptq: looks at what samples feed the model; give batches"),
    ):
        with pytest.raises(FoveateError) as raised:
            quantize(model, recipe, batches)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(FoveateError, match="rtn: has no quantized weights of this model; run `foveate quantize"):
        foveate.attach(model, "rtn")
    artifacts = [quantize(model, "rtn"), quantize(model, "gptq", inputs)]
    with pytest.raises(FoveateError, match=r"rtn \+ gptq: both replace weights of the decoder; use one of them"):
        foveate.attach(model, "rtn + gptq", artifacts=artifacts)
    with pytest.raises(FoveateError, match="activations=8: needs weights of 8 bits or less"):
        RTN(bits=16, activations=8)


def test_weights_that_cannot_be_read_are_refused() -> None:
    quantized = BODY.model()
    quantized.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(FoveateError, match="quantized already"):
        quantize(quantized, "rtn")
    integers = torch.ao.quantization.quantize_dynamic(BODY.model(), {torch.nn.Linear})
    with pytest.raises(
        FoveateError, match=r"decoder block 0: self_attn.q_proj is a Linear|DynamicQuantizedLinear|quantized already"
    ):
        quantize(integers, "rtn")
    offloaded = BODY.model()
    offloaded.model.language_model.layers[1].to("meta")
    with pytest.raises(FoveateError, match=r"decoder block 1: self_attn\.q_proj is offloaded"):
        quantize(offloaded, "rtn")
    with pytest.raises(FoveateError, match=r"decoder block 1: self_attn\.q_proj is offloaded; load the model without"):
        foveate.attach(offloaded, "rtn", artifacts=[quantize(BODY.model(), "rtn")])
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(BODY.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(FoveateError, match="has an adapter; merge it first"):
        quantize(adapted, "rtn")


def test_a_damaged_block_and_a_foreign_one_are_said(tmp_path: Path) -> None:
    model = BODY.model()
    quantize(model, "rtn", out=tmp_path)
    block = tmp_path / "rtn" / "block-02.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:100])
    with pytest.raises(FoveateError, match=r"block-02\.safetensors'?: cannot be read"):
        foveate.attach(model, "rtn", artifacts=tmp_path)
    with pytest.raises(FoveateError, match=r"block-02\.safetensors cannot be read"):
        quantize(model, "rtn", out=tmp_path)
    block.unlink()
    quantize(model, "rtn", out=tmp_path)
    assert block.read_bytes() == whole
    numbers = json.loads((tmp_path / "rtn.json").read_text())
    assert numbers["parameters"]["bits"] == 4


class Peak(TorchDispatchMode):
    """Most bytes that were alive at once of what was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if (key := id(tensor.untyped_storage())) not in self._known | given:
                size = tensor.untyped_storage().nbytes()
                self._known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("part", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
def test_memory_is_within_what_is_declared_whatever_the_depth(
    part: Any, tmp_path: Path, looking: type[Looking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "part", part)
    peaks = []
    for layers in (3, 9):
        deep = {"layers": layers} if part == "decoder" else {"blocks": layers}
        model, batches = tiny.llava(**deep), [BODY.inputs(RAGGED, seed=seed) for seed in range(4)]
        gc.collect()
        with Peak() as peak:
            quantize(model, looking(), batches, out=tmp_path / str(layers))
        assert peak.most <= bound(model, looking(), batches)
        peaks.append(peak.most)
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["masquant(epochs=1)", "quant_experts(epochs=1)", "quant_experts(weighting='tokens')"])
def test_what_is_learned_and_what_is_added_fit_in_it(recipe: str, tmp_path: Path) -> None:
    model, batches = tiny.llava(layers=2), [BODY.inputs(RAGGED, seed=seed) for seed in range(2)]
    (method,) = Recipe.of(recipe).methods
    assert isinstance(method, Weights)
    gc.collect()
    with Peak() as peak:
        quantize(model, method, batches, out=tmp_path)
    assert peak.most <= bound(model, method, batches)


@pytest.mark.slow
def test_slopes_of_the_whole_model_keep_of_each_block_what_enters_it_of_one_batch(tmp_path: Path) -> None:
    peaks, batches = [], [BODY.inputs(RAGGED, seed=seed) for seed in range(2)]
    (method,) = Recipe.of("masquant(epochs=1)").methods
    assert isinstance(method, Weights)
    for layers in (3, 9):
        model = tiny.llava(layers=layers)
        gc.collect()
        with Peak() as peak:
            quantize(model, method, batches, out=tmp_path / str(layers))
        assert peak.most <= bound(model, method, batches)
        peaks.append(peak.most)
    rows, width = batches[0]["input_ids"].numel(), model.config.text_config.hidden_size
    assert peaks[1] - peaks[0] <= 6 * rows * width * torch.float32.itemsize


def test_samples_come_with_their_seed_and_the_model_is_left_as_it_was() -> None:
    model = BODY.model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (quantize(model, "rtn(clip=True)", seed=1) for _ in range(2))
    assert all(torch.equal(one.numbers[name], other.numbers[name]) for name in one.numbers if "words" in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert replace(one).parameters["bits"] == 4


def test_in_a_recipe_samples_are_read_by_what_acts_before_the_language_model() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    batch, before = inputs | {"labels": labels}, dict(model.named_modules())
    plain = quantize(model, "gptq(bits=3)", [batch])
    pruned = quantize(model, "gptq(bits=3) + hiprune(keep=4)", [batch])
    both = quantize(model, "hiprune(keep=4) + gptq(bits=3) + fastv(layer=1, keep=0.5) + snapkv(keep=0.5, window=4)", [batch])

    assert (plain.numbers["before"], pruned.numbers["before"]) == ("", "hiprune(keep=4)")
    assert plain.numbers["said"] == pruned.numbers["said"] == []
    (line,) = both.numbers["said"]
    assert line.startswith("samples were read without fastv, snapkv")
    words = [name for name in plain.numbers if name.endswith("words")]
    assert any(not torch.equal(plain.numbers[name], pruned.numbers[name]) for name in words)
    assert all(torch.equal(both.numbers[name], pruned.numbers[name]) for name in words)
    assert dict(model.named_modules()) == before
    # It is an artifact like any other.
    with foveate.attach(model, "gptq(bits=3) + uniform(keep=4)", artifacts=[pruned]):
        assert model(**inputs).logits.isfinite().all()
    # What looks at no samples, and what is fed by the encoder alone, is as it would be.
    for method in ("rtn(bits=3)", "dasq(bits=3)"):
        alone, beside = quantize(model, method), quantize(model, f"{method} + hiprune(keep=4)")
        assert beside.numbers["before"] == ""
        assert beside.numbers["said"] == []
        assert all(torch.equal(one, beside.numbers[n]) for n, one in alone.numbers.items() if n.endswith("words"))
