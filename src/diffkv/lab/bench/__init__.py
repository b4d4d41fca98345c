"""What `diffkv bench` measures: kernels, the pool's own work, engines, conversations, servers.

Every row is a dict that goes to a file as one line of JSON, with the machine, the versions and the
commit beside the figures, so that a row can be read on its own.
"""
