"""K and V on a GPU, written in place by kernels, in an order that data alone says.

MLX takes the inputs of a kernel for constant, so it does not know that some of ours write into a
pool, and orders nothing by it. What it does order is data: an output is computed before what takes
it. So each access to a layer's pools, read or write, takes an output of the access before as an
input, whether it has a use for it or not. All accesses to a layer form one chain, in the order in
which they are built, on whatever stream and however many steps ahead of the device the host is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from weakref import ReferenceType, ref

import mlx.core as mx

from pagedkv import kernels
from pagedkv.attention.codes import bits_of
from pagedkv.attention.fused import TYPES, row_constants
from pagedkv.attention.inputs import New
from pagedkv.attention.plan import AttentionPlan
from pagedkv.attention.scores import ScoreOptions
from pagedkv.errors import PagedKVError

WARPS = 8  # of a group that moves a token
FEW, SMALL = 32, 2**20  # bytes of an output that may be kept until the next access
AHEAD = 5 * 2**28  # bytes that a prompt's layers under way may take until the host waits


class Mark:
    """Where the chains of all layers ended at one time."""

    def __init__(self, last: list[mx.array], number: int) -> None:
        self.last, self.number = last[:], number


class InPlace:
    """Pools that are never replaced and never waited for.

    Parameters
    ----------
    keys, values : sequence of mx.array
        Pools by layer, [N, S, Hkv, D] each, row-contiguous, evaluated.
    backend : str
        ``"cuda"`` or ``"metal"``.
    dtype : mx.Dtype
        Of queries and new tokens.
    """

    def __init__(
        self,
        keys: Sequence[mx.array],
        values: Sequence[mx.array],
        backend: str,
        dtype: mx.Dtype,
    ) -> None:
        self._keys, self._values, self._backend = list(keys), list(values), backend
        self._dtype = dtype
        self._nothing = mx.zeros(8, self._dtype)  # on Metal fewer would be of another kind
        mx.eval(self._nothing)
        self._last = [self._nothing] * len(keys)  # an output of the newest access, by layer
        self._begun_with: deque[tuple[mx.array, int]] = deque()
        self._begun_bytes = 0
        self._started: deque[list[mx.array]] = deque()  # passes
        self._marks: list[ReferenceType[Mark]] = []
        self._begun = 0  # marks so far

    def pools(self, layer: int) -> tuple[mx.array, mx.array]:
        """Return K and V of a layer for their shape and dtype: what they hold is not ordered."""
        return self._keys[layer], self._values[layer]

    def last(self, layer: int) -> mx.array:
        """Return an output of the newest access: once it is computed a layer can be read."""
        return self._last[layer]

    def settled(self) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Wait for every access and return K and V by layer.

        These are other Python objects: what is assigned to them is not assigned to the pools.
        """
        self.wait()
        pools = self._keys, self._values
        keys, values = (tuple(pool.reshape(pool.shape) for pool in each) for each in pools)
        return keys, values

    def writes(self, plan: AttentionPlan) -> bool:
        """Whether `attend` takes `new` with this plan."""
        return plan.path.writes

    def attend(
        self,
        layer: int,
        plan: AttentionPlan,
        queries: mx.array,
        scores: ScoreOptions,
        new: New | None = None,
        tables: mx.array | None = None,
    ) -> mx.array:
        """Attend after all accesses so far; put `new`, K and V of the queries' tokens, first.

        `tables` are in place of the plan's, as for `AttentionPlan.attend`.
        """
        keys, values = self._keys[layer], self._values[layer]
        out, last = plan.attend(queries, keys, values, scores, self._last[layer], new, tables)
        if last is not None:
            self._last[layer] = last
            return out
        if FEW <= plan.output_bytes <= SMALL:
            # Another Python object: what is assigned to one of them is not assigned to the other.
            self._last[layer] = out.reshape(out.shape)
            return out
        # 8 elements do not keep the memory of all, once they are computed: with the output.
        part = mx.contiguous(mx.broadcast_to(out[:1, :1, :1, :1], (1, 1, 1, 8)))
        self._last[layer] = part
        depending: list[mx.array] = mx.depends([out], [part])
        return depending[0]

    def write(self, layer: int, new: New, slots: mx.array) -> None:
        """Put tokens of K and V, [B, Hkv, L, D] each, into their slots, [B * L] int32."""
        rows = [mx.flatten(tokens.swapaxes(1, 2), 0, 1) for tokens in new]
        _, kv_heads, head_dim = rows[0].shape
        keys, values = self.pools(layer)
        bits = (
            bits_of(keys.shape, keys.dtype, head_dim),
            bits_of(values.shape, values.dtype, head_dim),
        )
        sizes = (("BLOCK_SIZE", keys.shape[1]), ("HKV", kv_heads), ("D", head_dim))
        constants = (*sizes, *row_constants(head_dim, bits))
        self._move("write", layer, constants, [*rows, slots], (slots.size, 1))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in every layer.

        Waits for every access before: the copy must not be lost with one that fails. Sequences are
        forked when their tokens are known, so that there is little to wait for.
        """
        self.wait()
        pairs = mx.array([*copies])
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            _, block_size, *key_part = keys.shape
            # A block in as many parts as it has tokens, whatever is in them.
            constants = (
                ("BLOCK_SIZE", block_size),
                ("KEY_PART", math.prod(key_part)),
                ("VALUE_PART", math.prod(values.shape[2:])),
                ("KEY_BYTES", keys.dtype.size),
                ("VALUE_BYTES", values.dtype.size),
            )
            self._move("copy", layer, constants, [pairs], (len(copies), block_size))

    def _move(
        self,
        body: str,
        layer: int,
        constants: kernels.Constants,
        inputs: list[mx.array],
        groups: tuple[int, int],
    ) -> None:
        keys, values = self.pools(layer)
        name = TYPES[self._dtype]
        constants = (*constants, ("WARPS", WARPS), ("T", name), ("OUT", name))
        moves = kernels.kernel(body, self._backend, constants)
        threads = WARPS * 32
        [self._last[layer]] = moves(
            inputs=[keys, values, *inputs, self._last[layer]],
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[self._dtype],
        )

    def begin(self, layer: int, out: mx.array, num_bytes: int) -> None:
        """Let the device begin with a layer's output.

        Waits while `num_bytes` of this and of what it has begun with before are too many: what a
        layer takes until it is computed.
        """
        last = self._last[layer]
        mx.async_eval(out, last)  # type: ignore[no-untyped-call]
        self._begun_with.append((last, num_bytes))  # a few numbers in place of the output
        self._begun_bytes += num_bytes
        while self._begun_bytes > AHEAD and len(self._begun_with) > 1:
            first, had = self._begun_with.popleft()
            self._begun_bytes -= had
            self._await([first])

    def start(self) -> list[mx.array]:
        """Have every access computed; wait for what the last but one call started."""
        mx.async_eval(self._last)  # type: ignore[no-untyped-call]
        self._started.append(self._last[:])
        if len(self._started) > 2:
            self._await(self._started.popleft())
        return []

    def wait(self) -> None:
        """Wait for every access.

        Raises
        ------
        PagedKVError
            If MLX could not compute one, or what it depends on. Those that had not been computed
            are not in the pools; what had been is as it was, and the pools can be used.
        """
        self._await(self._last)

    def _await(self, accesses: list[mx.array]) -> None:
        """Wait for accesses, of all or some layers; PagedKVError as `wait`."""
        try:
            mx.eval(accesses)
        except Exception as error:
            self._forget([self._nothing] * len(self._last))
            raise PagedKVError(
                f"a step failed when it was evaluated: {error}. Its tokens, and those of steps "
                "not evaluated yet, are not in the pools: take them back from the sequences"
            ) from error

    def mark(self) -> Mark:
        """Return where the chains end now, for `rewind`; steps under way hold theirs."""
        self._marks = [marked for marked in self._marks if marked() is not None]
        self._begun += 1
        mark = Mark(self._last, self._begun)
        self._marks.append(ref(mark))
        return mark

    def rewind(self, mark: Mark) -> None:
        """Wait for every access; ignore a failure of a step that is still open.

        Parameters
        ----------
        mark : Mark
            From when the step began that is rolled back now.

        Raises
        ------
        PagedKVError
            As `wait`, if what failed came before `mark`, or if others came after it.
        """
        try:
            mx.eval(self._last)
        except Exception as error:
            # The newest that can be computed: steps that ended before it lose nothing.
            marks = [marked for reference in self._marks if (marked := reference()) is not None]
            for marked in reversed(marks):
                try:
                    mx.eval(marked.last)
                except Exception:
                    continue
                self._forget(marked.last[:])
                if marked.number < self._begun:
                    raise PagedKVError(
                        "a step failed when it was evaluated, and later ones came after it: theirs "
                        "are not in the pools either, take these back from their sequences"
                    ) from error
                return
            self.wait()

    def _forget(self, last: list[mx.array]) -> None:
        mx.synchronize()  # what did run ends before what comes now
        self._begun_with.clear()
        self._started.clear()
        self._begun_bytes = 0
        self._last = last
