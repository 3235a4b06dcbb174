"""Take what comes from outside, files and settings, within limits and by types: it is data, and never code."""
