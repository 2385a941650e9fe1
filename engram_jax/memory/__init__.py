"""Conditional memory: token compression, exact n-gram hashing, tables of rows, gated fusion.

A reader starts here, in this order: `compress` (tokens to canonical ids), `hash_layout` (primes and
multipliers, by the rules of a released model in `dialects`), `hashing` (canonical ids to row ids),
`table` (row ids to rows), `engram` (rows into the residual stream). The first three need NumPy
alone; `vocabulary` is their union for a tokenizer.
"""
