"""Optimizers of memory tables: only the rows a batch touched are read, moved, or remembered.

A batch looks up a few thousand rows of a table that may have hundreds of millions, so gradients
arrive as [U, C], one summed gradient per distinct row id, and every step here costs by U. For that
the table and the state must be donated to the jitted step, and come out in the order they went in:
donation pairs arrays of one shape by their order, and a table paired with a moment is copied.

    form      what such an optimizer is: four functions of one device's shard of a table
    adam      Adam in which an untouched row stands still (the paper's Adam, lazily)
    catch_up  Adam equal to dense Adam: a row read again first makes the moves it missed
    adagrad   row-wise Adagrad: one number a row
    sinkhorn  momentum and Sinkhorn balancing: one state instead of Adam's two (DeepSeek-V4.1)
    choose    the one a config names
    write     rows in and out of a shard, rounded stochastically where the table is bfloat16

Micro-batches: concatenate their row ids *before* taking the distinct ones, so that a row met by
several of them has one entry whose gradient is the sum. Two entries for one row would be two steps
from the same old state, of which either may be the one that stays.
"""
