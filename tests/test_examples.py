"""The demo of examples/ draws what it shows. CPU; the page itself needs gradio and is not built."""

from __future__ import annotations

import runpy

import numpy as np
from support.worlds import ROOT


def test_the_demo_draws_both_pictures_and_leaves_no_cache() -> None:
    demo = runpy.run_path(str(ROOT / "examples" / "gradio_demo.py"))
    model = str(ROOT / "toys" / "flux")
    drawn = demo["draw"](model, "cpu", demo["CAPTION"], "Fast", 8, 3, 0)
    before, after, apart, heat_map, said = drawn
    assert before.size == after.size == apart.size == (128, 128)
    assert np.asarray(apart).any() and heat_map.size[0] > 100
    assert "62% of blocks skipped" in said
    assert not demo["pipeline"](model, "cpu").transformer.is_cache_enabled
