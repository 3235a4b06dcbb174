"""Compute what gates, losses and optimizers are made of, on each kind of device."""
