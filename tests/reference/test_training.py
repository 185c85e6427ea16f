"""Training computes what the plain model computes, and continues exactly where it stopped."""

import pytest
import torch

from foveate.reference.model import TOKEN_IDS, USER, Dimensions, build_model
from foveate_reference.training.batches import KIND_NAMES, Window, draw_batch
from foveate_reference.training.muon import Muon
from foveate_reference.training.train import Settings, Stage, Trainer, train
from foveate_reference.training.windows import answer_logits, encode, packed_mask

EVEN = (1 / len(KIND_NAMES),) * len(KIND_NAMES)
TINY = Dimensions(
    vision_width=32, vision_layers=2, decoder_width=32, decoder_layers=2, decoder_mlp=32, head_width=16, projection=8
)
SETTINGS = Settings(
    steps=3,
    loosening=Stage(2, ((Window(6, 4, 48, 2, loose=True), 1.0),)),
    dimensions=TINY,
    compiled=False,
    curriculum=(
        Stage(1, ((Window(6, 4, 0, 2), 1.0),)),
        Stage(1, ((Window(6, 4, 48, 2), 1.0),)),
        Stage(9, ((Window(12, 4, 48, 2), 1.0),)),
    ),
)


def test_full_window_is_the_plain_forward():
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    batch = draw_batch(0, 0, Window(12, 1, 64, 3), EVEN)
    logits = answer_logits(model, batch, encode(model, batch).visual)
    first = batch.blocks[0] == 1
    ids = torch.cat([torch.tensor([TOKEN_IDS[USER]] + [TOKEN_IDS["<image>"]] * 144), batch.ids[0][first]])
    mean, spread = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = ((batch.pixels / 255 - mean) / spread).permute(0, 3, 1, 2)
    plain = model(input_ids=ids[None], pixel_values=pixels).logits[0, 145:]
    wanted = plain[batch.targets[0][first] >= 0]
    assert torch.allclose(logits[: len(wanted)], wanted, atol=1e-4)


def test_blocks_see_the_picture_and_themselves():
    mask = packed_mask(torch.tensor([[1, 1, 2, 0]]), prefix=2)[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_batches_depend_on_seed_and_step_alone():
    window = Window(6, 2, 48, 2)
    same, again, other = (draw_batch(0, step, window, EVEN) for step in (1, 1, 2))
    assert torch.equal(same.pixels, again.pixels)
    assert torch.equal(same.ids, again.ids)
    assert not torch.equal(same.pixels, other.pixels)


@pytest.mark.slow
def test_resumed_run_ends_bit_equal(tmp_path):
    torch.set_num_threads(1)
    whole = train(tmp_path / "whole", SETTINGS)
    (tmp_path / "broken").mkdir()
    broken = Trainer(SETTINGS)
    broken.run(tmp_path / "broken", stopping=lambda: broken.step == 2)
    resumed = train(tmp_path / "broken", SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(whole.modules.parameters(), resumed.modules.parameters(), strict=True))


def test_muon_is_torchs_muon():
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 24, 40), torch.randn(3, 2, 24, 40)
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = (
        (ours, Muon(ours, lr=0.01, weight_decay=0.02)),
        (theirs, torch.optim.Muon(theirs, lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")),
    )
    for parameters, optimizer in optimizers:
        for gradient in gradients:
            for parameter, matrix in zip(parameters, gradient, strict=True):
                parameter.grad = matrix.clone()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(ours, theirs, strict=True))
