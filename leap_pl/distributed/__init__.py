"""Split a model over ranks, and put together what they hold."""
