"""In the engine core, beside vLLM's scheduler: settings, quotas, the size of prompts, the banner."""
