"""The loop of docs/own_loop.md, run as it stands on one device."""

import jax
import own_loop_checks

from engram_jax.core.mesh import make_mesh


def test_a_memory_in_another_model_and_loop():
  own_loop_checks.check(own_loop_checks.load(), make_mesh({}, jax.devices()[:1]))
