"""The two larger reference models of Foveate, and the code that trains all three.

``tiles`` and ``qwen`` are the checkpoints that Foveate knows as ``reference-tiles`` and ``reference-qwen``;
``python -m foveate_reference`` trains, extends and evaluates.
"""
