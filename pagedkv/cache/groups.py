"""Groups of layers: which layers of a model have their blocks in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv.limits import positive_int32

MOST = 16  # groups: each takes tables of its own


@dataclass(frozen=True)
class Groups:
    """Which group each layer is in, and which slab it has there.

    All layers of a group see the same window, and a group has a slab for each of its layers. Slabs
    are pools; one slab serves a layer of every group. Groups that see everything come first.

    Attributes
    ----------
    windows : tuple of int or None
        By group, in tokens; None where layers see all tokens.
    group_of, slab_of : tuple of int
        By layer.
    num_slabs : int
        Slabs, the layers that a group can have.
    """

    windows: tuple[int | None, ...]
    group_of: tuple[int, ...]
    slab_of: tuple[int, ...]
    num_slabs: int

    @classmethod
    def of(cls, windows: Sequence[int | None]) -> Groups:
        """Put layers in groups, so that few slabs are of no use.

        If all layers see the same, or none sees all tokens, there is one group of all.

        Parameters
        ----------
        windows : sequence of int or None
            For each layer, how many tokens a token sees, itself the last; None for all.

        Raises
        ------
        ValueError
            If a window is not a positive 32-bit integer.
        """
        layers: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            seen = None if window is None else positive_int32(window, "a window")
            layers.setdefault(seen, []).append(layer)
        if None not in layers or len(layers) == 1:
            every = tuple(range(len(windows)))
            return cls((None,), (0,) * len(windows), every, len(windows))
        kinds = sorted(layers, key=lambda window: (window is not None, window or 0))
        counts = [len(layers[kind]) for kind in kinds]

        def cost(slabs: int) -> tuple[bool, int, int, int]:
            empty = [-count % slabs for count in counts]
            groups = sum(-(-count // slabs) for count in counts)
            return groups > MOST, empty[0], sum(empty[1:]), groups

        slabs = min(range(1, max(counts) + 1), key=cost)
        group_of, slab_of = [0] * len(windows), [0] * len(windows)
        of_groups: list[int | None] = []
        for kind in kinds:
            for place, layer in enumerate(layers[kind]):
                slab_of[layer] = place % slabs
                if not slab_of[layer]:
                    of_groups.append(kind)
                group_of[layer] = len(of_groups) - 1
        return cls(tuple(of_groups), tuple(group_of), tuple(slab_of), slabs)
