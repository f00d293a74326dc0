"""Removing pixels."""

import pytest
import torch

from gradexp.base.errors import UserError
from gradexp.evaluate.masking import impute, least_salient, ranks, remove


def test_ranks_order_pixels_by_saliency() -> None:
    saliency = torch.tensor([[[0.3, 0.1], [0.2, 0.9]], [[4.0, 3.0], [2.0, 1.0]]])
    assert ranks(saliency, seed=0).tolist() == [[[2, 0], [1, 3]], [[3, 2], [1, 0]]]


def test_the_seed_orders_ties_not_their_position() -> None:
    flat = torch.zeros(1, 8, 8)
    first, again, other = (ranks(flat, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.flatten().sort().values.tolist() == list(range(64))
    assert first.flatten().tolist() != list(range(64))


def test_a_fraction_of_pixels_is_removed_in_all_channels() -> None:
    images = torch.rand(3, 2, 10, 10)
    places = ranks(torch.rand(3, 10, 10), seed=0)
    for fraction, count in ((0, 0), (0.01, 1), (0.25, 25), (1, 100)):
        mask = least_salient(places, fraction)
        assert mask.sum((1, 2, 3)).tolist() == [count] * 3
        removed = remove(images, mask, 0.5)
        assert torch.equal(removed != images, mask.expand_as(images))


def test_image_mean_is_the_mean_colour_of_each_image() -> None:
    images = torch.rand(3, 2, 4, 4)
    everything = least_salient(ranks(torch.rand(3, 4, 4), seed=0), 1.0)
    gone = remove(images, everything, "image_mean")
    torch.testing.assert_close(gone, images.mean((2, 3), keepdim=True).expand_as(images))


def test_imputed_pixels_solve_their_linear_system() -> None:
    """Each is the mean of its neighbours, weights 2 at its sides and 1 at its corners: a dense solution, pixel by pixel."""
    size = 7
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    mask = torch.rand(2, 1, size, size) < 0.6
    mask[1, 0, :4, :4] = True  # a hole, at a corner of the image
    found = impute(images, mask, noise=0, tolerance=1e-10)
    for image, gone, result in zip(images, mask[:, 0], found, strict=True):
        matrix = torch.eye(size * size, dtype=torch.float64)
        for i, j in gone.nonzero().tolist():
            weights = {
                (i + a) * size + j + b: 3 - abs(a) - abs(b)
                for a in (-1, 0, 1)
                for b in (-1, 0, 1)
                if (a or b) and 0 <= i + a < size and 0 <= j + b < size
            }
            for place, weight in weights.items():
                matrix[i * size + j, place] = -weight / sum(weights.values())
        known = torch.where(gone, 0, image).flatten(1)
        torch.testing.assert_close(result.flatten(1), torch.linalg.solve(matrix, known.T).T)
        assert torch.equal(result[:, ~gone], image[:, ~gone])


def test_imputed_pixels_have_a_little_noise_and_a_mask_of_everything_ends() -> None:
    image, everything = torch.full((1, 1, 40, 40), 0.3), torch.ones(1, 1, 40, 40, dtype=torch.bool)
    half = torch.arange(1600).view(1, 1, 40, 40) % 2 == 0
    filled = remove(image, half, "imputed")
    assert torch.equal(filled[~half], image[~half])
    assert float(filled[half].mean()) == pytest.approx(0.3, abs=0.002)
    assert float(filled[half].std()) == pytest.approx(0.01, rel=0.1)
    assert impute(image, everything).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_imputation_in_half_precision_is_that_of_float32_rounded(dtype: torch.dtype) -> None:
    images, mask = (0.1 * torch.randn(4, 3, 32, 32)).to(dtype), torch.rand(4, 1, 32, 32) < 0.3
    expected = impute(images.float(), mask, noise=0)
    found = impute(images, mask, noise=0)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


def test_imputation_of_a_batch_is_that_of_each_image() -> None:
    """Some have a few masked pixels, one a large hole, which takes many more steps."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        images, mask = torch.rand(64, 1, 28, 28, generator=generator), torch.zeros(64, 1, 28, 28, dtype=torch.bool)
        for number, gone in enumerate(mask.view(64, -1)):
            gone[torch.randperm(784, generator=generator)[: 1 + number % 12]] = True
        mask[0, 0, :20, :20] = True
        filled = impute(images, mask, noise=0)
        alone = torch.cat([impute(images[i : i + 1], mask[i : i + 1], noise=0) for i in range(0, 64, 9)])
        assert filled.isfinite().all()
        torch.testing.assert_close(filled[::9], alone)


def test_unknown_replacements_and_fractions_are_errors() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        least_salient(torch.zeros(1, 2, 2, dtype=torch.long), 1.5)
    with pytest.raises(UserError, match="image_mean, imputed or a number"):
        remove(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.bool), "grey")
