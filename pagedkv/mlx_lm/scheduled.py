"""A model of mlx-lm that computes what a `Scheduler` chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache

from pagedkv.attention.codes import bits_of_each
from pagedkv.cache.kv_cache import PagedKVCache
from pagedkv.cache.step import ScheduledStep
from pagedkv.errors import PagedKVError, UnsupportedModelError
from pagedkv.host.schedule import Schedule
from pagedkv.mlx_lm.layer import ShapedLayer
from pagedkv.mlx_lm.memory import pools_of
from pagedkv.mlx_lm.output import output_layer
from pagedkv.mlx_lm.probe import LayerShape, layer_shapes
from pagedkv.mlx_lm.routing import Closing, open_routes
from pagedkv.mlx_lm.store import check_budget


class ScheduledModel(Closing):
    """A model of mlx-lm that computes the schedules of a `Scheduler`.

    The scheduler admits and preempts requests and shares their prefixes; the model computes the
    schedules over paged K and V. While it is open, attention over its caches uses its pools;
    `close`, or the end of a ``with``, undoes that.

    Parameters
    ----------
    model : nn.Module
        A model of mlx-lm whose layers all keep K and V.
    memory, num_blocks, block_size, kv_bits
        As for `PagedStore`.

    Attributes
    ----------
    cache : PagedKVCache
        The pools: ``Scheduler(cache.pool, cache.block_size)`` spends them.

    Raises
    ------
    UnsupportedModelError
        If a layer cannot be paged.
    ValueError
        If the budget is missing, given twice, malformed, too small for a block or larger than what
        the device has left, or `kv_bits` is something else.
    PagedKVError
        If the model has an open `PagedStore`.

    Examples
    --------
    The loop, here with the most likely tokens::

        with ScheduledModel(model, memory="2GB") as scheduled:
            scheduler = Scheduler(scheduled.cache.pool, scheduled.cache.block_size)
            scheduler.add("a", tokenizer.encode("Hello"), max_new_tokens=50)
            while (schedule := scheduler.schedule()).request_ids:
                tokens = mx.argmax(scheduled.logits(schedule), axis=-1).tolist()
                scheduler.update(dict(zip(schedule.samples, tokens)))
    """

    def __init__(
        self,
        model: Any,
        *,
        memory: int | str | None = None,
        num_blocks: int | None = None,
        block_size: int = 32,
        kv_bits: int | tuple[int | None, int | None] | None = None,
    ) -> None:
        bits = bits_of_each(kv_bits, "kv_bits")
        num_bytes = check_budget(model, memory, num_blocks)
        caches = make_prompt_cache(model)
        self._undo_routes = open_routes(self)
        try:
            shapes = layer_shapes(model, caches)
            _check_all_paged(model, shapes, len(caches))
            self._output = output_layer(model, lambda: make_prompt_cache(model))
            self.cache: PagedKVCache = pools_of(
                shapes, block_size, num_blocks=num_blocks, num_bytes=num_bytes, bits=bits
            )
        except BaseException:
            self._undo_routes()
            raise
        self._model, self._pass = model, _Pass(self.cache)
        self._layers = [_Layer(self._pass, layer, shape) for layer, shape in enumerate(shapes)]
        self._is_open = True

    def logits(self, schedule: Schedule, sampled: mx.array | None = None) -> mx.array:
        """Compute a schedule; return the logits of the next tokens of its requests.

        Call `Scheduler.update` with the sampled tokens next, or `Scheduler.retract` if this raised.

        Parameters
        ----------
        schedule, sampled
            As for `PagedKVCache.step`: with `sampled` one step is in flight. Not empty.

        Returns
        -------
        mx.array
            Shape [len(schedule.samples), V], in this order; lazy.

        Raises
        ------
        ValueError, PagedKVError
            As `PagedKVCache.step`, if the schedule is empty or this object was closed. Nothing has
            changed then.
        """
        if not self._is_open:
            raise PagedKVError("expected an open model, this one was closed")
        if not schedule.request_ids:
            raise ValueError("expected a schedule of at least one request")
        step = self.cache.step(schedule, sampled)
        model, output = self._model, self._output
        if output is not None and step.sample_rows:
            rows = mx.array(step.sample_rows)
            model = partial(output.seeing, lambda hidden: hidden[rows, -1:], model)
        with self._pass.of(step):
            out: mx.array = model(step.tokens, cache=self._layers)
        if not step.sample_rows:  # a part of a prompt: nothing else would have it computed
            mx.async_eval(self.cache.written(len(self._layers) - 1))  # type: ignore[no-untyped-call]
            return mx.zeros((0, out.shape[-1]), out.dtype)
        return out[:, -1] if output else out[mx.array(step.sample_rows), -1]

    def close(self) -> None:
        """Restore mlx-lm, and free the pools' memory unless another reference to `cache` exists.

        It can be called again, including after an interrupt.
        """
        self._is_open = False
        self._undo_routes()
        if self._output is not None:
            self._output.close()
        for holder in (self, self._pass):
            vars(holder).pop("cache", None)


def _check_all_paged(model: Any, shapes: list[LayerShape], layers: int) -> None:
    """Raise UnsupportedModelError unless each of a model's layers is paged."""
    if missing := set(range(layers)) - {shape.index for shape in shapes}:
        raise UnsupportedModelError(
            f"{type(model).__module__.rpartition('.')[2]} cannot be scheduled: layer "
            f"{min(missing)} keeps something other than K and V"
        )


class _Pass:
    """The forward pass under way, which all layers read.

    Attributes
    ----------
    cache : PagedKVCache
        The pools.
    step : ScheduledStep or None
        What is computed.
    offset : int or mx.array
        Position of the first new token: an int, or [B] int32 for several sequences.
    longest : int
        Most tokens of a sequence before the pass.
    masks : list of mx.array
        Those that were asked for as arrays.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.step: ScheduledStep | None = None
        self.offset: int | mx.array = 0
        self.longest = 0
        self.masks: list[mx.array] = []

    @contextmanager
    def of(self, step: ScheduledStep) -> Iterator[None]:
        """Let the layers compute a step."""
        before = step.positions
        self.offset = int(before[0]) if len(before) == 1 else mx.array(before)
        self.step, self.longest = step, int(before.max())
        try:
            yield
        finally:
            self.step, self.masks = None, []


class _Layer(ShapedLayer):
    """What a model reads and calls of a layer's cache."""

    def __init__(self, under_way: _Pass, layer: int, shape: LayerShape) -> None:
        super().__init__(layer, shape)
        self._pass = under_way
        self._new: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> int | mx.array:
        return self._pass.offset

    def make_mask(
        self,
        N: int,  # noqa: N803
        return_array: bool = False,
        window_size: int | None = None,
    ) -> Any:
        """Return a placeholder for a mask: the step itself knows which tokens each one sees."""
        if return_array:
            mask = create_causal_mask(N, self._pass.longest, window_size=window_size)
            self._pass.masks.append(mask)
            return mask
        return None if N == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._new = keys, values
        if self.shape.is_shared:
            self.give(keys)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        new, self._new, step = self._new, None, self._pass.step
        if step is None or new is None or keys is not new[0] or values is not new[1]:
            raise PagedKVError("expected the K and V that the layer put into its cache")
        if isinstance(mask, mx.array) and not any(mask is made for made in self._pass.masks):
            raise PagedKVError("expected a mask of the cache's, got another")
        out = step.attend(
            self.layer,
            self.widened(queries.astype(keys.dtype)),
            self.widened(keys),
            self.widened(values),
            scale=scale,
            scores=self.scores(sinks),
        )
        return self.narrowed(out, queries.dtype)

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attend with another layer's queries over all that the sequences hold of this one."""
        step = self._pass.step
        assert step is not None
        out = step.attend_again(
            self.layer,
            self.widened(queries.astype(self.shape.dtype)),
            scale=scale,
            scores=self.scores(sinks),
        )
        return self.narrowed(out, queries.dtype)

    def unpaged(self) -> Any:
        raise PagedKVError("expected a prompt cache, got a layer of a scheduled model")
