"""The size of a request, from which methods say how much memory they need beside the model."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Shape:
    """A request, as large as it is before anything is dropped.

    Attributes:
        samples: prompts of the batch.
        rows: of the longest prompt.
        visual: visual tokens of the prompt with the most.
        layers: of the language model.
        width, heads, kv_heads, head_width: of its hidden states and attention.
        inner: width of what its MLP makes between its projections.
        vocabulary: words that it knows.
        itemsize: bytes of a number in the model's dtype.
        images: pictures (tiles) that were encoded.
        image_rows: the encoder's rows of the largest one, summary rows included.
        image_width, image_heads: of the encoder's hidden states and attention.
        cls: whether the encoder has a summary row.
        cell: pixel values that make one token, 0 where the encoder's input cannot be read.
        experts: how many the router chooses for each row, 0 for a dense model.
    """

    samples: int
    rows: int
    visual: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    itemsize: int
    images: int
    image_rows: int
    image_width: int
    image_heads: int
    cls: bool
    cell: int
    experts: int = 0

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states that enter one decoder layer."""
        return self.samples * self.rows * self.width * self.itemsize

    @property
    def keys(self) -> int:
        """Bytes of the keys (or values) of one decoder layer."""
        return self.samples * self.rows * self.kv_heads * self.head_width * self.itemsize

    @property
    def queries(self) -> int:
        """Bytes of the queries of one decoder layer."""
        return self.samples * self.rows * self.heads * self.head_width * self.itemsize

    @property
    def features(self) -> int:
        """Bytes of the hidden states of one encoder block."""
        return self.images * self.image_rows * self.image_width * self.itemsize

    @property
    def entries(self) -> int:
        """Bytes of one float32 for each cached entry of one layer, by head."""
        return self.samples * self.kv_heads * self.rows * FLOAT

    @property
    def ids(self) -> int:
        """Bytes of one number for each row of the batch."""
        return self.samples * self.rows * INDEX

    @property
    def pairs(self) -> int:
        """Bytes of one float32 for each two visual tokens of a sample."""
        return self.samples * self.visual**2 * FLOAT

    @property
    def masks(self) -> int:
        """Bytes of one attention mask (bool), shared by all heads."""
        return self.samples * self.rows**2

    @property
    def edits(self) -> int:
        """Bytes that the engine needs to drop rows of the sequence.

        Ledgers of the rows, of this request and the one before, about a dozen numbers each; the hidden states as they were
        and as they will be; rotary tables; masks where samples of a batch keep different numbers of rows.
        """
        tables = 4 * self.samples * self.rows * self.head_width * FLOAT
        return 48 * self.ids + 3 * self.hidden + tables + (4 * self.masks if self.samples > 1 else 0)

    @property
    def routing(self) -> int:
        """Bytes that the engine needs to let some rows pass by a layer: both parts, their keys and values, their mask."""
        return 48 * self.ids + 4 * self.hidden + 6 * self.keys + 4 * self.masks

    @property
    def survivors(self) -> int:
        """Bytes that the engine needs to run some of the chosen experts only: a row for each, going in and coming out."""
        return 48 * self.ids + (4 * self.experts + 1) * self.hidden

    def floats(self, size: int) -> int:
        """Bytes of so many bytes of numbers in the model's dtype, once they are float32."""
        return size * FLOAT // self.itemsize

    def attention(self, queries: int) -> int:
        """Bytes of so many rows of a decoder layer's attention as logits and as probabilities, and what makes them."""
        rows = 4 * self.samples * self.heads * min(queries, self.rows) * self.rows * FLOAT
        return rows + 2 * self.floats(self.keys)

    def image_attention(self, queries: int) -> int:
        """The same of an encoder block."""
        rows = 4 * self.images * self.image_heads * min(queries, self.image_rows) * self.image_rows * FLOAT
        return rows + 2 * self.floats(self.features)
