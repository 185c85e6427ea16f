"""Tokens are chosen once, between the vision encoder and the language model."""
