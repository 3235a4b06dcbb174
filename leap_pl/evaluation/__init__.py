"""Evaluation, as run by ``leap_pl evaluate``: the evaluated model, perplexity, zero-shot tasks and the result file."""
