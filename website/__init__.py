"""What is published beside asv's own pages. It imports tracking, never the reverse."""

import tracking  # noqa: F401 - outside of the environment it says so in a sentence
