"""EmbedLens: the card's worked example, which words count, and calibration."""

from __future__ import annotations

import torch

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.signal import Function, Seen, Site
from foveate.core.state import State
from foveate.engine.calibrate import Calibration
from foveate.methods import EmbedLens
from tests.methods.bodiless import LLAVA_7B, layout, traits
from tests.suite.bodies import BODIES, RAGGED

ELSEWHERE = Fingerprint("llava", 4, 2, 4)
WORDS = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
TOKENS = torch.tensor([[2, 0.1], [0.1, 3], [-5, 1], [1, 1.01]])


def kept(method: EmbedLens, *prompts: str) -> list[list[int]]:
    """Rows left where every prompt shows the card's tokens."""
    prompt = layout(*prompts)
    x = torch.zeros(*prompt.shape, 2)
    x[prompt.ordinal >= 0] = TOKENS.repeat(len(prompts), 1)
    seen: Seen = {Function("embedding"): WORDS.__getitem__}
    edit = method.edit(Site("sequence"), x, prompt, seen, State({"traits": traits(ELSEWHERE)}))
    after = prompt if edit is None else prompt.after(edit)
    assert torch.equal(after.positions[0], prompt.positions[0].gather(1, after.origin.clamp(min=0)) * (after.origin >= 0))
    return [[row for row in rows if row >= 0] for rows in after.origin.tolist()]


def test_the_worked_example() -> None:
    assert kept(EmbedLens(ids=(1,), top_k=1), "t1111tt") == [[0, 1, 3, 5, 6]]
    assert kept(EmbedLens(ids=(1,), top_k=2), "t1111tt") == [[0, 5, 6]]
    assert kept(EmbedLens(ids=(3,), top_k=1), "t1111tt") == [[0, 1, 2, 3, 4, 5, 6]]


def test_each_sample_loses_what_matches() -> None:
    assert kept(EmbedLens(ids=(1,), top_k=1), "..1111t", "tt1111t") == [[2, 4, 6], [0, 1, 2, 4, 6]]


def test_whose_words_they_are() -> None:
    known = Artifact("embedlens", ELSEWHERE, {"sinks": [2], "dead": [0, 3]})
    calibrated = traits(ELSEWHERE, artifacts={"embedlens": known})

    assert EmbedLens().fitted(traits(LLAVA_7B)).ids == (1141, 26673, 30296)
    assert EmbedLens(drop="dead").fitted(traits(LLAVA_7B)).ids == (30296,)
    assert EmbedLens().fitted(calibrated).ids == (2, 0, 3)
    assert EmbedLens(drop="sinks").fitted(calibrated).ids == (2,)
    assert EmbedLens(ids=(1,)).fitted(calibrated).ids == (1,)


def test_it_says_what_is_lacking() -> None:
    nothing = traits(ELSEWHERE, artifacts={"embedlens": Artifact("embedlens", ELSEWHERE, {"sinks": [], "dead": [1]})})

    assert "run `foveate calibrate embedlens`" in str(EmbedLens().check(traits(ELSEWHERE)))
    assert "found no such words" in str(EmbedLens(drop="sinks").check(nothing))
    assert EmbedLens().check(nothing) is None
    assert "must be in 0..3" in str(EmbedLens(ids=(4,)).check(traits(ELSEWHERE)))


def test_calibration_finds_the_words_of_most_pictures() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    projector = model.model.multi_modal_projector
    word = model.get_input_embeddings().weight[7]
    with torch.no_grad():  # every token of every picture lies at one word
        projector.linear_2.weight.zero_()
        projector.linear_2.bias.copy_(word)
    numbers = EmbedLens().calibrate(Calibration(model, [body.inputs(RAGGED), body.inputs(RAGGED, seed=1)]))

    assert numbers == {"sinks": [7], "dead": []}
