"""What `python -m engram_jax` runs, one file a command."""
