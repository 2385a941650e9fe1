"""Optimizers of memory tables, a file each: only the rows a batch touched are read and written.

A batch looks up a few thousand rows of a table that may have hundreds of millions, so gradients
arrive as [U, C], one summed gradient per distinct row id, and the cost of a step follows U.

    adam            Adam in which an untouched row stands still (the paper's Adam, lazily)
    adam_catch_up   Adam equal to dense Adam: a row read again first makes the updates it missed
    adagrad         row-wise Adagrad: one number of state a row
    sinkhorn        momentum and Sinkhorn balancing: one moment instead of two (DeepSeek-V4.1)

The name of a file is a value of `train.optimizer.table`; the file defines `from_config`, which
makes the `TableOptimizer` (tables/table_optimizer.py) of a config. A new file is a new value of
that field; `engram_jax.tables` exports those that come with the package.

Micro-batches: their row ids are concatenated *before* the distinct ones are taken, so that a row
met by several of them has one entry whose gradient is the sum. Two entries for one row would be two
updates of the same old state, of which either may be the one that stays.
"""
