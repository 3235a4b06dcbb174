"""Kernels of the gates, losses and optimizers, for each kind of device."""
