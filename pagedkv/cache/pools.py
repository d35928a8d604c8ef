"""K and V of all layers on the device: a pool of blocks for each, written in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.attention.batch import DecodeBatch
from pagedkv.attention.codes import bits_of_each, has_codes, row_bytes, width
from pagedkv.attention.inputs import DTYPES, New, Shape
from pagedkv.attention.paths import backend_of
from pagedkv.attention.plan import AttentionPlan, plan_for
from pagedkv.attention.scores import PLAIN, ScoreOptions
from pagedkv.cache.device_memory import check_room
from pagedkv.cache.donated import Donated
from pagedkv.cache.groups import Groups
from pagedkv.cache.in_place import InPlace
from pagedkv.cache.slots import SlotMapping
from pagedkv.errors import PagedKVError
from pagedkv.limits import id_below, integers, positive_int32


class Pools:
    """K and V pools of all layers, [N, S, Hkv, D] each with Hkv and D of its layer, or quantized.

    Where layers are in groups (`Groups`), a layer of each group shares a pool with one of every
    other group, and any group may use any block.

    The pools are allocated once, zeroed, on the default device, and written in place: on a GPU by
    kernels of ours, see `pagedkv.cache.in_place`, on a CPU by MLX, see `pagedkv.cache.donated`.
    Writes and reads through these methods take effect in the order of the calls, however far the
    host runs ahead of the device.

    Parameters and errors are those of `PagedKVCache`.

    Attributes
    ----------
    groups : Groups
        Which group each layer is in.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: mx.Dtype,
        windows: Sequence[int | None] | None = None,
        bits: int | tuple[int | None, int | None] | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_blocks": num_blocks, "block_size": block_size}
        self.num_layers, self.num_blocks, self.block_size = (
            positive_int32(size, name) for name, size in sizes.items()
        )
        if windows is not None and len(windows) != self.num_layers:
            raise ValueError(
                f"expected a window of each of {self.num_layers} layers, got {len(windows)}"
            )
        # By layer: windows, if they were given; the last options of a call, and what they became.
        self._windows = None if windows is None else [*windows]
        self._scores: dict[int, tuple[ScoreOptions, ScoreOptions]] = {}
        self.groups = Groups.of([None] * self.num_layers if windows is None else windows)
        self.num_blocks *= len(self.groups.windows)
        positive_int32(self.num_blocks * self.block_size, "num_blocks * block_size")
        if dtype not in DTYPES:
            raise ValueError(f"expected float16, bfloat16 or float32, got {dtype}")
        self._dtype, self._device = dtype, mx.default_device().type
        heads = _of_each(kv_heads, self.num_layers, "kv_heads")
        dims = _of_each(head_dim, self.num_layers, "head_dim")
        self._bits = bits_of_each(bits)
        if any(self._bits) and not all(map(has_codes, dims)):
            raise ValueError(f"expected head dims of 8, 16, ... 256 with bits, got {dims}")
        self._rows = list(zip(heads, dims, strict=True))
        self._layer_bytes = [
            self.block_size * kv_heads_of_layer * sum(row_bytes(dim, x, dtype) for x in self._bits)
            for kv_heads_of_layer, dim in self._rows
        ]
        self._shapes: list[tuple[Shape, Shape]] = []  # of the pools of K and V, by layer
        for kv_heads_of_layer, dim in self._rows:
            key_width, value_width = (width(dim, each) for each in self._bits)
            size = self.num_blocks, self.block_size, kv_heads_of_layer
            self._shapes.append(((*size, key_width), (*size, value_width)))
        self._slabs, self._group_of = self.groups.slab_of, self.groups.group_of
        if len(self.groups.windows) > 1 and len(set(self._shapes)) > 1:
            raise ValueError("expected one shape of layers with windows and without")
        check_room(self.num_blocks * self.block_bytes)
        shapes = self._shapes[: self.groups.num_slabs]
        kinds = [dtype if each is None else mx.uint32 for each in self._bits]
        keys, values = (
            [mx.zeros(shape, kind) for shape in of_kind]
            for of_kind, kind in zip(zip(*shapes, strict=True), kinds, strict=True)
        )
        mx.eval(keys, values)
        backend = backend_of(mx.default_device())
        self._store: InPlace | Donated
        if backend == "cpu":
            self._store = Donated(keys, values)
        else:
            self._store = InPlace(keys, values, backend, dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: K and V in the layers of its group."""
        return sum(self.layer_bytes(slab) for slab in range(self.groups.num_slabs))

    def layer_bytes(self, layer: int) -> int:
        """Return the bytes of a block in one layer, K and V."""
        return self._layer_bytes[layer]

    @property
    def keys(self) -> tuple[mx.array, ...]:
        """K pools by layer, for inspection, with everything written so far.

        On a GPU this waits for all writes, and arrays made from a pool must be evaluated before the
        next write: use `attend` in a model. On a CPU, a write copies a pool that you keep a
        reference to.
        """
        return self._by_layer(self._store.settled()[0])

    @property
    def values(self) -> tuple[mx.array, ...]:
        """V pools by layer, as `keys`."""
        return self._by_layer(self._store.settled()[1])

    def write(self, layer: int, keys: mx.array, values: mx.array, slots: SlotMapping) -> None:
        """Write tokens into one layer's pools: a prompt, a chunk of it; lazily on a GPU.

        The cost depends on the tokens, not on the size of the pool. Slots from `extend` belong to
        the step's sequences; the holders of other slots are not checked.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        keys, values : mx.array
            Shape [B, Hkv, L, D] with Hkv and D of the layer, dtype of the pools.
        slots : SlotMapping
            The slots of the B * L tokens, sequence by sequence.

        Raises
        ------
        ValueError
            If there is no such layer, or shapes, dtypes, the default device, or the pool the slots
            were made for do not fit. Nothing has changed then.
        PagedKVError
            If the slots are of a step that is over. Nothing has changed then.
        RuntimeError
            On a CPU, if MLX cannot compute K or V. Nothing has changed then. On a GPU that shows
            when something of the step is evaluated; `wait` says what follows.
        """
        layer = self._check_layer(layer)
        step = slots.step and slots.step()
        if slots.step:
            if step is None:
                raise PagedKVError("expected slots of a step under way, this one was dropped")
            step.check_writing(self)
        if (slots.num_blocks, slots.block_size) != (self.num_blocks, self.block_size):
            raise ValueError(
                f"expected slots of {self.num_blocks} blocks of {self.block_size} tokens, "
                f"got {slots.num_blocks} of {slots.block_size}"
            )
        self._check_new(layer, keys, values)
        if keys.shape[0] * keys.shape[2] != slots.slots.size:
            raise ValueError(
                f"expected {slots.slots.size} tokens, one a slot, "
                f"got {keys.shape[0]} sequences of {keys.shape[2]}"
            )
        if slots.group not in (None, self._group_of[layer]):
            raise ValueError(
                f"expected slots of group {self._group_of[layer]}, got those of group {slots.group}"
            )
        self._store.write(self._slabs[layer], (keys, values), slots.slots)
        if step:
            step.wrote(layer)

    def attend(
        self,
        layer: int,
        queries: mx.array,
        batch: DecodeBatch,
        *,
        scale: float,
        path: str = "auto",
        scores: ScoreOptions = PLAIN,
    ) -> mx.array:
        """Attend over tokens that one layer's pools already hold; `Step.attend` also writes.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        queries, batch, scale, path, scores
            As for `paged_attention`. A layer's window is the cache's, if that was made with
            `windows`: it need not be repeated in `scores`.

        Returns
        -------
        mx.array
            Shape [B, Hq, Q, D], dtype of `queries`; lazy.

        Raises
        ------
        ValueError, UnsupportedPathError
            As `paged_attention`, and if there is no such layer, `scores` have another window than
            the cache has for it, or the default device is another.
        """
        layer = self._check_layer(layer)
        scores = self.scores_of(layer, scores)
        plan = self._plan_for(layer, queries, batch, scale, path, scores)
        plan, tables = self._by_group(layer, plan, batch, scores)
        return self._store.attend(self._slabs[layer], plan, queries, scores, None, tables)

    def scores_of(self, layer: int, scores: ScoreOptions) -> ScoreOptions:
        """Return a layer's options with its window, if the cache was made with `windows`.

        ValueError if there is no such layer, or they have another window.
        """
        if self._windows is None:
            return scores
        given, found = self._scores.get(layer, (None, scores))
        if given is not scores:
            window = self._windows[id_below(self.num_layers, layer, "a layer")]
            found = scores
            if scores.window is None and window is not None:
                found = replace(scores, window=window)
            elif scores.window != window:
                raise ValueError(
                    f"expected window={window} in layer {layer}, as the cache was made, "
                    f"got {scores.window}"
                )
            self._scores[layer] = scores, found
        return found

    def plan(
        self,
        layer: int,
        queries: mx.array,
        new: New,
        batch: DecodeBatch,
        scale: float,
        path: str,
        scores: ScoreOptions,
    ) -> AttentionPlan:
        """Check arguments of `Step.attend` and return the plan for layers with such ones.

        It is by the tables of the first group of layers.

        Parameters
        ----------
        layer, queries, batch, scale, path, scores
            As for `attend`.
        new : tuple of (mx.array, mx.array)
            K and V of the queries' tokens, [B, Hkv, Q, D] each, with Hkv and D of the layer.

        Returns
        -------
        AttentionPlan
            For `write_and_attend`.

        Raises
        ------
        ValueError, UnsupportedPathError
            As `attend` and `write`. Nothing has changed then.
        """
        layer = self._check_layer(layer)
        plan = self._plan_for(layer, queries, batch, scale, path, scores)
        self._check_new(layer, *new)
        return plan

    def write_and_attend(
        self,
        layer: int,
        plan: AttentionPlan,
        queries: mx.array,
        new: New,
        slots: Callable[[int], SlotMapping] | None,
        scores: ScoreOptions,
        batch: DecodeBatch,
    ) -> mx.array:
        """Write tokens and attend with them, as `plan` says; `slots` returns a layer's if needed.

        Without `slots` they are written already.

        ValueError if the tokens do not fit the layer. Nothing has changed then.
        """
        if type(layer) is not int or not 0 <= layer < self.num_layers:  # each layer comes here
            layer = id_below(self.num_layers, layer, "a layer")
        if plan.call[4:6] != self._shapes[layer]:  # then the tokens fit others
            self._check_new(layer, *new)
        store, slab, tables = self._store, self._slabs[layer], None
        if self._group_of[layer]:
            plan, tables = self._by_group(layer, plan, batch, scores)
        if slots is not None and not store.writes(plan):
            store.write(slab, new, slots(layer).slots)
        return store.attend(slab, plan, queries, scores, new, tables)

    def writes(self, plan: AttentionPlan) -> bool:
        """Whether what attends by a plan also writes."""
        return self._store.writes(plan)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks in every layer, in place; `extend` and `step` do it by themselves.

        Parameters
        ----------
        copies : sequence of (int, int)
            From which block id, to which; the latter each once and not among the former.

        Raises
        ------
        ValueError
            If an id is not in the pool, or is written twice or both read and written, or the
            default device is another. Nothing has changed then.
        """
        if not copies:
            return
        self._check_device()
        sources, targets = (integers(ids, "block ids") for ids in zip(*copies, strict=True))
        for block in (*sources, *targets):
            id_below(self.num_blocks, block, "block ids")
        if len({*targets}) < len(targets) or {*targets} & {*sources}:
            raise ValueError(f"expected each target once and no source among them, got {copies}")
        self._store.copy(copies)

    def wait(self) -> None:
        """Wait for all writes and reads so far.

        Only needed after a failure. A step that MLX cannot compute raises when its output is
        evaluated. On a GPU, if it cannot even be launched, every later step that attends over the
        same layer raises, too. After this call the pools are usable again and hold everything that
        was computed, including all steps whose outputs were evaluated.

        Raises
        ------
        PagedKVError
            On a GPU, if a step since the last wait cannot be computed.
        """
        self._store.wait()

    def written(self, layer: int) -> list[mx.array]:
        """Return what is computed once all writes to a layer so far are; it is not to be kept."""
        slab = self._slabs[layer]
        last = self._store.last(slab)
        return [*self._store.pools(slab)] if last is None else [last]

    def begin(self, layer: int, out: mx.array, num_bytes: int) -> None:
        """Start a layer's output on the device, where the host can run ahead.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        out : mx.array
            What `Step.attend` returned for it.
        num_bytes : int
            Approximate memory of the layers since the last call until they are computed: the host
            waits before too much is in flight.
        """
        self._store.begin(self._slabs[layer], out, num_bytes)

    def start(self) -> list[mx.array]:
        """Start all accesses so far; return the arrays to wait for.

        On a GPU there are none. On a CPU, where nothing runs asynchronously, these are all.
        """
        return self._store.start()

    def group_of(self, layer: int) -> int:
        """Return the group of a layer; 0 for what is none."""
        groups = self._group_of
        return groups[layer] if type(layer) is int and 0 <= layer < len(groups) else 0

    def mark(self) -> object:
        """Return what `rewind` takes: the accesses so far."""
        return self._store.mark()

    def rewind(self, mark: Any) -> None:
        """Wait, as `wait` does, and pass over a failure of what came after `mark`."""
        self._store.rewind(mark)

    def _plan_for(
        self,
        layer: int,
        queries: mx.array,
        batch: DecodeBatch,
        scale: float,
        path: str,
        scores: ScoreOptions,
    ) -> AttentionPlan:
        slab = self._slabs[layer]
        if len(batch.groups or (0,)) != len(self.groups.windows):
            raise ValueError("expected a batch of this cache, by its groups of layers")
        head_dim = self._rows[layer][1]
        if any(self._bits):  # codes tell neither
            if queries.shape[3:] != (head_dim,):
                raise ValueError(
                    f"expected queries of shape [B, Hq, Q, {head_dim}], got {queries.shape}"
                )
            if queries.dtype != self._dtype:
                raise ValueError(f"expected queries of {self._dtype}, got {queries.dtype}")
        pools, last = self._store.pools(slab), self._store.last(slab)
        return plan_for(queries, *pools, batch, scale, path, scores, last)

    def _by_group(
        self, layer: int, plan: AttentionPlan, batch: DecodeBatch, scores: ScoreOptions
    ) -> tuple[AttentionPlan, mx.array | None]:
        """Return a plan by the first group's tables as a layer's group has it, and its tables.

        A path that writes takes the tables; others are prepared anew, once for a group.
        """
        group = self._group_of[layer]
        if not group:
            return plan, None
        if self._store.writes(plan):
            return plan, batch.groups[group]
        return batch.once((plan.call, group), plan.over, batch, group, scores), None

    def _by_layer(self, pools: Sequence[mx.array]) -> tuple[mx.array, ...]:
        return tuple(pools[slab] for slab in self._slabs)

    def _check_layer(self, layer: int) -> int:
        self._check_device()
        return id_below(self.num_layers, layer, "a layer")

    def _check_device(self) -> None:
        if mx.default_device().type != self._device:
            raise ValueError(
                f"expected the default device {self._device}, where the pools are, "
                f"got {mx.default_device().type}"
            )

    def _check_new(self, layer: int, keys: mx.array, values: mx.array) -> None:
        shape, (kv_heads, head_dim) = keys.shape, self._rows[layer]
        if len(shape) != 4 or shape[1] != kv_heads or shape[3] != head_dim:
            raise ValueError(f"expected keys of shape [B, {kv_heads}, L, {head_dim}], got {shape}")
        if values.shape != shape:
            raise ValueError(f"expected values of shape {shape}, got {values.shape}")
        if not keys.dtype == values.dtype == self._dtype:
            raise ValueError(
                f"expected {self._dtype}, got keys of {keys.dtype} and values of {values.dtype}"
            )


def _of_each(sizes: Any, num_layers: int, name: str) -> list[int]:
    """Return a size of each layer, of one for all or one each; ValueError for anything else."""
    if np.ndim(sizes) == 0:
        return [positive_int32(sizes, name)] * num_layers
    given = integers(sizes, name)
    if len(given) != num_layers:
        raise ValueError(f"expected {name} of each of {num_layers} layers, got {len(given)}")
    return [positive_int32(size, f"{name} of layer {layer}") for layer, size in enumerate(given)]
