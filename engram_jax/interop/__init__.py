"""Checkpoints of others, and ours for others: safetensors folders, read and written by slices.

`tensor_file` and `folder` read them, `writer` writes them; `deepseek`, `qwen` and `own` say what is
in which layout and check it; `reader` asks any of them what its memory says about a text.
"""
