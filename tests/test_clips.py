"""Clips beside each other: what is measured on them, and files that are read back. Pure CPU."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xfuser_fastcache.benchmarks import quality
from xfuser_fastcache.reports import clips, mp4
from xfuser_fastcache.reports.measured import psnr_db


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.8, size=(9, 16, 24, 3))


def test_an_error_that_stands_still_does_not_flicker(clip: np.ndarray) -> None:
    stain = np.random.default_rng(1).uniform(-0.1, 0.1, size=clip.shape[1:])
    assert clips.flicker(clip + stain, clip) < 1e-15
    blinking = np.where(np.arange(9) % 2, 0.1, 0.0)[:, None, None, None]
    assert clips.flicker(clip + blinking, clip) == pytest.approx(0.1)
    # Both are as far from the clip as the other sense of likeness can tell.
    assert psnr_db(clip + 0.1, clip) == pytest.approx(20.0)


def test_frames_are_compared_one_by_one(clip: np.ndarray) -> None:
    other = np.random.default_rng(2).uniform(0.2, 0.8, size=clip.shape)
    worse = clip.copy()
    worse[4] += 0.1
    found = clips.compared_clips([worse, other], [clip, other])
    assert [value is None for value in found["psnr_db_by_frame"]] == [i != 4 for i in range(9)]
    assert found["psnr_db_by_frame"][4] == found["psnr_db"] == pytest.approx(20.0)
    assert found["ssim_by_frame"][3] == 1.0 > found["ssim_by_frame"][4]
    # Two of eight changes of one of two clips are 0.1.
    assert found["flicker"] == pytest.approx(0.5 * 0.1 * np.sqrt(2 / 8))
    assert not found["identical"]
    same = clips.compared_clips([clip], [clip.copy()])
    assert same["identical"] and same["psnr_db"] is None and same["flicker"] == 0.0


@pytest.mark.parametrize("ending", [".webp", ".png"])
def test_a_moving_picture_holds_every_frame_side_by_side(
    tmp_path: Path, clip: np.ndarray, ending: str
) -> None:
    path = tmp_path / f"side{ending}"
    cached = np.clip(clip + 0.05, 0, 1)
    three = [clip, cached, clips.difference(clip, cached)]
    clips.save_animation(three, path, fps=4)
    with Image.open(path) as moving:
        assert moving.n_frames == 9
        assert moving.info["loop"] == 0
        for index in range(9):
            moving.seek(index)
            pixels = np.asarray(moving.convert("RGB"))
            expected = np.concatenate([c[index] for c in three], axis=1)
            assert np.array_equal(pixels, (expected * 255).round().astype(np.uint8))
            assert moving.info["duration"] == 250
    assert list(tmp_path.iterdir()) == [path]


def test_an_mp4_holds_every_frame_at_its_time_and_is_the_same_each_time(clip: np.ndarray) -> None:
    av = pytest.importorskip("av")
    wide = np.broadcast_to(np.linspace(0, 1, 33)[:, None], (9, 16, 33, 3))  # an odd width
    found = mp4.mp4([wide], fps=12.5)
    assert found == mp4.mp4([wide], fps=12.5)
    with av.open(io.BytesIO(found)) as film:
        (stream,) = film.streams
        assert (stream.codec_context.name, stream.average_rate) == ("h264", Fraction(25, 2))
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert np.shape(frames) == (9, 16, 34, 3)
    assert np.abs(np.array(frames)[:, :, :33] / 255 - wide).max() < 0.03
    with pytest.raises(ValueError, match="fps=0"):
        mp4.mp4([clip], fps=0)


def test_without_pyav_webp_alone_is_written_and_a_word_said_once(
    tmp_path: Path,
    clip: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mp4.importlib.util, "find_spec", lambda name: None)
    mp4._say_once.cache_clear()
    with caplog.at_level("WARNING", "xfuser_fastcache"):
        for name in ("one", "two"):
            mp4.save_film([clip], tmp_path / name, fps=8)
    assert {path.name for path in tmp_path.iterdir()} == {"one.webp", "two.webp"}
    (said,) = caplog.messages
    assert "pip install 'xfuser-fastcache[video]'" in said
    with pytest.raises(ValueError, match="mp4 needs PyAV"):
        mp4.mp4([clip], fps=8)


def test_a_sheet_shows_eight_frames_with_both_ends(
    tmp_path: Path, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    sheet = clips.comparison_sheet

    def noted(baseline: np.ndarray, cached: np.ndarray, titles: list[str], path: Path) -> None:
        drawn.append(titles)
        sheet(baseline, cached, titles, path)

    monkeypatch.setattr(clips, "comparison_sheet", noted)
    clips.clip_sheet(clip, clip, tmp_path / "sheet.png")
    assert len(drawn[0]) == 8
    assert (drawn[0][0], drawn[0][-1]) == ("frame 0", "frame 8")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 1500


def test_what_does_not_go_together_is_refused(tmp_path: Path, clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(9, 16, 24, 3\).*\(8, 16, 24, 3\)"):
        clips.flicker(clip, clip[:8])
    with pytest.raises(ValueError, match="at least 2 frames"):
        clips.flicker(clip[:1], clip[:1])
    with pytest.raises(ValueError, match="alike"):
        clips.compared_clips([clip], [clip[:8]])
    with pytest.raises(ValueError, match=r"side.mov.*\.webp"):
        clips.save_animation([clip], tmp_path / "side.mov")
    with pytest.raises(ValueError, match="fps=0"):
        clips.save_animation([clip], tmp_path / "side.webp", fps=0)
    with pytest.raises(ValueError, match="one shape"):
        clips.save_animation([clip, clip[:8]], tmp_path / "side.webp")
    assert not list(tmp_path.iterdir())


def test_clips_of_the_toys_are_marked_and_have_features_of_three_frames() -> None:
    from toys.captions import draw, sample_captions
    from toys.clips import draw_clip, sample_clip_captions

    prompts = sample_clip_captions(6, seed=3)
    drawn = [draw_clip(prompt, 64, i) / 255.0 for i, prompt in enumerate(prompts)]
    found = quality.marks(prompts, drawn)
    assert all(found["passed"]) and np.shape(found["features"]) == (6, 96)
    backwards = [clip[::-1] for clip in drawn]
    turned = quality.marks(prompts, backwards)
    assert not any(turned["passed"])
    thirds = np.reshape(found["features"], (6, 3, 32))
    assert np.allclose(thirds[:, ::-1], np.reshape(turned["features"], (6, 3, 32)), atol=1e-5)
    truth = quality.drawn_features(prompts)
    assert truth is not None and truth.shape == (6 * quality.DRAWINGS, 96)
    same, other = (
        quality.frechet_distance(np.array(each["features"]), truth) for each in (found, turned)
    )
    assert same < other
    pictures = [draw(caption, 64, 0) / 255.0 for caption in sample_captions(2)]
    assert np.shape(quality.marks(sample_captions(2), pictures)["features"]) == (2, 32)
    assert quality.marks([prompts[0], sample_captions(1)[0]], drawn[:2]) == {}


def test_a_clip_is_compared_frame_by_frame(clip: np.ndarray) -> None:
    worse = clip.copy()
    worse[4] += 0.1
    found = quality.compare([worse], [clip], [worse])
    assert found["mse"] == [pytest.approx(0.01 / 9)] and found["mse_converged"] == [0.0]
    assert found["ssim"] == [pytest.approx(clips.compared_clips([worse], [clip])["ssim"])]
    assert found["flicker"] == [pytest.approx(0.1 * np.sqrt(2 / 8))]
    assert "flicker" not in quality.compare([clip[0]], [clip[0]], [clip[0]])
