"""The backbone that a memory augments: attention, mixture of experts, residual branches, and LM.

`params` is the table of all parameters; `lm` is the model, `block` one of its blocks.
"""
