"""Real pictures that well-known libraries carry in their wheels, to look at without a download.

>>> from foveate.tasks import samples
>>> samples.sample("astronaut").size
(512, 512)
"""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from foveate.core.errors import FoveateError

_SCIKIT_IMAGE = ("astronaut", "camera", "cat", "coffee", "coins", "hubble_deep_field", "page", "retina", "rocket", "text")
_SCIKIT_LEARN = ("china", "flower")
SAMPLES = (*_SCIKIT_IMAGE, *_SCIKIT_LEARN)
"""Names of the pictures."""


def sample(name: str) -> Image.Image:
    """A picture by name, RGB.

    Raises:
        FoveateError: if there is none of that name, or the library that has it is missing.
    """
    if name not in SAMPLES:
        raise FoveateError(f"sample={name!r}: must be one of {', '.join(SAMPLES)}")
    try:
        if name in _SCIKIT_IMAGE:
            from skimage import data

            read = getattr(data, name)
        else:
            from sklearn.datasets import load_sample_image

            read = partial(load_sample_image, f"{name}.jpg")
        return Image.fromarray(np.asarray(read())).convert("RGB")
    except ImportError as error:
        raise FoveateError(f"sample={name!r}: needs {error.name}; pip install 'foveate[samples]'") from error
