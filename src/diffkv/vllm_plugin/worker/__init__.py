"""What runs in each worker: the attention backend, the pool, what it reports."""
