"""SIGTERM and SIGINT become a flag; a second signal does not wait; handlers are put back."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import engram_jax
from engram_jax.core.signals import StopRequest
from engram_jax.errors import EXIT_STOPPED

ROOT = str(pathlib.Path(engram_jax.__file__).parents[1])


class Listener:
  """Takes down what a StopRequest says and does, in place of stderr and the process's end."""

  def __init__(self):
    self.said, self.codes, self.ended = [], [], threading.Event()

  def end(self, code: int) -> None:
    self.codes.append(code)
    self.ended.set()

  def request(self, **options) -> StopRequest:
    return StopRequest(say=self.said.append, end=self.end, **options)


@pytest.fixture
def listener():
  return Listener()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_are_put_back(listener, number):
  before = signal.getsignal(number)
  with listener.request() as stop:
    assert not stop.requested
    assert stop.signal_name is None
    signal.raise_signal(number)
    assert stop.requested
    assert stop.signal_name == number.name
  assert signal.getsignal(number) is before
  assert signal.set_wakeup_fd(-1) == -1
  assert len(listener.said) == 1
  assert listener.said[0].startswith(f"{number.name}: stopping once this step is done and saved")
  assert not listener.codes


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_with_its_number(listener, first, second):
  with listener.request() as stop:
    signal.raise_signal(first)
    signal.raise_signal(second)
    assert listener.ended.wait(10)
    assert stop.signal_name == first.name
  assert listener.codes == [128 + second]
  assert listener.said[1] == f"{second.name}: a second signal, ending at once"


def test_two_signals_of_one_kind_are_two_though_python_runs_one_handler(listener):
  """The main thread is in C, as it is while XLA compiles: its handler has not run in between."""
  with listener.request() as stop:
    pid = os.getpid()
    # A child sends both while this thread waits for it in one system call.
    words = f"import os, signal, time; os.kill({pid}, 2); time.sleep(0.2); os.kill({pid}, 2)"
    subprocess.run([sys.executable, "-c", words], check=True)
    assert listener.ended.wait(10)
    assert stop.signal_name == "SIGINT"
  assert listener.codes == [130]


def test_with_nothing_to_save_the_first_signal_leaves(listener):
  with pytest.raises(SystemExit) as left, listener.request(has_work=False):
    signal.raise_signal(signal.SIGTERM)
  assert left.value.code == EXIT_STOPPED
  assert listener.codes == [EXIT_STOPPED]
  assert listener.said == ["SIGTERM: stopping; there is nothing to save yet"]


def test_with_nothing_to_save_a_main_thread_that_does_not_leave_is_ended(listener):
  with contextlib.suppress(SystemExit), listener.request(has_work=False):
    try:
      signal.raise_signal(signal.SIGTERM)
    finally:  # a library that catches everything, or a compiler
      assert listener.ended.wait(10)
  assert listener.codes[0] == EXIT_STOPPED


# A process that compiles for many seconds, without a single bytecode of Python in between.
COMPILING = """
  import sys
  import jax
  import jax.numpy as jnp
  from engram_jax.core.signals import StopRequest

  def long_to_compile(x):
    for i in range(600):
      x = jnp.sin(x @ x + i) + jnp.linalg.norm(x, axis=0)
    return x

  lowered = jax.jit(long_to_compile).lower(jnp.ones((8, 8)))
  with StopRequest(has_work=sys.argv[1] == "work"):
    print("compiling", flush=True)
    lowered.compile()
    print("compiled", flush=True)
"""


@pytest.mark.parametrize(
  ("work", "signals", "code"),
  [
    ("none", [signal.SIGTERM], EXIT_STOPPED),
    ("none", [signal.SIGINT], EXIT_STOPPED),
    ("work", [signal.SIGINT, signal.SIGINT], 130),
    ("work", [signal.SIGTERM, signal.SIGTERM], 143),
  ],
)
def test_signals_are_answered_while_xla_compiles(work, signals, code):
  with subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(COMPILING), work],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.3)
    for number in signals:
      process.send_signal(number)
      answer = process.stderr.readline()
      assert answer.startswith(f"{number.name}: "), answer
    out, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert "compiled" not in out  # it ended before the compiler did
  assert "Traceback" not in err


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
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT},
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    process.stdout.readline()
    process.send_signal(number)
    last = process.stdout.read().splitlines()[-1]
  assert last == f"{number.name} True True"
  assert process.returncode == EXIT_STOPPED
