"""In the engine core, beside vLLM's scheduler: settings, rows, who pays for pages, the banner."""
