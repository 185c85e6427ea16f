"""Visual tokens are dropped or bypassed between the layers of the language model."""
