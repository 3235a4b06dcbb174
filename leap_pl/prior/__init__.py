"""Compute the prior, the mask that learning starts from, and cache it."""

from leap_pl.prior.settings import Prior

__all__ = ["Prior"]
