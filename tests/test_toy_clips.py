"""The clips' grammar, frames and checker, and what training on them rests on."""

import dataclasses

import numpy as np
import pytest
import torch

from toys.captions import PLACES
from toys.clip_checker import check_clip, read_clip
from toys.clips import (
    ATTRIBUTES,
    FRAMES,
    VALUES,
    ClipCaption,
    all_clip_captions,
    draw_clip,
    sample_clip_captions,
)


@pytest.fixture(scope="module")
def captions():
    return all_clip_captions()


def test_grammar_is_complete_and_round_trips(captions):
    assert len(captions) == 3 * 8 * 6 * 9 * 8 * 6 == len(set(map(str, captions)))
    for caption in captions[::997]:
        assert ClipCaption.parse(str(caption)) == caption
        assert ClipCaption.parse(f"  {str(caption).upper()} ") == caption


def test_splits_are_disjoint_and_a_tenth_is_unseen(captions):
    unseen = {c for c in captions if c.split == "unseen"}
    assert 0.09 < len(unseen) / len(captions) < 0.11
    train = set(captions) - unseen
    for name, values in VALUES.items():
        assert {getattr(c, name) for c in train} == set(values)
    drawn = sample_clip_captions(50, seed=1)
    assert drawn == sample_clip_captions(50, seed=1) != sample_clip_captions(50, seed=2)
    assert len(set(drawn)) == 50
    assert {ClipCaption.parse(c) for c in drawn} <= unseen


def test_checker_passes_drawn_clips(captions):
    chosen = captions[::311]
    passed = [check_clip(draw_clip(c, 64, i), c).passed for i, c in enumerate(chosen)]
    assert np.mean(passed) >= 0.98


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_checker_fails_the_wrong_attribute_only(captions, attribute):
    for index, caption in enumerate(captions[::9001]):
        taken = {getattr(caption, n) for n in (attribute, "start", "end")}
        values = [v for v in VALUES[attribute] if v not in taken]
        wrong = dataclasses.replace(caption, **{attribute: values[index % len(values)]})
        result = check_clip(draw_clip(caption, 128, index), wrong)
        assert not result.passed
        assert not getattr(result, attribute)
        assert getattr(result.reading, attribute) == getattr(caption, attribute)
        assert all(getattr(result, a) for a in ATTRIBUTES if a != attribute)


def test_a_clip_backwards_that_jumps_or_changes_is_no_such_clip():
    caption = "a medium red square moves from left to right, on black"
    clip = draw_clip(caption, 64, 0)
    assert check_clip(clip, caption).passed
    assert not check_clip(clip[::-1], caption).motion
    jumping = np.concatenate([clip[:1]] * 8 + [clip[-1:]])
    result = check_clip(jumping, caption)
    assert result.start and result.end and not result.motion
    other = draw_clip("a medium red circle moves from left to right, on black", 64, 0)
    assert not check_clip(np.concatenate([clip[:4], other[4:5], clip[5:]]), caption).shape
    empty = np.full((FRAMES, 64, 64, 3), 20, dtype=np.uint8)
    assert read_clip(empty).centres is None and not check_clip(empty, caption).motion


def test_the_shape_goes_straight_at_a_constant_speed():
    caption = "a small cyan circle moves from bottom left to top, on white"
    clip = draw_clip(caption, 128)
    centres = np.array([np.argwhere(f[..., 0] < 200).mean(axis=0)[::-1] / 128 for f in clip])
    assert np.allclose(centres[0], PLACES["bottom left"], atol=0.01)
    assert np.allclose(centres[-1], PLACES["top"], atol=0.01)
    steps = np.diff(centres, axis=0)
    assert np.allclose(steps, steps.mean(axis=0), atol=0.005)


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="red.*orange"):
        ClipCaption("large", "mauve", "ring", "top", "left", "black")
    with pytest.raises(ValueError, match="start and end are both 'top'"):
        ClipCaption("large", "red", "ring", "top", "top", "black")
    with pytest.raises(ValueError, match="moves from START to END"):
        ClipCaption.parse("a large red ring, top left, on dark blue")
    with pytest.raises(ValueError, match="train.*unseen.*all"):
        all_clip_captions("test")
    with pytest.raises(ValueError, match="0 or more"):
        sample_clip_captions(-1)
    with pytest.raises(ValueError, match="16 or more"):
        draw_clip("a small red ring moves from top to left, on black", 8)
    with pytest.raises(ValueError, match="3 or more"):
        read_clip(np.zeros((2, 64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def text():
    from toys.training.text import CLIPS, build_text_encoders, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(CLIPS)
    clip, t5 = build_text_encoders(len(tokenizer))
    return {"tokenizer": tokenizer, "clip": clip.eval(), "t5": t5.eval()}


CAPTION = "a small red ring moves from top left to center, on dark blue"


def test_a_clips_words_have_tokens_and_a_pictures_are_as_they_were(text):
    from toys.training.text import PICTURES, build_tokenizer

    tokenizer = text["tokenizer"]
    assert tokenizer.unk_token_id not in tokenizer(CAPTION).input_ids
    pictures = build_tokenizer(PICTURES)
    assert pictures.unk_token_id in pictures(CAPTION).input_ids
    shipped = pictures.from_pretrained("toys/flux/tokenizer", local_files_only=True)
    assert pictures.get_vocab() == shipped.get_vocab()


@torch.no_grad()
def test_a_loss_is_that_of_the_pipelines_own_text_however_much_padding(text, monkeypatch):
    """A model that is trained on 24 tokens sees what Wan's pipeline shows it at 32 and at 512."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    from toys.training.families import Batch, wan_family
    from toys.training.video import build_clip_vae

    torch.manual_seed(0)
    family = wan_family()
    transformer = family.build().eval()
    pipe = family.pipeline(transformer, text, build_clip_vae())
    prompts = [CAPTION, ""]
    latents, noise = torch.randn(2, 2, 12, 5, 16, 16)
    sigma = torch.tensor([0.2, 0.9])
    losses = []
    for length in (32, 512):
        loss = family.loss(
            transformer, text, None, Batch(latents, noise, sigma, prompts, length, 64)
        )
        for block in transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        states = pipe.encode_prompt(prompts, None, False, max_sequence_length=length)[0]
        mixed = (1 - sigma)[:, None, None, None, None] * latents
        mixed = mixed + sigma[:, None, None, None, None] * noise
        velocity = transformer(mixed, 1000 * sigma, states, return_dict=False)[0]
        expected = (velocity - (noise - latents)).square().mean()
        assert torch.allclose(loss, expected, rtol=1e-5)
        losses.append(float(loss))
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_the_loss_is_told_where_the_shape_is_by_the_caption_alone():
    from toys.training.wan import emphasis

    for index, text in enumerate(sample_clip_captions(20, seed=3)):
        caption = ClipCaption.parse(text)
        weights = emphasis(caption, None, (5, 16, 16))
        assert weights.mean().item() == pytest.approx(2.0) and weights.min() == 1.0
        clip = draw_clip(caption, 64, index).astype(float)
        drawn = np.abs(clip - clip[:, :1, :1]).max(axis=-1) > 60
        cells = drawn.reshape(FRAMES, 16, 4, 16, 4).any(axis=(2, 4))
        shown = np.concatenate([cells[:1], cells[1::2] | cells[2::2]])
        assert shown.sum(axis=(1, 2)).min() >= 4
        missed = shown & (weights.numpy() == 1.0)
        assert missed.sum() <= 0.15 * shown.sum()  # cells that it touches, or leaves between frames
        assert torch.equal(emphasis(caption, (0, 3), (5, 16, 16)) > 1, weights[[0, 3]] > 1)


def test_a_locator_asks_each_token_where_it_lies():
    """The loss is none where states say it, whatever is shown of the clip; noise asks more."""
    from toys.training.families import Batch, wan_family

    family = wan_family()
    transformer = family.build()
    locator = family.locator(transformer)
    states = torch.zeros(21, 96)
    states[range(21), range(21)] = 100.0
    with torch.no_grad():
        locator.head.weight.copy_(states[:, :96])
    for moments in (None, (0,), (0, 3)):
        frames = moments or range(5)
        latents = torch.zeros(2, 12, len(frames), 16, 16)
        batch = Batch(latents, latents, torch.tensor([0.2, 0.4]), ["", ""], 32, 64, moments)
        transformer(latents, 1000 * batch.sigma, torch.zeros(2, 4, 64), return_dict=False)
        assert locator.heard.shape == (2, 64 * len(frames), 96)
        lost = locator.loss(batch)
        lost.backward()
        assert transformer.blocks[2].ffn.net[2].weight.grad.abs().sum() > 0
        where = [(f, 5 + r, 13 + c) for f in frames for r in range(8) for c in range(8)]
        locator.heard = torch.zeros(2, len(where), 96)
        for token, said in enumerate(where):
            locator.heard[:, token, list(said)] = 1.0
        assert locator.loss(batch) < 1e-3 < 0.1 < lost
        locator.heard = torch.zeros(2, len(where), 96)
        locator.head.bias.data.zero_()
        chance = 0.3 * (np.log(5) + 2 * np.log(8))
        assert locator.loss(batch).item() == pytest.approx(chance, rel=1e-4)


@pytest.fixture(scope="module")
def vae():
    from argparse import Namespace

    from toys.training.video import start_clip_vae

    return start_clip_vae(Namespace(seed=0, device="cpu"))


@torch.no_grad()
def test_the_encoder_measures_cells(vae):
    """Means, slopes and what moved, of 4 x 4 pixels: known without any training."""
    from toys.training.video import TWO, to_clips

    clip = to_clips([draw_clip(CAPTION, 64, 0)])
    latents = vae.encode(clip).latent_dist.mean
    assert latents.shape == (1, 12, 5, 16, 16)
    cells = clip.unfold(3, 4, 4).unfold(4, 4, 4)
    means = cells.mean((-1, -2))
    colour = torch.tensor(TWO[0])[:, None, None]
    assert torch.allclose(latents[:, :3, 0], means[:, :, 0], atol=0.01)
    assert torch.allclose(latents[:, :3, 1], means[:, :, 1:3].mean(dim=2), atol=0.01)
    ramp = 2 * torch.cos(torch.pi * torch.tensor([1, 3, 5, 7]) / 8)
    across = (cells[0, :, 0] * ramp).mean((-1, -2))
    down = (cells[0, :, 0] * ramp[:, None]).mean((-1, -2))
    assert across.abs().max() > 0.3
    assert torch.allclose(latents[0, 3, 0], (colour * across).sum(0), atol=0.01)
    assert torch.allclose(latents[0, 5, 0], (colour * down).sum(0), atol=0.01)
    moved = (means[0, :, 4] - means[0, :, 3]) / 2
    assert torch.allclose(latents[0, 10, 2], (colour * moved).sum(0), atol=0.01)


@torch.no_grad()
def test_all_frames_at_once_give_what_diffusers_chunks_give(vae):
    from toys.training.video import build_clip_vae, decode_whole, encode_whole, to_clips

    torch.manual_seed(0)
    clips, untrained = to_clips([draw_clip(CAPTION, 32, 0)]), build_clip_vae().eval()
    for made in (vae, untrained):
        latents = made.encode(clips).latent_dist.mean
        assert torch.allclose(encode_whole(made, clips), latents, atol=1e-5)
        assert torch.allclose(
            decode_whole(made, latents).clamp(-1, 1), made.decode(latents).sample, atol=1e-5
        )
    # An untrained decoder repeats the mean of each cell; one that is not so set does not.
    error = (decode_whole(vae, encode_whole(vae, clips)) - clips).abs().mean()
    assert error < 0.2 < (decode_whole(untrained, latents) - clips).abs().mean()


def test_a_glimpse_lies_where_a_whole_clip_has_it():
    from toys.training.families import wan_family
    from toys.training.wan import set_in_time

    rope = wan_family().build().rope
    whole = [table.unflatten(1, (5, 64)) for table in rope(torch.zeros(1, 12, 5, 16, 16))]
    with set_in_time(rope, (0, 3)):
        glimpse = [table.unflatten(1, (2, 64)) for table in rope(torch.zeros(1, 12, 2, 16, 16))]
    for table, part in zip(whole, glimpse, strict=True):
        assert torch.equal(part, table[:, [0, 3]]) and not torch.equal(part, table[:, :2])
    for table, again in zip(whole, rope(torch.zeros(1, 12, 5, 16, 16)), strict=True):
        assert torch.equal(table.flatten(1, 2), again)


def test_muon_turns_updates_into_rotations_of_a_known_size():
    from toys.training.transformer import Muon, orthogonal

    torch.manual_seed(0)
    for shape in ((3, 16, 16), (3, 12, 40), (3, 40, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3
    ours = torch.nn.Parameter(torch.randn(24, 32))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimisers = (
        Muon([ours], lr=1e-2),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(24, 32)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimiser in optimisers:
            optimiser.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved  # theirs is in bfloat16


@torch.no_grad()
def test_the_loss_and_the_pipeline_mean_the_same_velocity(text, monkeypatch):
    """A model that knows the answer has no loss, and the pipeline's scheduler arrives there."""
    from toys.training.families import Batch, wan_family
    from toys.training.video import build_clip_vae

    torch.manual_seed(0)
    family = wan_family()
    transformer = family.build()
    answer, noise = torch.randn(2, 2, 12, 5, 16, 16)

    def knowing(hidden_states, timestep, encoder_hidden_states, **_):
        level = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return ((hidden_states - answer) / level,)

    monkeypatch.setattr(transformer, "forward", knowing)
    batch = Batch(answer, noise, torch.tensor([0.3, 0.8]), [CAPTION, ""], 32, 64)
    assert family.loss(transformer, text, None, batch) < 1e-8
    pipe = family.pipeline(transformer, text, build_clip_vae())
    pipe.set_progress_bar_config(disable=True)
    call = family.call_kwargs | {"output_type": "latent", "num_inference_steps": 6}
    drawn = pipe(prompt=[CAPTION, CAPTION], generator=torch.Generator().manual_seed(1), **call)
    # Its timesteps are whole numbers, the scheduler's own levels are not.
    assert (drawn.frames - answer).abs().max() < 0.05
