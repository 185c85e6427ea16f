"""Text of the user's, taken apart."""

from __future__ import annotations


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at the separators that are inside no bracket; a bracket left open reaches to the end."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
