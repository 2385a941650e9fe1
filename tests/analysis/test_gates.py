"""Gates drawn over text: escaped, one span per token, and a PNG that holds a picture."""

import numpy as np
import pytest

from engram_jax.analysis.gates import gates_html, gates_png

PIECES = ("<b>", "&", ' "x"', "\n", "$a")
GATES = np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32)


def test_one_span_per_token_and_text_escaped():
  page = gates_html(PIECES, GATES)
  assert page.count("<span ") == page.count("</span>") == len(PIECES)
  assert ">&lt;b&gt;</span>" in page
  assert ">&amp;</span>" in page
  assert "&quot;x&quot;" in page


def test_closed_gate_is_white_and_legend_shows_both_ends():
  page = gates_html(("a", "b"), np.array([0.0, 1.0]))
  assert 'style="background:#ffffff">a<' in page
  assert 'style="background:#cc3311">b<' in page
  assert "gate 0" in page


@pytest.mark.parametrize("gates", [[0.5], [0.5, 1.5], [0.5, np.nan], [[0.5, 0.5]]])
def test_gates_that_do_not_fit_are_refused(gates):
  with pytest.raises(ValueError, match="gates"):
    gates_html(("a", "b"), np.array(gates))


def test_png_is_written(tmp_path):
  pytest.importorskip("matplotlib")
  path = tmp_path / "gates.png"
  gates_png(PIECES, GATES, path)
  content = path.read_bytes()
  assert content.startswith(b"\x89PNG\r\n\x1a\n")
  assert len(content) > 5000
