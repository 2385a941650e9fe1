"""Ahead-of-time compilation for devices that are not attached, and what compiled programs contain.

`topology` names TPU slices and GPU nodes (`gpus`) and their devices; `report` compiles the train
step for one; `hlo_text` parses a program, and `collectives`, `hlo_loops`, `hlo_cost`,
`gpu_kernels` and `buffers` read contracts from it.
"""
