"""The loop of docs/own_loop.md, run as it stands on eight devices."""

import own_loop_checks

from engram_jax.core.mesh import make_mesh


def test_a_memory_in_another_model_and_loop():
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  own_loop_checks.check(own_loop_checks.load(), mesh)
