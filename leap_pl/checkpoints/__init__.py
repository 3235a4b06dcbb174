"""Checkpoints: their contents, writing and reading them, and choosing the one that a run resumes from."""
