"""The backbone a memory augments: attention, mixture of experts, residual branches, language model.

Arrays are named by their axes: B batch, T time, D width, V vocabulary, G residual branches. In the
mixture of experts: S = B T tokens, E routed experts, K experts chosen per token, F expert width.
"""
