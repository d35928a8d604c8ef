"""Exceptions of this package. Malformed arguments are plain `ValueError`s."""


class PagedKVError(Exception):
    """Base of every error that is about the cache rather than about an argument's form."""


class UnsupportedPathError(PagedKVError, ValueError):
    """The named decode path exists but cannot run on this device, dtype or head dim."""


class OutOfBlocksError(PagedKVError):
    """More blocks are needed than the pool has free. Nothing has changed.

    Attributes
    ----------
    needed, free : int
        Blocks.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"expected {needed} free blocks, {free} are left")
        self.needed, self.free = needed, free


class SharedBlockError(PagedKVError):
    """A block that other sequences hold would be written. Nothing has changed."""


class UnsupportedModelError(PagedKVError, ValueError):
    """A model whose layers cannot keep K and V in a paged store."""
