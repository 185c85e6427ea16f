"""What acts while a model is trained, in any loop or in transformers' Trainer."""

from foveate.training.s2d import S2D
from foveate.training.spectra import Diagnosis, diagnose, encoder_linears

__all__ = ["S2D", "Diagnosis", "diagnose", "encoder_linears"]
