"""How the reference models are made and measured."""
