"""In each worker process: the attention backend, the pool, its reports."""
