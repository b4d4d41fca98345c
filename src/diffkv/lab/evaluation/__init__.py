"""Fidelity: what an answer loses when its cache is compressed, measured on tasks and on logits."""
