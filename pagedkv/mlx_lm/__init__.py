"""mlx-lm's models over a paged KV cache: `pip install "pagedkv[mlx-lm]"`."""

import warnings
from importlib import metadata

OLDEST = "0.32.2"
"""The oldest mlx-lm that works: its caches have what the store needs."""
TESTED = "0.32"
"""The newest minor version of mlx-lm that the tests ran with."""


def _check_mlx_lm() -> None:
    needed = f'pagedkv.mlx_lm needs mlx-lm {OLDEST} or newer: pip install "pagedkv[mlx-lm]"'
    try:
        found = metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needed}; it is not installed") from None
    if _numbers(found) < _numbers(OLDEST):
        raise ImportError(f"{needed}; found {found}")
    if _numbers(found)[:2] > _numbers(TESTED):
        warnings.warn(
            f"pagedkv.mlx_lm was tested with mlx-lm {TESTED}, found {found}", stacklevel=2
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


_check_mlx_lm()

from pagedkv.mlx_lm.prompt_cache import PromptCache  # noqa: E402
from pagedkv.mlx_lm.scheduled import ScheduledModel  # noqa: E402
from pagedkv.mlx_lm.store import PagedStore, StoreStats  # noqa: E402

__all__ = ["PagedStore", "PromptCache", "ScheduledModel", "StoreStats"]
