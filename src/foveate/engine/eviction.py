"""Where the entries of a cache lie while a method evicts one with every token (on the host)."""

from __future__ import annotations

from collections.abc import Sequence


class Eviction:
    """The entries of one layer since a prompt was read, for each sample of the batch.

    What comes takes the place of what goes, so a cache that holds its size is never copied. Entries then no longer lie in
    the order of their tokens; that is kept here.

    Attributes:
        left: entries left of the prompt.
        length: tokens of the conversation when it had been read, before anything was dropped.
        width: the same, padding included.
    """

    def __init__(self, left: Sequence[int], length: Sequence[int], width: int, columns: int) -> None:
        """``columns`` of the layer hold the entries ``left``, padding in front of them."""
        self.left, self.length, self.width = tuple(left), tuple(length), width
        self._columns = columns
        self._gaps = [list(range(columns - count)) for count in left]
        self._order = [list(range(columns - count, columns)) for count in left]

    @property
    def gaps(self) -> bool:
        """Whether some columns hold no entry."""
        return any(self._gaps)

    def held(self, columns: int) -> list[int]:
        """Entries of each sample, now that the layer has so many ``columns``."""
        for order in self._order:
            order.extend(range(self._columns, columns))
        self._columns = columns
        return list(map(len, self._order))

    def places(self, slots: Sequence[int | None]) -> list[int] | None:
        """Where the next entry of each sample goes, if the one at ``slots`` of it, counted from its oldest, goes away.

        In the place of what goes, or into a gap, or else behind the others. None where nothing goes from any sample.
        """
        if all(slot is None for slot in slots):
            return None
        columns, found = self._columns, []
        for slot, order, gaps in zip(slots, self._order, self._gaps):
            place = order.pop(slot) if slot is not None else gaps.pop() if gaps else columns
            order.append(place)
            found.append(place)
        if columns in found:
            for place, gaps in zip(found, self._gaps):
                gaps.extend([columns] if place < columns else [])
            self._columns = columns + 1
        return found

    def select(self, samples: Sequence[int]) -> None:
        """Go on with those ``samples``, some perhaps several times."""
        self.left, self.length = (tuple(of[sample] for sample in samples) for of in (self.left, self.length))
        self._gaps, self._order = ([list(of[sample]) for sample in samples] for of in (self._gaps, self._order))
