"""What is published beside asv's own pages. It imports tracking, never the reverse."""
