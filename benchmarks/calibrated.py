"""What training and calibration are worth, on the reference model.

foveate bench --model reference --n 100 --out runs/calibrated --keep 0.33,0.11 --methods "$(python benchmarks/calibrated.py)"
python benchmarks/calibrated.py runs/calibrated/results.json      # writes docs/calibrated.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme import rows  # type: ignore[import-not-found]

METHODS = (
    "index_preserving",
    "index_preserving(kernel=1)",
    "alvts",
    "prefixkv",
    "prefixkv(search='offline')",
    "mixkv(window=8)",
    "mixkv(window=8, redundancy='table')",
)


def main() -> None:
    if len(sys.argv) == 1:
        print(",".join(METHODS))
        return
    records = json.loads(Path(sys.argv[1]).read_text())
    lines = [
        "# What training and calibration are worth",
        "",
        "Written by `benchmarks/calibrated.py` on the reference model, whose folder holds what these commands made:",
        "`foveate calibrate index_preserving`, `alvts`, `prefixkv` and `mixkv`.",
        f"Scores in percent, n = {records[0]['n']} questions a task, ± half the 95 % interval. `keep` is the share of",
        "visual tokens (for `alvts`: in each layer), of cached entries for `prefixkv` and `mixkv`; `index_preserving`",
        "decides itself. *Evidence* is the share of the patches holding the answer that reach the last layer, *speed-up*",
        "that of the language model's prefill; both are means over tasks.",
        "",
        *rows(records),
    ]
    out = Path(__file__).parent.parent / "docs" / "calibrated.md"
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
