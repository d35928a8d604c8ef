"""mlx-lm's models over a paged store: `pip install "pagedkv[mlx-lm]"`."""

from importlib import metadata

OLDEST = "0.32.2"
"""The oldest mlx-lm whose caches have what is needed here."""


def _check_mlx_lm() -> None:
    needed = f'pagedkv.mlx_lm needs mlx-lm {OLDEST} or newer: pip install "pagedkv[mlx-lm]"'
    try:
        found = metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needed}; it is not installed") from None
    numbers = [int(part) for part in found.split(".")[:3] if part.isdigit()]
    if numbers < [int(part) for part in OLDEST.split(".")]:
        raise ImportError(f"{needed}; found {found}")


_check_mlx_lm()

from pagedkv.mlx_lm.prompt_cache import PromptCache  # noqa: E402
from pagedkv.mlx_lm.scheduled import ScheduledModel  # noqa: E402
from pagedkv.mlx_lm.store import PagedStore, StoreStats  # noqa: E402

__all__ = ["PagedStore", "PromptCache", "ScheduledModel", "StoreStats"]
