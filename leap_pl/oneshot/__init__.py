"""Pruning in one shot, block by block: magnitude, Wanda, SparseSwaps, SparseGPT, ADMM.

The algorithms are pure functions of a matrix and the statistics of its inputs (:mod:`.magnitude`,
:mod:`.wanda`, :mod:`.sparseswaps`, :mod:`.sparsegpt`, :mod:`.admm`), and :mod:`.methods` is the table of them;
:mod:`.walk` feeds them, :mod:`.prune` puts both together, :mod:`leap_pl.prior.cache` makes masks to start the gates
from, and :mod:`leap_pl.cli.prune` is ``leap_pl prune``.
Importing this package loads none of them, so that the command line answers at once.
"""
