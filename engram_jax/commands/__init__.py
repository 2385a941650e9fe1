"""The commands of `python -m engram_jax`, one file each, and the kinds of `convert`."""
