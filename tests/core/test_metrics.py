"""metrics.jsonl holds every step once, whatever happened to the process that wrote it."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.core.metrics import NAME, MetricsWriter
from engram_jax.core.profiling import matmul_peak
from engram_jax.errors import StorageError


def lines(directory):
  return [json.loads(line) for line in (directory / NAME).read_text().splitlines()]


def fill(directory, steps):
  with MetricsWriter(directory, tensorboard=False, resume_step=None) as metrics:
    for step in steps:
      metrics.write(step, {"loss": 1 / step})


def test_a_line_is_there_when_write_returns(tmp_path):
  metrics = MetricsWriter(tmp_path / "run", tensorboard=False, resume_step=None)
  metrics.write(1, {"loss": jnp.float32(0.5), "rows": np.int64(3), "gate": jnp.bfloat16(0.25)})
  assert lines(tmp_path / "run") == [{"step": 1, "loss": 0.5, "rows": 3, "gate": 0.25}]
  metrics.close()


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path):
  with MetricsWriter(tmp_path, tensorboard=True, resume_step=None) as metrics:
    metrics.write(1, {"loss": math.nan, "norm": jnp.float32(-jnp.inf), "rate": 0.1})
  (text,) = (tmp_path / NAME).read_text().splitlines()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "step": 1,
    "loss": None,
    "norm": None,
    "rate": 0.1,
    "nonfinite": {"loss": "nan", "norm": "-inf"},
  }


@pytest.mark.parametrize("value", ["0.5", None, [1.0], np.zeros(0)])
def test_only_numbers_are_written(tmp_path, value):
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
    with pytest.raises((TypeError, ValueError)):
      metrics.write(1, {"loss": value})
    assert lines(tmp_path) == []


def test_a_resumed_run_drops_what_it_measures_again(tmp_path):
  fill(tmp_path, range(1, 8))
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=5) as metrics:
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    metrics.write(6, {"loss": 0.0})
  assert lines(tmp_path)[-1] == {"step": 6, "loss": 0.0}
  MetricsWriter(tmp_path, tensorboard=False, resume_step=None).close()
  assert lines(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 10, 18])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
  fill(tmp_path, [1, 2, 3])
  whole = (tmp_path / NAME).read_bytes()
  (tmp_path / NAME).write_bytes(whole[:-cut])
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=9) as metrics:
    metrics.write(3, {"loss": 1 / 3})
  assert (tmp_path / NAME).read_bytes() == whole


def test_a_damaged_line_is_told_and_kept(tmp_path):
  fill(tmp_path, [1, 2, 3])
  text = (tmp_path / NAME).read_text().replace('{"step": 2', '{"step"; 2')
  (tmp_path / NAME).write_text(text)
  with pytest.raises(StorageError, match=r"metrics.jsonl line 2 is damaged"):
    MetricsWriter(tmp_path, tensorboard=False, resume_step=3)
  assert (tmp_path / NAME).read_text() == text


def test_an_unwritable_folder_is_a_storage_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(StorageError, match="cannot be written"):
    MetricsWriter(tmp_path / "file" / "run", tensorboard=False, resume_step=None)


def test_tensorboard_has_the_scalars_and_texts_and_forgets_what_is_measured_again(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  for resume_step in (None, 4):
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=resume_step) as metrics:
      metrics.write(5, {"loss": 0.5, "eval/loss": 2.0})
      metrics.text(5, "sample", "The capital of France is")
    newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    events = [Event.FromString(record) for record in records(newest.read_bytes())]
    values = {value.tag: value for event in events for value in event.summary.value}
    assert values["loss"].simple_value == 0.5
    assert values["eval/loss"].simple_value == 2.0
    assert values["sample/text_summary"].tensor.string_val == [b"The capital of France is"]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [0 if resume_step is None else 5]


def records(data: bytes):
  """The payloads of a TFRecord file: length (8 bytes), its checksum (4), payload, checksum (4)."""
  while data:
    size = int.from_bytes(data[:8], "little")
    yield data[12 : 12 + size]
    data = data[16 + size :]


def test_the_measured_peak_is_a_speed():
  speed = matmul_peak(size=256, seconds=0.05)
  assert 1e8 < speed < 1e15
  assert matmul_peak(jnp.bfloat16, size=64, seconds=0.0) > 0
