"""Which blocks hold which tokens, and who runs next: bookkeeping without tensors."""
