"""One-shot pruning, block by block: magnitude, Wanda, SparseSwaps, SparseGPT, ADMM.

The algorithms are pure functions of a matrix and the statistics of its inputs (:mod:`.magnitude`, :mod:`.wanda`,
:mod:`.sparseswaps`, :mod:`.sparsegpt`, :mod:`.admm`), listed in the table :mod:`.methods`. :mod:`.walk` collects the
statistics and :mod:`.prune` prunes a model; :mod:`leap_pl.prior.cache` makes the masks that learning starts from, and
:mod:`leap_pl.cli.prune` is ``leap_pl prune``. Importing this package imports none of them, so that the command line
starts fast.
"""
