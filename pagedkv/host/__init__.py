"""Which blocks hold which tokens, and which requests run next: bookkeeping without tensors."""
