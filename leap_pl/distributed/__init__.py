"""Shard a model over ranks, and gather and reduce sharded tensors."""
