"""Configs: files that extend one another, overrides, and refusals that name what is wrong."""

import pathlib

import pytest
import yaml

import engram_jax
from engram_jax.config import Config, fields, load_config
from engram_jax.errors import ConfigError

CONFIGS = pathlib.Path(engram_jax.__file__).parents[1] / "configs"

# Each row: what is overridden in the default config, and words that its refusal must hold.
CONTRADICTIONS = [
  ({"model.engram.layers": [4]}, ["engram.layers", "block 4", "layers=4", "0..3"]),
  ({"model.engram.layers": [2, 1]}, ["layers=[2, 1]", "rising", "[1, 2]"]),
  ({"model.engram.layers": [1, 1]}, ["layers=[1, 1]", "twice"]),
  ({"model.engram.layers": [-1]}, ["model.engram.layers", "got -1"]),
  ({"model.engram.rows_per_head": [5, 7, 11]}, ["rows_per_head", "3 numbers", "max_ngram=3"]),
  ({"model.engram.rows_per_head": 2**30}, ["int32", "heads=8", "2,147,483,647"]),
  ({"model.engram.max_ngram": 1}, ["model.engram.max_ngram", "2", "got 1"]),
  ({"model.engram.max_ngram": 9}, ["model.engram.max_ngram", "8", "got 9"]),
  (
    {"model.engram.layers": [1], "model.engram.pad_id": 4096},
    ["pad_id=4096", "vocab_size=4096"],
  ),
  ({"model.engram.gate": "relu"}, ["model.engram.gate", "signed_sqrt", "'relu'"]),
  ({"model.engram.dialect": "gram"}, ["model.engram.dialect", "deepseek_v41", "'gram'"]),
  ({"model.moe.top_k": 17}, ["top_k=17", "routed_experts=16"]),
  ({"model.moe.leading_dense_layers": 5}, ["leading_dense_layers=5", "layers=4"]),
  ({"model.moe.route_scale": float("nan")}, ["model.moe.route_scale", "finite"]),
  ({"model.attention.rope_dim": 15}, ["rope_dim=15", "even"]),
  ({"model.attention.rope_base": 1.0}, ["model.attention.rope_base", "got 1.0"]),
  ({"model.attention.yarn.alpha": 32.0}, ["alpha=32.0", "beta=32.0"]),
  (
    {"model.attention.yarn.scale": 2.0, "model.attention.yarn.original_length": 64},
    ["data.sequence_length=256", "128"],
  ),
  ({"model.residual.branches": 0}, ["model.residual.branches", "got 0"]),
  ({"model.vocab_size": 259}, ["model.vocab_size=259", "260"]),
  ({"model.width": 0}, ["model.width", "got 0"]),
  ({"data.source": "jsonl"}, ["source='jsonl'", "data.path"]),
  ({"data.path": "texts"}, ["path='texts'", "source='wiki'", "jsonl"]),
  ({"data.sequence_length": 1}, ["data.sequence_length", "2", "got 1"]),
  ({"data.validation_fraction": 1.0}, ["data.validation_fraction", "got 1.0"]),
  ({"train.accumulate": 3}, ["batch_size=16", "accumulate=3"]),
  ({"train.schedule.decay_at": [0.5]}, ["decay_at=[0.5]", "decay_to=[0.316, 0.1]", "length"]),
  ({"train.schedule.decay_at": [0.9, 0.8]}, ["decay_at=[0.9, 0.8]", "rising"]),
  ({"train.optimizer.beta2": 1.0}, ["train.optimizer.beta2", "1", "got 1.0"]),
  ({"train.optimizer.learning_rate": 0.0}, ["train.optimizer.learning_rate", "got 0.0"]),
  ({"train.sample_prompt": ""}, ["sample_prompt=''", "sample_tokens=40"]),
  ({"train.steps": 2.5}, ["train.steps", "integer", "got 2.5"]),
  ({"run.name": "../elsewhere"}, ["run.name", "'../elsewhere'"]),
]


def write(path: pathlib.Path, text: str) -> pathlib.Path:
  path.write_text(text)
  return path


def refusal(path: pathlib.Path | None, overrides: dict | None = None) -> str:
  with pytest.raises(ConfigError) as caught:
    load_config(path, overrides)
  assert caught.value.exit_code == 2
  return str(caught.value)


@pytest.mark.parametrize(("overrides", "words"), CONTRADICTIONS, ids=lambda x: next(iter(x)))
def test_a_contradiction_is_refused_with_its_fields_and_numbers(overrides, words):
  message = refusal(None, overrides)
  assert [word for word in words if word not in message] == []


def test_every_mistake_of_a_file_is_named(tmp_path):
  path = write(tmp_path / "c.yaml", "model: {width: -1, moe: {top_k: 0}}\ntrain: {steps: soon}\n")
  message = refusal(path)
  assert len(message.splitlines()) == 3
  for word in (str(path), "model.width", "model.moe.top_k", "train.steps", "'soon'"):
    assert word in message


@pytest.mark.parametrize(
  ("key", "nearest"),
  [
    ("model.wdith", "model.width"),
    ("model.engram.row_per_head", "model.engram.rows_per_head"),
    ("model.row_width", "model.engram.row_width"),
    ("train.learning_rate", "train.optimizer.learning_rate"),
    ("data.sequence_lenght", "data.sequence_length"),
  ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
  assert f"did you mean {nearest!r}?" in refusal(None, {key: 1})
  tree = 1
  for part in reversed(key.split(".")):
    tree = {part: tree}
  message = refusal(write(tmp_path / "c.yaml", yaml.safe_dump(tree)))
  assert repr(key) in message
  assert f"did you mean {nearest!r}?" in message


def test_a_key_like_no_other_is_refused_without_a_guess():
  assert refusal(None, {"zzzzzzzz": 1}) == "unknown key 'zzzzzzzz'"


def test_overrides_lie_over_a_file_and_a_file_over_the_one_it_extends(tmp_path):
  write(tmp_path / "a.yaml", "model: {width: 64, layers: 3}\ntrain: {steps: 50}\n")
  (tmp_path / "sub").mkdir()
  b = write(tmp_path / "sub" / "b.yaml", "extends: ../a.yaml\nmodel: {width: 32}\n")
  cfg = load_config(b, {"model.vocab_size": 512, "train.steps": 60})
  assert (cfg.model.width, cfg.model.layers) == (32, 3)
  assert (cfg.model.vocab_size, cfg.train.steps) == (512, 60)
  assert load_config(b).train.steps == 50
  assert load_config(b).model.moe == Config().model.moe


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_survives_the_trip_through_yaml(tmp_path, path):
  cfg = load_config(path)
  assert load_config(write(tmp_path / "c.yaml", cfg.to_yaml())) == cfg
  leaves = yaml.safe_load(cfg.to_yaml())
  for name in fields():  # every field is written out: no later default can change a run's meaning
    node = leaves
    for part in name.split("."):
      node = node[part]


def test_one_number_of_rows_serves_every_order():
  cfg = load_config(None, {"model.engram.max_ngram": 4, "model.engram.rows_per_head": 101})
  assert cfg.model.engram.rows_per_head == (101, 101, 101)
  each = load_config(None, {"model.engram.max_ngram": 4, "model.engram.rows_per_head": [5, 7, 11]})
  assert each.model.engram.rows_per_head == (5, 7, 11)


def test_a_config_cannot_be_changed_in_place():
  with pytest.raises(ValueError, match="frozen"):
    Config().model.width = 5


def test_a_missing_file_is_named(tmp_path):
  assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"
  child = write(tmp_path / "c.yaml", "extends: gone.yaml\n")
  assert "gone.yaml: no such config file" in refusal(child)


@pytest.mark.parametrize("text", ["model: {width: 3", "a: b: c", "\tx: 1"])
def test_what_is_not_yaml_is_refused_with_its_place(tmp_path, text):
  message = refusal(write(tmp_path / "c.yaml", text))
  assert "c.yaml: not YAML" in message
  assert "line" in message


def test_what_is_not_a_mapping_or_not_text_is_refused(tmp_path):
  assert "mapping of keys, not list" in refusal(write(tmp_path / "l.yaml", "- 1\n- 2\n"))
  (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
  assert "b.yaml: cannot be read" in refusal(tmp_path / "b.yaml")
  assert "cannot be read" in refusal(tmp_path)
  assert "'model' is not a section" in refusal(
    write(tmp_path / "m.yaml", "model: 3\n"), {"model.width": 4}
  )


def test_files_that_extend_one_another_in_a_circle_are_refused(tmp_path):
  a = write(tmp_path / "a.yaml", "extends: b.yaml\n")
  write(tmp_path / "b.yaml", "extends: a.yaml\n")
  message = refusal(a)
  assert "extends itself" in message
  assert "b.yaml" in message
  own = write(tmp_path / "own.yaml", "extends: own.yaml\n")
  assert "extends itself" in refusal(own)


def test_yaml_runs_no_code(tmp_path):
  trace = tmp_path / "trace"
  text = f"run: !!python/object/apply:pathlib.Path.touch [!!python/name:pathlib.Path '{trace}']\n"
  assert "not YAML" in refusal(write(tmp_path / "c.yaml", text))
  text = f"run: {{name: !!python/object/apply:os.mkdir ['{trace}']}}\n"
  assert "not YAML" in refusal(write(tmp_path / "d.yaml", text))
  assert not trace.exists()
