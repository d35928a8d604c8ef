"""What may happen to attention scores between the product and the softmax."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class Scores:
    """Options of a layer's scores; the default changes nothing.

    Attributes
    ----------
    window : int or None
        A query sees at most so many tokens, itself the last: Mistral's sliding window.
    softcap : float or None
        Scores become ``softcap * tanh(score / softcap)``, before anything else: Gemma 2's.
    sinks : mx.array or None
        A logit for each query head that joins the softmax without a value, shape [Hq]: gpt-oss's.
    alibi_slopes : mx.array or None
        For each query head, what a score loses for every token of distance, shape [Hq] (Press et
        al., 2022).
    """

    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None
    alibi_slopes: mx.array | None = None

    def used(self) -> tuple[str, ...]:
        """Return the names of the options that are set."""
        options = {
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "alibi_slopes": self.alibi_slopes,
        }
        return tuple(name for name, value in options.items() if value is not None)

    def kind(self) -> Hashable:
        """Return what tells apart calls that have to be checked or planned separately."""
        sinks, slopes = self.sinks, self.alibi_slopes
        return (
            self.window,
            self.softcap,
            None if sinks is None else (sinks.shape, sinks.dtype),
            None if slopes is None else (slopes.shape, slopes.dtype),
        )

    def check(self, heads: int) -> None:
        """Raise ValueError unless the options are well formed for so many query heads."""
        window, softcap = self.window, self.softcap
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"expected window to be a positive int, got {window}")
        if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
            raise ValueError(f"expected a positive finite softcap, got {softcap}")
        for name, array in (("sinks", self.sinks), ("alibi_slopes", self.alibi_slopes)):
            if array is None:
                continue
            if array.shape != (heads,):
                raise ValueError(f"expected {name} of shape ({heads},), got {array.shape}")
            if not mx.issubdtype(array.dtype, mx.floating):
                raise ValueError(f"expected {name} of a floating dtype, got {array.dtype}")


PLAIN = Scores()
