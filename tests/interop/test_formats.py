"""Memories written in a released format: exact where precisions allow, close where they do not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniatures import (
  QWEN,
  qwen_tensors,
  read_folder,
  tokenizer,
  v41_config,
  v41_tensors,
  write_folder,
)

from engram_jax import __main__ as command
from engram_jax.config import load_config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.data.pipeline import prepare
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop import deepseek, qwen
from engram_jax.interop.deepseek import encode_blocks, tensor_name
from engram_jax.interop.reader import MemoryReader
from engram_jax.memory.compress import TokenCompressor
from engram_jax.training.state import init_state, make_setup, save_state

TEXT = "def heappush(heap, item):"
V41 = {"dialect": "deepseek_v41", "conv_kernel": 0, "layers": [0, 1], "row_width": 48}
PLE = {"dialect": "qwen_ple", "conv_norm_eps": 1e-7, "norm_eps": 1e-7, "pad_id": 0}


@pytest.fixture(scope="module")
def export(lab, built, tmp_path_factory):
  """Exports of runs that were never trained, with random numbers in everything, by layout."""

  @functools.cache
  def make(layout):
    engram = V41 if layout == "deepseek_v41" else PLE
    folder = tmp_path_factory.mktemp("layouts")
    where = {"run.root": str(folder), "run.name": "t"}
    cfg = load_config(built.config, where | {f"model.engram.{k}": v for k, v in engram.items()})
    data = prepare(cfg, lambda _: None)
    setup = make_setup(cfg, data.vocabulary.layout)
    state = init_state(setup)
    leaves, tree = jax.tree.flatten((state.params, state.tables.tables))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    params, tables = jax.tree.unflatten(tree, leaves)
    state = state._replace(params=params, tables=state.tables._replace(tables=tables))
    run = cfg.run.directory
    run.mkdir()
    (run / "config.yaml").write_text(cfg.to_yaml())
    (run / "tokenizer.json").write_text(data.vocabulary.tokenizer.to_str())
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
      save_state(checkpoints, 0, setup, state, data.fingerprint() | {"next_batch": 0})
    done = lab.run(command, "convert", "export", "--run", run, "--to", folder / "e")
    assert done.code == 0, done.err
    return folder / "e"

  return make


@pytest.fixture(scope="module")
def write(lab):
  return lambda source, to, layout: lab.run(
    command, "convert", "memory", "--from", source, "--to", to, "--layout", layout
  )


def module(reader: MemoryReader, layer: int) -> dict[str, np.ndarray]:
  return {name: np.asarray(x) for name, x in reader.memory.parameters(layer).items()}


@pytest.mark.parametrize(
  ("layout", "config", "tensors"),
  [
    ("deepseek_v41", v41_config(TokenCompressor.from_tokenizer(tokenizer()).size), v41_tensors()),
    ("qwen_ple", {"text_config": QWEN}, qwen_tensors()),
  ],
  ids=["deepseek_v41", "qwen_ple"],
)
def test_a_memory_written_in_the_format_it_has_keeps_every_value(
  tmp_path, write, layout, config, tensors
):
  write_folder(tmp_path / "a", config, tensors, shards=2)
  done = write(tmp_path / "a", tmp_path / "b", layout)
  assert done.code == 0, done.err
  with MemoryReader(tmp_path / "a") as there, MemoryReader(tmp_path / "b") as here:
    assert here.memory.kind == there.memory.kind == layout
    assert here.memory.layout == there.memory.layout
    assert here.memory.cfg == there.memory.cfg
    for layer in there.layers:
      ids = np.arange(there.memory.layout.rows[layer])
      np.testing.assert_array_equal(here.rows(layer, ids), there.rows(layer, ids))
      written = module(here, layer)
      for name, array in module(there, layer).items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


@pytest.mark.parametrize("layout", ["deepseek_v41", "qwen_ple"])
def test_an_exported_run_in_a_released_format_reads_the_same(tmp_path, export, write, layout):
  source = export(layout)
  done = write(source, tmp_path / "b", layout)
  assert done.code == 0, done.err
  step = 2.0**-4 if layout == "deepseek_v41" else 2.0**-8  # half of the last place
  with MemoryReader(source) as exported, MemoryReader(tmp_path / "b") as converted:
    assert (exported.memory.kind, converted.memory.kind) == ("engram_jax", layout)
    a, b = exported.read(TEXT), converted.read(TEXT)
    assert a.token_ids == b.token_ids
    np.testing.assert_array_equal(a.canonical_ids, b.canonical_ids)
    for layer in exported.layers:
      np.testing.assert_array_equal(a.row_ids[layer], b.row_ids[layer])
      rows = exported.rows(layer, a.row_ids[layer])
      assert_close = np.testing.assert_allclose
      assert_close(converted.rows(layer, b.row_ids[layer]), rows, rtol=step, atol=2.0**-9)
      for name, array in module(exported, layer).items():
        assert_close(module(converted, layer)[name], array, rtol=step, atol=2.0**-8, err_msg=name)
      hidden = jax.random.normal(jax.random.key(1), (1, len(a.token_ids), 2, 16))
      gates = [r.output(layer, hidden, jnp.asarray(rows)[None])[1] for r in (exported, converted)]
      assert_close(*gates, atol=0.1)


@pytest.mark.parametrize(
  ("writer", "field", "value", "message"),
  [
    (deepseek, "conv_kernel", 4, "conv_kernel is 4, and would have to be 0"),
    (deepseek, "reset_at_documents", False, "reset_at_documents is False"),
    (deepseek, "bias", True, "bias is True"),
    (deepseek, "seed", 3, "seed is 3"),
    (deepseek, "gate", "sigmoid", "gate is sigmoid"),
    (deepseek, "rows_per_head", (101, 103), "rows_per_head is [101, 103]"),
    (deepseek, "dialect", "qwen_ple", "dialect is qwen_ple"),
    (qwen, "dialect", "engram", "dialect is engram, and would have to be qwen_ple"),
    (qwen, "conv_kernel", 0, "conv_kernel is 0"),
    (qwen, "conv_norm_eps", 1e-3, "conv_norm_eps is 0.001, and would have to be 1e-07"),
  ],
)
def test_fields_that_a_format_cannot_express_are_refused(export, writer, field, value, message):
  layout = "deepseek_v41" if writer is deepseek else "qwen_ple"
  with MemoryReader(export(layout)) as reader:
    cfg = reader.memory.cfg.model_copy(update={field: value})
    with pytest.raises(ConfigError, match=f"--layout {layout} cannot hold") as caught:
      writer.make_config(dataclasses.replace(reader.memory, cfg=cfg))
  assert message in str(caught.value)


def test_a_refused_conversion_leaves_nothing(tmp_path, export, write):
  done = write(export("deepseek_v41"), tmp_path / "b", "qwen_ple")
  assert done.code == 2
  assert done.err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_blocks_are_scaled_by_the_smallest_power_of_two_that_fits():
  rng = np.random.default_rng(0)
  weight = (rng.normal(size=(70, 45)) * np.exp2(rng.integers(-30, 30, size=(70, 45)))).astype("f4")
  weight[32:64, 32:] = 0
  values, scales = encode_blocks(weight)
  assert (values.shape, scales.shape) == ((70, 45), (3, 2))
  for i in range(3):
    for j in range(2):
      block = np.abs(weight[32 * i : 32 * i + 32, 32 * j : 32 * j + 32])
      scale = float(scales[i, j].astype(np.float32))
      assert block.max() / scale <= 448
      assert block.max() / scale > 224 or (scale == 1 and block.max() == 0)


def test_v41_tensors_have_the_released_names_and_dtypes(tmp_path, export, write):
  assert write(export("deepseek_v41"), tmp_path / "b", "deepseek_v41").code == 0
  dtypes = {name: tensor.dtype for name, tensor in read_folder(tmp_path / "b").items()}
  parts = {"embed.weight": "F8_E4M3", "embed.scale": "F8_E8M0", "q_weight": "BF16"}
  parts |= {"wkv.weight": "F8_E4M3", "wkv.scale": "F8_E8M0", "k_weight": "BF16"}
  expected = {f"layers.{layer}.engram.{part}": d for layer in (0, 1) for part, d in parts.items()}
  assert dtypes == expected


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_numbers_without_an_fp8_encoding_are_refused(export, value):
  with MemoryReader(export("deepseek_v41")) as reader:
    memory = reader.memory
    layer = memory.layout.layers[0]
    good = memory.parameters(layer)
    for name, array in good.items():
      bad = array.copy()
      bad.flat[-1] = value
      broken = dataclasses.replace(memory, parameters=lambda _, bad=good | {name: bad}: bad)
      source = deepseek.make_tensors(broken)[tensor_name(layer, "wkv.weight")]
      with pytest.raises(StorageError, match=f"{name} of block {layer}"):
        list(source.slices())

    class BrokenTable:
      def blocks(self):
        yield np.full((2, memory.cfg.row_width), value, np.float32)

    broken = dataclasses.replace(memory, tables=dict.fromkeys(memory.layout.layers, BrokenTable()))
    for part in ("weight", "scale"):
      source = deepseek.make_tensors(broken)[tensor_name(layer, f"embed.{part}")]
      with pytest.raises(StorageError, match=f"rows of block {layer} hold"):
        list(source.slices())
