"""Meshes over eight simulated devices."""

import jax
import pytest

from engram_jax.core.mesh import make_mesh


def test_axes_not_named_have_size_one():
  assert make_mesh({"fsdp": 4, "tensor": 2}).shape == {
    "data": 1,
    "fsdp": 4,
    "expert": 1,
    "tensor": 2,
  }


def test_sizes_that_do_not_multiply_to_the_devices_are_refused():
  with pytest.raises(ValueError, match=f"holds 6 devices but there are {jax.device_count()}"):
    make_mesh({"data": 2, "tensor": 3})
