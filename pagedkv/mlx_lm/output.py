"""A model's output layer, which can see fewer hidden states than a pass has tokens."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pagedkv.mlx_lm.routing import replaced

_lock = threading.RLock()  # the garbage collector may close a store while another is opened
_here = threading.local()  # `frame`: that of the last `OutputLayer.seeing` of this thread


class OutputLayer:
    """The module of a model that computes logits from hidden states.

    Until `close`, or until this object is dropped, the module has a class that checks at each call
    whether `seeing` is below it on the stack. So a pass that ends in an error or an interrupt
    leaves nothing to undo, and other threads are not affected.

    Parameters
    ----------
    layer : nn.Module
        The module.
    method : str
        Its method that is called with hidden states.
    """

    def __init__(self, layer: Any, method: str) -> None:
        self._layer = layer
        with _lock:
            if not issubclass(type(layer), _Asks):
                layer.__class__ = _asking(type(layer), method)
            type(layer).holders += 1
            self._finalizer = weakref.finalize(self, _release, layer)
            self._finalizer.atexit = False

    def close(self) -> None:
        """Give the module its own class back, unless another store has it open."""
        self._finalizer()

    def seeing(
        self,
        choose: Callable[[mx.array], mx.array],
        model: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Return the output of a model whose output layer sees only some of the hidden states.

        Parameters
        ----------
        choose : callable
            Hidden states -> those that the output layer sees.
        model, arguments, options
            What is called.
        """
        before = getattr(_here, "frame", None)
        _here.frame = sys._getframe()
        try:
            return model(*arguments, **options)
        finally:
            _here.frame = before if before is not None and _is_running(before) else None


def _release(layer: Any) -> None:
    with _lock:
        kind: Any = type(layer)
        kind.holders -= 1
        if not kind.holders:
            layer.__class__ = kind.own


class _Asks:
    """A class that `_asking` made.

    Attributes
    ----------
    own : type
        The module's own.
    holders : int
        Open `OutputLayer`s of it.
    """

    own: Any
    holders: int


def _asking(own: Any, method: str) -> type:
    def asking(self: Any, hidden: mx.array) -> Any:
        frame: FrameType | None = getattr(_here, "frame", None)
        # An interrupt can leave a frame there that has ended.
        if frame is not None and frame.f_locals["self"]._layer is self and _is_running(frame):
            hidden = frame.f_locals["choose"](hidden)
        return getattr(own, method)(self, hidden)

    def reduce(self: Any, protocol: int) -> Any:
        _, (_, *rest), *state = own.__reduce_ex__(self, protocol)
        return own.__new__, (own, *rest), *state  # a copy is of the own class

    members = {method: asking, "__reduce_ex__": reduce, "own": own, "holders": 0}
    return type(own.__name__, (own, _Asks), members)


def _is_running(wanted: FrameType) -> bool:
    """Whether a frame is below this one on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def output_layer(model: Any, make_caches: Callable[[], list[Any]]) -> OutputLayer | None:
    """Return the opened module that computes logits from hidden states.

    None if it is not a linear layer or an embedding, or if the logits depend on something else as
    well, such as an adapter: a pass in which it sees two rows of three finds that out. None, too,
    if the pass fails.

    Parameters
    ----------
    model : nn.Module
        A model of mlx-lm.
    make_caches : callable
        Makes empty caches as the model wants them.
    """
    last: tuple[Any, str] | None = None

    def noting(kind: type, method: str) -> Callable[[Any, mx.array], mx.array]:
        own = getattr(kind, method)

        def noted(module: Any, hidden: mx.array) -> mx.array:
            nonlocal last
            out: mx.array = own(module, hidden)
            last = module, method
            return out

        return noted

    layers: Any = nn  # mypy sees none of them
    methods = {
        layers.Linear: "__call__",
        layers.QuantizedLinear: "__call__",
        layers.Embedding: "as_linear",
        layers.QuantizedEmbedding: "as_linear",
    }
    tokens = mx.zeros((3, 1), mx.int32)
    with ExitStack() as stack:
        for kind, method in methods.items():
            stack.enter_context(replaced(kind, **{method: noting(kind, method)}))
        try:
            logits = model(tokens, cache=make_caches())
        except Exception:
            return None  # of a model that takes a single sequence, say
    if last is None:
        return None
    found = OutputLayer(*last)
    try:
        fewer = found.seeing(lambda hidden: hidden[:2], model, tokens, cache=make_caches())
    except ValueError:
        fewer = logits
    except BaseException:
        found.close()
        raise
    if fewer.shape == (2, *logits.shape[1:]):
        return found
    found.close()
    return None
