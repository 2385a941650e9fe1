"""Hash rules, a file each: the name of a file is a value of `model.engram.dialect`.

    engram         the paper and its demo
    deepseek_v41   DeepSeek-V4.1-Flash
    qwen_ple       Qwen3.8-Flash-Next

A file defines `DIALECT`, a `memory.hash_layout.Dialect`. So a new file is a new dialect.
"""
