"""What ``leap_pl evaluate`` is made of: perplexity, zero-shot tasks, what is evaluated, and the result file."""
