"""Tensor primitives that several methods share: tensors in, tensors out, no model in sight."""
