"""Does lm_eval, through the server, score what a full forward pass scores?

    python benchmarks/harness.py --run runs/small --to tasks
    python -m engram_jax serve --run runs/small --port 8000
    lm_eval --model local-completions --include_path tasks --tasks nextline,rolling \\
      --batch_size 4 --model_args model=small,tokenizer=tasks,max_length=1024,base_url=$URL

with URL=http://127.0.0.1:8000/v1/completions.

The first writes two tasks for lm_eval (pip install 'lm_eval[api]' transformers; the last command
from the folder that holds `tasks`), on code of Python's standard library: which of four lines comes
next, and bits per byte of a text. It prints the scores by full forward passes without a cache; the
last prints the server's.
"""

import argparse
import json
import math
import pathlib
import random
import shutil
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.core.run_directory import TOKENIZER
from engram_jax.inference.load import LoadedModel, load_model
from engram_jax.memory.table import lookup_reference
from engram_jax.memory.vocabulary import read_tokenizer, stacked_row_ids

LINES = "lines.jsonl"
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {lines}}}}}
test_split: test
"""
TASKS = {
  "nextline": """task: nextline
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "rolling": """task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", type=pathlib.Path, required=True, help="a folder train.py wrote")
  parser.add_argument(
    "--to", type=pathlib.Path, required=True, help="a folder to make, for lm_eval"
  )
  parser.add_argument("--count", type=int, default=100, help="texts")
  args = parser.parse_args()
  texts = make_texts(args.count)
  args.to.mkdir()
  (args.to / LINES).write_text("".join(json.dumps(text) + "\n" for text in texts))
  for name, content in TASKS.items():
    (args.to / f"{name}.yaml").write_text(content + COMMON.format(lines=args.to / LINES))
  shutil.copy(args.run / TOKENIZER, args.to / "tokenizer.json")
  form = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
  (args.to / "tokenizer_config.json").write_text(json.dumps(form))
  print(json.dumps(scores(load_model(args.run, None, print), args.run, texts)))


def make_texts(count: int) -> list[dict]:
  """Twelve lines of code, the one that follows, and it among three that follow others."""
  draw, found = random.Random(0), []
  for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    lines = path.read_text(errors="ignore").splitlines()
    for i in range(60, len(lines), 97):
      if len(lines[i].strip()) >= 12:
        found.append(("\n".join(lines[i - 12 : i]) + "\n", lines[i]))
  draw.shuffle(found)
  found, texts = found[:count], []
  for n, (before, line) in enumerate(found):
    choices = [found[(n + k) % count][1] for k in (1, 2, 3)]
    gold = draw.randrange(4)
    choices.insert(gold, line)
    texts.append({"ctx": before, "choices": choices, "gold": gold, "text": before + line})
  return texts


def scores(opened: LoadedModel, run: pathlib.Path, texts: list[dict]) -> dict[str, float]:
  tokenizer = read_tokenizer(run / TOKENIZER)
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  end = tokenizer.token_to_id("<|endoftext|>")
  logprobs = make_logprobs(opened)
  right = right_per_byte = nats = size = 0
  for text in texts:
    # lm_eval moves blanks from the end of what is given to the start of what is scored.
    given, each = len(encode(text["ctx"].rstrip())), []
    for choice in text["choices"]:
      each.append(logprobs(encode(text["ctx"] + choice))[given - 1 :].sum())
    right += int(np.argmax(each)) == text["gold"]
    lengths = [len(choice) for choice in text["choices"]]
    right_per_byte += int(np.argmax(np.divide(each, lengths))) == text["gold"]
    nats -= logprobs([end, *encode(text["text"])]).sum()
    size += len(text["text"].encode())
  return {
    "acc": right / len(texts),
    "acc_norm": right_per_byte / len(texts),
    "bits_per_byte": round(float(nats / size / math.log(2)), 4),
  }


def make_logprobs(opened: LoadedModel, longest: int = 1024):
  """ids -> the log-probability [n - 1] of each after those before it."""
  w, tables = opened.weights, tuple(map(jnp.asarray, opened.tables()))

  @jax.jit
  def run(tokens_BT, rows):
    model = nnx.merge(w.graphdef, nnx.State(w.params), nnx.State(w.biases))
    hidden_BTD, _ = model(tokens_BT, rows)
    logits_BTV = model.logits(hidden_BTD)[..., : len(w.compressor.table)]
    return jax.nn.log_softmax(logits_BTV.astype(jnp.float32))

  def score(ids: list[int]) -> np.ndarray:
    assert len(ids) <= longest, f"a text of {len(ids)} tokens"
    tokens_BT = np.zeros((1, 1 << (len(ids) - 1).bit_length()), np.int32)
    tokens_BT[0, : len(ids)] = ids
    each = zip(tables, stacked_row_ids(w.layout, w.compressor, tokens_BT), strict=True)
    rows = tuple(lookup_reference(t, i) for t, i in each)
    return np.asarray(run(tokens_BT, rows))[0][np.arange(len(ids) - 1), ids[1:]]

  return score


if __name__ == "__main__":
  main()
