"""xDiT's parallel VAE (`--use_parallel_vae`) decodes what cached ranks have drawn.

pytest -m slow tests/test_parallel_vae.py
"""

from __future__ import annotations

import pytest
from support.worlds import run_world


@pytest.mark.slow
@pytest.mark.gloo
def test_a_cached_picture_is_decoded_by_all_ranks() -> None:
    reports = run_world("parallel_vae_worker.py", 2)
    assert {rank["decoder"] for rank in reports.values()} == {"DecoderAdapter"}
    assert [rank for rank in reports if reports[rank]["has_output"]] == [0]
    assert all(rank["threshold_0_exact"] for rank in reports.values())
    assert len({rank["hits"] for rank in reports.values()}) == 1
    assert reports[0]["hits"] > 0
    assert reports[0]["psnr"] > 25
