"""Options for attention scores, applied between the product and the softmax."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import mlx.core as mx

from pagedkv.attention.inputs import finite
from pagedkv.limits import positive_int32


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """Options of a layer's scores; the default changes nothing.

    Attributes
    ----------
    window : int or None
        Number of tokens that a query sees, the last one its own: Mistral's sliding window.
    softcap : float or None
        Scores become ``softcap * tanh(score / softcap)``, before anything else: Gemma 2's.
    sinks : mx.array or None
        A logit for each query head that joins the softmax without a value, shape [Hq]: gpt-oss's.
    alibi_slopes : mx.array or None
        For each query head, the amount that a score loses per token of distance, shape [Hq] (Press
        et al., 2022).
    kind : tuple
        Distinguishes options that need different plans: values of numbers, shapes of arrays.

    Raises
    ------
    ValueError
        If `window` is not a positive 32-bit integer, `softcap` not a positive finite number, or an
        array not of a floating dtype.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None
    alibi_slopes: mx.array | None = None
    kind: tuple[tuple[str, Hashable], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kind: list[tuple[str, Hashable]] = []
        if self.window is not None:
            object.__setattr__(self, "window", positive_int32(self.window, "window"))
            kind.append(("window", self.window))
        if self.softcap is not None:
            object.__setattr__(self, "softcap", finite(self.softcap, "softcap"))
            if self.softcap <= 0:
                raise ValueError(f"expected a positive softcap, got {self.softcap}")
            kind.append(("softcap", self.softcap))
        for name in ("sinks", "alibi_slopes"):
            array = getattr(self, name)
            if array is not None:
                if not mx.issubdtype(array.dtype, mx.floating):
                    raise ValueError(f"expected {name} of a floating dtype, got {array.dtype}")
                kind.append((name, (array.shape, array.dtype)))
        object.__setattr__(self, "kind", tuple(kind))

    def check_heads(self, heads: int) -> None:
        """Raise ValueError unless the arrays have an entry for each of `heads` query heads."""
        for name in ("sinks", "alibi_slopes"):
            array = getattr(self, name)
            if array is not None and array.shape != (heads,):
                raise ValueError(f"expected {name} of shape ({heads},), got {array.shape}")


PLAIN = ScoreOptions()
