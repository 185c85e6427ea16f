"""Cells are the encoder's patches, labelled by what was drawn."""

import torch
from torch.testing import assert_close

from foveate import reference
from foveate.core.artifact import Artifact
from foveate.methods.before_encoder.index_preserving import cell_logits
from foveate.reference.cells import labelled_cells
from foveate.reference.model import build_processor
from foveate.tasks.spine import GRID, PATCH


def test_cells_are_drawn_from_their_seed():
    first, again, other = (labelled_cells(2, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], labelled_cells(2, 0, "test")[0])


def test_unlabelled_cells_show_the_ground():
    """What is drawn differs from its ground more than the ground from itself."""
    cells, labels = labelled_cells(40)
    centre = torch.stack([picture[~shown].mean((0, 2, 3)) for picture, shown in zip(cells, labels)])
    distance = (cells - centre[:, None, :, None, None]).abs().mean((2, 3, 4))
    assert cells.shape == (40, GRID**2, 3, PATCH, PATCH)
    assert distance[labels].mean() > 2 * distance[~labels].mean()


def test_cells_are_the_processor_s_pixels_in_raster_order():
    cells, _ = labelled_cells(1)
    rows = cells[0].unflatten(0, (GRID, GRID)).permute(2, 0, 3, 1, 4).reshape(3, GRID * PATCH, GRID * PATCH)
    processor = build_processor().image_processor
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    levels = (rows * std + mean) * 255
    assert_close(levels, levels.round(), atol=1e-3, rtol=0)


def test_the_shipped_classifier_does_what_its_numbers_say():
    shipped = Artifact.load(reference.path() / "foveate" / "index_preserving.json").numbers
    cells, labels = labelled_cells(50, split="test")
    right = ((cell_logits(cells.flatten(2), shipped) > 0) == labels).float().mean().item()
    assert shipped["cell"] == [3, PATCH, PATCH]
    assert abs(right - shipped["accuracy"]) < 0.02
    assert shipped["recall"] > 0.99
