"""Compiling what requests will need before the first one comes."""

import itertools
import queue

from engram_jax.errors import EngramError
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.server.engine import Engine
from engram_jax.inference.server.job import Done, Failed, Job
from engram_jax.inference.server.slots import TOP


def warm(engine: Engine) -> None:
  """Runs a request of each kind through a running engine: every shape is then compiled.

  Raises EngramError if one fails: a server that cannot answer should not start.
  """
  capacity, chunk = engine.decoder.capacity, engine.decoder.chunk
  events: queue.SimpleQueue = queue.SimpleQueue()
  lengths, scored = {1, min(chunk, capacity - 1)}, ((0, False), (0, True), (TOP, True))
  for length, (top, score) in itertools.product(lengths, scored):
    job = Job((0,) * length, 1, Sampling(), top=top, score_prompt=score)
    engine.submit([job], lambda _, event: events.put(event))
    while not isinstance(event := events.get(), Done):
      if isinstance(event, Failed):
        raise EngramError(f"the model cannot be run: {event.message}")
