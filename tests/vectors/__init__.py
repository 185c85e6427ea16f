"""One adapter for each published system: it holds our functions against what its authors' code computed.

An adapter is a module named after the system's folder, with functions ``check_*`` that take a `Case`. It decides by what is
in the case, never by its file name, so that any case with the same roles can be dropped in.
"""

from collections.abc import Mapping
from typing import Any

Case = Mapping[str, Any]
"""The arrays of one ``.npz`` file by name: tensors, with scalars as Python numbers and text as ``str``."""
