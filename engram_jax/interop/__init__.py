"""Checkpoint folders of safetensors files: those of other models, and exported runs.

safetensors     one file, read by byte ranges     folder  a folder of them with its config
writer          writes a folder as a stream       memory  the memory of a folder, in any format
digests         what a folder's files were when it was written, compared when they are opened
engram_format, deepseek, qwen   one format each: how it is verified, read and written
reader          looks up a text in the memory of a folder in any of these formats
"""
