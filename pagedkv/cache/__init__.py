"""The tensors of the cache, and the steps that write and read them."""
