"""Compute the losses that a mask is learned by."""
