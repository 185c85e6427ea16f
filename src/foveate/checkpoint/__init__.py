"""The model under test: the embedded reference model, a checkpoint folder, or a checkpoint on the Hugging Face Hub."""

from foveate.checkpoint.arguments import parse_model_args
from foveate.checkpoint.conversation import Checkpoint, refusal
from foveate.checkpoint.devices import resolve_device, resolve_dtype
from foveate.checkpoint.loading import REFERENCES, evaluation, is_text, load, load_processor, local_folder

__all__ = [
    "REFERENCES", "Checkpoint", "evaluation", "is_text", "load", "load_processor", "local_folder", "parse_model_args",
    "refusal", "resolve_device", "resolve_dtype",
]  # fmt: skip
