"""The cache that users of mlx-lm have, which the package's is measured against."""

import mlx.core as mx


class ContiguousLayer:
    """K and V of one layer as mlx-lm 0.32 keeps them in its KVCache; a test holds the two together.

    Room grows by 256 tokens at a time, by concatenation, and tokens are assigned to a slice.
    """

    room = 256

    def __init__(self):
        self.keys = self.values = None  # [B, Hkv, capacity, D]
        self.offset = 0

    def update_and_fetch(self, keys, values):
        """Append tokens, [B, Hkv, L, D]; return K and V of all."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.offset > self.keys.shape[2]:
            self.keys = self._grown(self.keys, keys, start)
            self.values = self._grown(self.values, values, start)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.fetch()

    def fetch(self):
        """Return K and V of all tokens."""
        if self.offset == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _grown(self, held, new, start):
        batch, heads, count, dim = new.shape
        more = mx.zeros((batch, heads, -(-count // self.room) * self.room, dim), new.dtype)
        if held is None:
            return more
        if start % self.room:
            held = held[..., :start, :]
        return mx.concatenate([held, more], axis=2)
