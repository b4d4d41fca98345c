"""In the API process, or that of `LLM`: starts engines, checks requests, reads answers."""
