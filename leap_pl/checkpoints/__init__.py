"""Hold everything about a checkpoint: what it says, how it is written and read, and which one a run resumes from."""
