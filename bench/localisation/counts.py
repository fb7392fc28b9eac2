"""Operations and bytes of questions to a gated language model (LLaMA, Qwen2, SmolLM2), from its sizes alone.

Operations are those of matrix products and attention, 2 for each multiply-add; a frozen layer's backward pass costs its
products once more and its attention, which computes its map again, two and a half times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """A model and a text of T tokens.

    Attributes:
        layers, hidden, neurons, heads, vocabulary: L, H, F, attention heads and V.
        key_width: of the keys of all key-value heads together.
        tokens: T.
    """

    layers: int
    hidden: int
    neurons: int
    heads: int
    key_width: int
    vocabulary: int
    tokens: int

    @classmethod
    def of(cls, config: Any, tokens: int) -> Counts:
        width = config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            width * config.num_key_value_heads,
            config.vocab_size,
            tokens,
        )

    def products(self, queries: int) -> int:
        """Of one layer that computes ``queries`` tokens, keys and values of all T."""
        keys = 2 * self.tokens * self.hidden * 2 * self.key_width
        return keys + 2 * queries * self.hidden * (2 * self.hidden + 3 * self.neurons)

    def attention(self, queries: int) -> int:
        return 4 * queries * self.tokens * self.hidden

    def forward(self, first: int = 0, *, pruned: bool = True, head: int = 1) -> int:
        """Of one row through layers ``first`` .. L - 1 and a head that reads ``head`` tokens."""
        return self._row(first, pruned=pruned, head=head, attention=1.0, products=1)

    def both_ways(self, first: int, *, pruned: bool = True, head: int = 1) -> int:
        """The same, forward and back to where the row opened."""
        return self._row(first, pruned=pruned, head=head, attention=3.5, products=2)

    def _row(self, first: int, *, pruned: bool, head: int, attention: float, products: int) -> int:
        def layer(queries: int) -> float:
            # the pruned row's attention is two plain products, whose backward pass is two each
            share = 3.0 if queries == 1 and attention > 1 else attention
            return products * self.products(queries) + share * self.attention(queries)

        full = max(0, self.layers - 1 - first)
        last = layer(1 if pruned else self.tokens) if first < self.layers else 0
        return round(full * layer(self.tokens) + last + products * head * 2 * self.hidden * self.vocabulary)

    def pull(self, *, pruned: bool = True) -> int:
        """Of the products with W2 that end a question: one a layer."""
        return sum(self._pull(i, pruned) for i in range(self.layers))

    def _pull(self, layer: int, pruned: bool) -> int:
        tokens = 1 if pruned and layer == self.layers - 1 else self.tokens
        return 2 * tokens * self.hidden * self.neurons

    def rows(self, nodes: Sequence[int], *, pruned: bool = True, head: int = 1) -> int:
        """Of the rows of one text, ``nodes`` of them opening behind each layer."""
        return sum(n * self.both_ways(i + 1, pruned=pruned, head=head) for i, n in enumerate(nodes))

    def attribution(self, nodes: int, *, pruned: bool = True, head: int = 1) -> int:
        """Of one question with ``nodes`` nodes on every layer's path, the unedited pass included."""
        base = self.forward(pruned=pruned, head=head)
        return base + self.rows([nodes] * self.layers, pruned=pruned, head=head) + self.pull(pruned=pruned)

    def adaptive(self, nodes: int, intervals: Sequence[int]) -> int:
        """Of one question whose layers ended with so many intervals of ``nodes`` nodes each, found by halving.

        A path's intervals are the leaves of a binary tree: everything inside it was measured too, and the target at
        its beginning and at every middle.
        """
        measured = [2 * count - 1 for count in intervals]
        pulled = sum(count * self._pull(i, True) for i, count in enumerate(measured))
        ends = sum(count * self.forward(i + 1) for i, count in enumerate(intervals))
        return self.forward() + self.rows([nodes * count for count in measured]) + pulled + ends

    def maps(self, size: int) -> int:
        """Bytes of the attention maps of all layers, numbers of ``size`` bytes."""
        return self.layers * self.heads * self.tokens**2 * size
