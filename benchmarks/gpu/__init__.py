"""``python -m benchmarks.gpu``: what leap_pl does on a GPU, checked and measured in one command."""
