"""Read files and settings from outside within limits and by types: they are data, and never code."""
