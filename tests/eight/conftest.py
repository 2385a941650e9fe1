"""Tests on eight simulated devices: a session of their own, because jax counts devices once.

python -m pytest tests/eight            (tests/test_eight_devices.py runs them file by file)
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def quick():
  """Programs are compiled quickly rather than well."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
