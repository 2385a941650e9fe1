# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Engram by hand
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/engram-jax/engram_jax/blob/main/colab/tour.ipynb)
#
# Engram (arXiv 2601.07372) gives a language model a table to look things up in: the last few tokens
# are hashed, the hash names rows, and a gate decides how much of them to use. Here each step is
# done by hand beside the library; then a small model is trained, and its gates coloured over text.

# %%
import importlib.util
import os
import pathlib
import subprocess
import sys

URL = "https://github.com/engram-jax/engram_jax"
here = pathlib.Path.cwd()
if importlib.util.find_spec("engram_jax") is None:
  # A clone and not only `pip install git+URL`: train.py and configs/ are not in the package.
  checkout = here / "engram_jax_checkout"
  if not checkout.exists():
    subprocess.run(["git", "clone", "--depth", "1", URL, str(checkout)], check=True)
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{checkout}[colab]"], check=True)
places = (here, *here.parents, here / "engram_jax_checkout")
repository = next(place for place in places if (place / "configs" / "tiny.yaml").exists())
print(repository.name)

# %%
# ruff: noqa: E402 (the cell above installs what this one imports)
import contextlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from IPython.display import HTML, Image, display

from engram_jax.analysis.gates import gates_html, gates_png
from engram_jax.config import load_config
from engram_jax.core.run_directory import TOKENIZER
from engram_jax.data.pipeline import prepare
from engram_jax.memory.engram import Engram
from engram_jax.memory.hashing import hash_ids_numpy
from engram_jax.memory.table import init_table, lookup
from engram_jax.tables.saved_run import load_run
from engram_jax.training.state import make_setup, restore_state

# %% [markdown]
# ## Text to canonical ids
#
# Case, accents and surrounding space do not matter to the memory: such tokens share a canonical id.

# %%
cfg = load_config(repository / "configs" / "tiny.yaml")
data = prepare(cfg)
tokenizer, compressor = data.vocabulary.tokenizer, data.vocabulary.compressor
text = "The city of Paris; the City of paris"
tokens = tokenizer.encode(text).ids
canonical = compressor(np.array(tokens)).tolist()
for token, x in zip(tokens, canonical, strict=True):
  print(f"{tokenizer.decode([token])!r:12} token {token:5}  canonical {x:5}")

# %% [markdown]
# ## Suffix n-grams, and their hash
#
# Each position multiplies its last n canonical ids by one odd number each, XORs the products and
# takes the remainder by a prime, another for each head. Before the start stands the pad id.

# %%
layout, layer = data.vocabulary.layout, data.vocabulary.layout.layers[0]
multipliers, primes = layout.multipliers[layer], layout.primes[layer]
by_hand = []
for t in range(len(canonical)):
  row = []
  for n in range(2, layout.max_ngram + 1):
    mix = 0
    for i in range(n):
      x = canonical[t - i] if t >= i else layout.pad_id
      mix ^= x * int(multipliers[i])
    row += [mix % int(prime) for prime in primes[n - 2]]
  by_hand.append(row)
ids_BTJ = hash_ids_numpy(layout, layer, np.array([canonical]))
print("by hand", by_hand[-1])
print("library", ids_BTJ[0, -1].tolist())
assert by_hand == ids_BTJ[0].tolist()

# %% [markdown]
# ## Rows
#
# All heads share one table; an offset for each head turns hash ids into row ids.

# %%
engram_cfg = cfg.model.engram
row_ids_BTJ = ids_BTJ + np.asarray(layout.offsets[layer], np.int32)
table_RC = init_table(
  jax.random.key(0), layout.rows[layer], engram_cfg.row_width, std=1.0, dtype=jnp.float32
)
rows_BTJC = np.asarray(lookup(table_RC, jnp.asarray(row_ids_BTJ)))
assert np.array_equal(rows_BTJC, np.asarray(table_RC)[row_ids_BTJ])
rows_BTM = rows_BTJC.reshape(1, len(tokens), -1)
print("table", table_RC.shape, "row ids", row_ids_BTJ.shape, "rows", rows_BTM.shape)

# %% [markdown]
# ## The gate
#
# $s = \mathrm{RMSNorm}(h) \cdot \mathrm{RMSNorm}(W_K e) / \sqrt{D}$ and
# $\alpha = \sigma(\mathrm{sign}(s) \sqrt{|s|})$, for each branch of the residual stream.

# %%
G, D = cfg.model.residual.branches, cfg.model.width
engram = Engram(engram_cfg, D, G, rngs=nnx.Rngs(0))
hidden_BTGD = np.random.default_rng(0).normal(size=(1, len(tokens), G, D)).astype(np.float32)


def rms_norm(x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + engram_cfg.norm_eps)


key_BTGD = np.einsum("btm,mgd->btgd", rows_BTM, np.asarray(engram.w_key[...]))
s_BTG = np.sum(rms_norm(hidden_BTGD) * rms_norm(key_BTGD), -1) / np.sqrt(D)
root_BTG = np.sign(s_BTG) * np.sqrt(np.maximum(np.abs(s_BTG), 1e-6))
gate_BTG = 1 / (1 + np.exp(-root_BTG))
_, probes = engram(jnp.asarray(hidden_BTGD), jnp.asarray(rows_BTM))
print("by hand", gate_BTG[0, -1])
print("library", np.asarray(probes["gate"])[0, -1])
np.testing.assert_allclose(gate_BTG, probes["gate"], atol=2e-3)

# %% [markdown]
# ## Training `tiny`
#
# About five minutes on two cores. `ENGRAM_TOUR_STEPS` sets the steps; below 50, to try the notebook
# out, batches are smaller too.

# %%
steps = int(os.environ.get("ENGRAM_TOUR_STEPS", "300"))
root = pathlib.Path(tempfile.mkdtemp())
overrides = {"run.root": root, "run.name": "tour", "train.steps": steps}
overrides |= {"train.eval_batches": 1, "train.sample_tokens": 8}
if steps < 50:
  overrides |= {"train.batch_size": 4, "data.sequence_length": 64}
  overrides |= {"train.schedule.warmup_steps": 1}
command = [sys.executable, "train.py", "--config", "configs/tiny.yaml"]
command += [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
print((done.stdout + done.stderr)[-3000:])
done.check_returncode()

# %%
with load_run(root / "tour", None, print) as saved:
  words = saved.config.data.model_copy(update={"tokenizer": str(saved.path / TOKENIZER)})
  cfg = saved.config.model_copy(update={"data": words})
  data = prepare(cfg)
  tokenizer = data.vocabulary.tokenizer
  setup = make_setup(cfg, data.vocabulary.layout)
  state = restore_state(saved.checkpoints, saved.step, setup)
print("step", saved.step)

# %% [markdown]
# ## Gates over validation text
#
# The mean over the branches; the deeper the red, the more of the memory a token takes.


# %%
@jax.jit
def gates(state, batch):
  model = setup.model(state.params, state.biases)
  rows = setup.tables.lookup(state.tables, setup.tables.batch_ids(batch))
  _, probes = model(
    batch["tokens"],
    tuple(rows.values()),
    segments_BT=batch["segments"],
    positions_BT=batch["positions"],
  )
  return probes["gate"][0].mean(-1)


with contextlib.closing(data.validation_pipeline(batch_size=4).iterate()) as batches:
  batch = next(batches)
gate_BT = np.asarray(gates(state, batch), np.float32)
for tokens_T, gate_T in zip(batch["tokens"], gate_BT, strict=True):
  pieces = [tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens_T]
  display(HTML(gates_html(pieces[:64], gate_T[:64])))
picture = root / "gates.png"
gates_png(pieces[:48], gate_T[:48], picture)
display(Image(filename=str(picture)))
print("gates: mean", gate_BT.mean(), "lowest", gate_BT.min(), "highest", gate_BT.max())

# %% [markdown]
# ## What this shows, and what it does not
#
# Before training every gate is near one half, and a few steps hardly move it. Five minutes on a few
# megabytes of text are enough to make gates differ between tokens, not for the clear picture of
# the paper's much larger models, where they open at the ends of names and fixed phrases. A wide
# gate says that the context agrees with the row, not that the row helps: for that, compare the
# losses with the memory on and off (`python eval.py --run ...`).
