"""Removing pixels."""

import pytest
import torch

from gradexp.errors import UserError
from gradexp.evaluate.masking import least_salient, ranks, remove


def test_ranks_order_pixels_by_saliency() -> None:
    saliency = torch.tensor([[[0.3, 0.1], [0.2, 0.9]], [[4.0, 3.0], [2.0, 1.0]]])
    assert ranks(saliency, seed=0).tolist() == [[[2, 0], [1, 3]], [[3, 2], [1, 0]]]


def test_ties_fall_by_the_seed_and_not_by_position() -> None:
    flat = torch.zeros(1, 8, 8)
    first, again, other = (ranks(flat, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.flatten().sort().values.tolist() == list(range(64))
    assert first.flatten().tolist() != list(range(64))


def test_a_fraction_of_pixels_goes_in_all_channels() -> None:
    images = torch.rand(3, 2, 10, 10)
    places = ranks(torch.rand(3, 10, 10), seed=0)
    for fraction, count in ((0, 0), (0.01, 1), (0.25, 25), (1, 100)):
        mask = least_salient(places, fraction)
        assert mask.sum((1, 2, 3)).tolist() == [count] * 3
        removed = remove(images, mask, 0.5)
        assert torch.equal(removed != images, mask.expand_as(images))


def test_the_mean_colour_is_each_images_own() -> None:
    images = torch.rand(3, 2, 4, 4)
    everything = least_salient(ranks(torch.rand(3, 4, 4), seed=0), 1.0)
    gone = remove(images, everything, "image_mean")
    torch.testing.assert_close(gone, images.mean((2, 3), keepdim=True).expand_as(images))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        least_salient(torch.zeros(1, 2, 2, dtype=torch.long), 1.5)
    with pytest.raises(UserError, match="image_mean or a number"):
        remove(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.bool), "grey")
