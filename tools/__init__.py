"""Scripts beside the main path, run as `python -m tools.NAME`. Nothing else imports them."""

import tracking  # noqa: F401 - outside of the environment it says so in a sentence
