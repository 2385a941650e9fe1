"""Tests on eight simulated devices: a session of their own, because jax counts devices once.

python -m pytest tests/eight            (tests/test_eight_devices.py runs them)
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
