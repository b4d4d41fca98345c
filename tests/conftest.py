"""Settings of all tests."""

import os

from hypothesis import settings

# Threads that wait must not spin: where they outnumber the cores, that costs seconds a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many workers as cores: each has one thread, and so have the processes that it
    # starts. vLLM would bind all of them to the same core.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

# A slow machine is no fault of the code: examples have no time limit.
settings.register_profile("diffkv", deadline=None)
settings.load_profile("diffkv")
