"""Make the mask that learning starts from, and keep it for the next run."""

from leap_pl.prior.settings import Prior

__all__ = ["Prior"]
