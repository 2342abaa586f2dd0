"""The toys' grammar, pictures and checker: pure CPU, no model."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from toys.captions import (
    ATTRIBUTES,
    VALUES,
    Caption,
    all_captions,
    draw,
    sample_captions,
)
from toys.checker import check_caption, read_picture


def test_grammar_is_complete_and_round_trips():
    captions = all_captions()
    assert len(captions) == 3 * 8 * 6 * 9 * 6 == len(set(map(str, captions)))
    for caption in captions[::97]:
        assert Caption.parse(str(caption)) == caption
        assert Caption.parse(f"  {str(caption).upper()} ") == caption


def test_splits_are_disjoint_and_a_tenth_is_unseen():
    train, unseen = set(all_captions("train")), set(all_captions("unseen"))
    assert not train & unseen
    assert train | unseen == set(all_captions())
    assert 0.08 < len(unseen) / len(train | unseen) < 0.12
    # Every value occurs in training, so that an unseen caption is a new combination only.
    for name, values in VALUES.items():
        assert {getattr(c, name) for c in train} == set(values)


def test_samples_repeat_by_seed_and_stay_in_their_split():
    first = sample_captions(100, seed=1, split="unseen")
    assert first == sample_captions(100, seed=1, split="unseen")
    assert first != sample_captions(100, seed=2, split="unseen")
    assert len(set(first)) == 100
    assert {Caption.parse(c).split for c in first} == {"unseen"}


@pytest.mark.parametrize("size_px", [64, 128])
def test_checker_passes_drawn_pictures(size_px):
    captions = sample_captions(300, seed=5, split="all")
    passed = [check_caption(draw(c, size_px, i), c).passed for i, c in enumerate(captions)]
    assert np.mean(passed) >= 0.98


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_checker_fails_the_wrong_attribute_only(attribute):
    for index, caption in enumerate(all_captions()[::311]):
        values = VALUES[attribute]
        other = values[(values.index(getattr(caption, attribute)) + 1) % len(values)]
        wrong = dataclasses.replace(caption, **{attribute: other})
        result = check_caption(draw(caption, 128, index), wrong)
        assert not result.passed
        assert not getattr(result, attribute)
        assert getattr(result.reading, attribute) == getattr(caption, attribute)
        assert all(getattr(result, a) for a in ATTRIBUTES if a != attribute)


def test_checker_sees_nothing_in_noise_or_flat_colour():
    noise = np.random.default_rng(0).integers(0, 256, size=(128, 128, 3), dtype=np.uint8)
    assert read_picture(noise).shape is None and read_picture(noise).size is None
    flat = read_picture(np.full((128, 128, 3), 242, dtype=np.uint8))
    assert flat.shape is None and flat.colour is None and flat.background == "white"


def test_two_shapes_are_not_one():
    left = draw("a medium red square, left, on black", 128)
    right = draw("a medium red square, right, on black", 128)
    assert read_picture(left).shape == "square"
    assert read_picture(np.maximum(left, right)).shape is None


def test_checker_takes_pil_and_float_pictures():
    caption = "a large green diamond, bottom left, on gray"
    picture = draw(caption, 128, 0)
    assert check_caption(Image.fromarray(picture), caption).passed
    assert check_caption(picture.astype(np.float32) / 255.0, caption).passed


def test_the_seed_moves_the_picture_but_not_its_truth():
    caption = "a small cyan triangle, top right, on dark green"
    first, again, other = draw(caption, 128, 0), draw(caption, 128, 0), draw(caption, 128, 1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert check_caption(first, caption).passed and check_caption(other, caption).passed


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="red.*orange"):
        Caption("large", "mauve", "ring", "top", "black")
    with pytest.raises(ValueError, match="a SIZE COLOUR SHAPE, PLACE, on BACKGROUND"):
        Caption.parse("a cat on a mat")
    with pytest.raises(ValueError, match="train.*unseen.*all"):
        all_captions("test")
    with pytest.raises(ValueError, match="0 or more"):
        sample_captions(-1)
    with pytest.raises(ValueError, match="16 or more"):
        draw("a small red ring, top, on black", 8)
    with pytest.raises(ValueError, match="RGB"):
        read_picture(np.zeros((64, 64), dtype=np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        read_picture(np.zeros((64, 64, 3), dtype=np.int64))
