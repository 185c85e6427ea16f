"""The larger reference models of Foveate, and the code that trains them all.

``tiles`` and ``qwen`` are the checkpoints that Foveate knows as ``reference-tiles`` and ``reference-qwen``; ``smol`` is
what SmolLM2 learnt to see, of which `foveate.checkpoint.reference_smol` makes ``reference-smol``;
``python -m foveate_reference`` trains, extends and evaluates.
"""
