"""What a user may have got wrong, said in one line."""

from __future__ import annotations


class FoveateError(ValueError):
    """Bad input or an impossible pairing; the message names the parameter, its value and the remedy."""


class NeedsTraining(UserWarning):
    """A method runs whose paper trains the model with it: nobody can see whether this model was."""
