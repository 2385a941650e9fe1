"""metrics.jsonl holds every step once, whatever happened to the process that wrote it."""

import contextlib
import hashlib
import json
import math
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.core.metrics import DAMAGED, LOST, NAME, MetricsWriter, last_step
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


@pytest.mark.parametrize(
  "line",
  [
    '{"step"; 2, "loss": 0.5}',
    '{"step": "5", "loss": 0.5}',
    '{"step": true}',
    '{"step": 2.0}',
    '{"step": -1}',
    '{"step": null}',
    "[2]",
    "5",
    "",
    "[" * 100_000,
    "9" * 5_000,
  ],
  ids=lambda line: line[:20],
)
def test_a_line_that_is_no_metrics_is_told_and_moved_away(tmp_path, line):
  """Whatever became of an early line, it never keeps a run from resuming."""
  fill(tmp_path, [1, 3])
  first, last = (tmp_path / NAME).read_text().splitlines(keepends=True)
  (tmp_path / NAME).write_text(first + line + "\n" + last)
  reports = []
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=3, report=reports.append):
    pass
  assert (tmp_path / NAME).read_text() == first + last
  assert (tmp_path / DAMAGED).read_text() == line + "\n"
  assert reports == [f"{tmp_path / NAME}: line 2 is no metrics, and was moved to {DAMAGED}"]


def test_a_changed_bit_in_an_early_line_is_told(tmp_path):
  with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
    metrics.write(1, {"loss": 0.25})
    metrics.write(2, {"loss": 0.5})
    summary = metrics.summary()
    metrics.write(3, {"loss": 0.75})

  def resume() -> list[str]:
    reports = []
    MetricsWriter(
      tmp_path, tensorboard=False, resume_step=2, expected=summary, report=reports.append
    ).close()
    return reports

  assert resume() == []
  changed = (tmp_path / NAME).read_text().replace("0.25", "0.24")
  (tmp_path / NAME).write_text(changed)
  (said,) = resume()
  assert "is not as it was when step 2 was saved" in said
  assert (tmp_path / NAME).read_text() == changed


def test_the_last_step_is_found_in_any_order(tmp_path):
  assert last_step(tmp_path) == 0
  (tmp_path / NAME).write_text('{"step": 3}\n{"step": 20}\nnonsense\n{"step": 4}\n')
  assert last_step(tmp_path) == 20


@contextlib.contextmanager
def file_size_limit(size: int):
  """Within it no file grows beyond this size, as on a full disk: a short write, then none."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_a_full_disk_refuses_are_lost_whole_counted_and_said(tmp_path):
  reports = []
  with MetricsWriter(
    tmp_path, tensorboard=False, resume_step=None, report=reports.append
  ) as metrics:
    metrics.write(1, {"loss": 0.5})
    size = (tmp_path / NAME).stat().st_size
    with file_size_limit(size + 9):
      metrics.write(2, {"loss": 0.25})
      metrics.write(3, {"loss": 0.125})
      assert (tmp_path / NAME).stat().st_size == size
    metrics.write(4, {"loss": 0.0625})
    summary = metrics.summary()
  kept = [{"step": 1, "loss": 0.5}, {"step": 4, "loss": 0.0625, LOST: 2}]
  assert lines(tmp_path) == kept
  assert [said.split(f"{NAME} ")[1] for said in reports] == [
    "cannot be written: no room for all of it; training goes on without the line",
    "is written again; 2 lines are lost",
    "lacks 2 lines, which could not be written",
  ]
  content = (tmp_path / NAME).read_bytes()
  assert summary == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_events_that_a_full_disk_refuses_end_nothing_and_later_ones_are_read(tmp_path):
  """tensorboardX's own writer ends its thread then, and the eleventh event waits for ever."""
  reports = []
  with MetricsWriter(
    tmp_path, tensorboard=True, resume_step=None, report=reports.append
  ) as metrics:
    metrics.write(1, {"loss": 1.0})
    (first,) = (tmp_path / "tensorboard").iterdir()
    with file_size_limit(first.stat().st_size + 10):
      for step in range(2, 40):
        metrics.text(step, "sample", "a text that is too long for what is left")
    metrics.text(40, "sample", "room again")
    metrics.write(41, {"loss": 0.5})
  assert [said for said in reports if "tensorboard" in said] == [
    f"{tmp_path / 'tensorboard'} cannot be written: no room for all of it"
  ]
  assert list((tmp_path / "tensorboard").iterdir()) == [first]
  assert scalars(first) == [(1, "loss", 1.0), (40, "sample/text_summary", 0), (41, "loss", 0.5)]


def scalars(path) -> list[tuple[int, str, float]]:
  from tensorboardX.proto.event_pb2 import Event

  events = [Event.FromString(record) for record in records(path.read_bytes())]
  return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]


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
