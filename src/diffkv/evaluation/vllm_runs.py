"""The suite `synth` through vLLM, with DiffKV's plugin and with vLLM's own cache.

vLLM decides with the end of a prompt, and a prompt is all that it is given: so the setting is easy.
"""
