"""Settings of all tests."""

from hypothesis import settings

# A slow machine is no fault of the code: examples have no time limit.
settings.register_profile("diffkv", deadline=None)
settings.load_profile("diffkv")
