"""SIGTERM and SIGINT become a flag; a second SIGINT does not wait; handlers are put back."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

import engram_jax
from engram_jax.core.signals import StopRequest
from engram_jax.errors import EXIT_STOPPED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_are_put_back(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert not stop.requested
    assert stop.signal_name is None
    signal.raise_signal(number)
    assert stop.requested
    assert stop.signal_name == number.name
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal_name == number.name
  assert signal.getsignal(number) is before


def test_a_second_interrupt_raises_and_a_first_one_after_sigterm_does_not():
  before = signal.getsignal(signal.SIGINT)
  with StopRequest():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_refused():
  errors = []

  def enter():
    try:
      StopRequest().__enter__()
    except ValueError as error:
      errors.append(str(error))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert "main thread" in errors[0]


# A run in small: jitted steps, checkpoints being written, and a signal at any moment.
RUN = f"""
  import sys
  import jax
  import jax.numpy as jnp
  from engram_jax.core.checkpoint import Checkpoints
  from engram_jax.core.signals import StopRequest

  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = jnp.zeros(1000, jnp.int32)
  with Checkpoints(sys.argv[1], keep=2) as checkpoints, StopRequest() as stop:
    step = 0
    while not stop.requested:
      step += 1
      state = advance(state)
      if step % 10 == 0:
        checkpoints.save(step, {{"x": state}}, {{}})
        print(step, flush=True)
    if step not in checkpoints.steps():
      checkpoints.save(step, {{"x": state}}, {{}})
    checkpoints.wait()
    restored = checkpoints.restore(step, {{"x": state}})
    print(stop.signal_name, step == int(restored["x"][7]), checkpoints.newest_valid(print) == step)
  sys.exit({EXIT_STOPPED})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_writes_checkpoints_saves_and_leaves(tmp_path, number):
  root = str(pathlib.Path(engram_jax.__file__).parents[1])
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    process.stdout.readline()
    process.send_signal(number)
    last = process.stdout.read().splitlines()[-1]
  assert last == f"{number.name} True True"
  assert process.returncode == EXIT_STOPPED
