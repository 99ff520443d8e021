"""The built-in digits: the geometry is torch's, the splits share no digit, and every run makes the same bytes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from distssl.data import digits


def test_a_digit_is_laid_where_torch_grid_sample_lays_it():
    plain = np.random.default_rng(0).random((6, 8, 8))
    laid = digits._lay(plain, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    turn, ratio = rng.uniform(-digits.TURN_RAD, digits.TURN_RAD, 6), rng.uniform(*digits.CANVAS_TO_DIGIT, 6)
    tx, ty = rng.uniform(-1, 1, (2, 6)) * (1 - 1 / ratio) * digits.REACH
    c, s = np.cos(turn) * ratio, np.sin(turn) * ratio
    affine = np.stack([np.stack([c, -s, -(c * tx - s * ty)], 1), np.stack([s, c, -(s * tx + c * ty)], 1)], 1)
    grid = F.affine_grid(torch.tensor(affine), [6, 1, digits.SIZE_PX, digits.SIZE_PX], align_corners=False)
    reference = F.grid_sample(torch.tensor(plain)[:, None], grid, align_corners=False)[:, 0].numpy()
    np.testing.assert_allclose(laid, reference, atol=1e-12)


def test_texture_is_a_bilinear_enlargement():
    texture = digits._texture(2, np.random.default_rng(1))
    cells = np.random.default_rng(1).normal(0, digits.TEXTURE_STD, (2, 3, digits.TEXTURE_CELLS, digits.TEXTURE_CELLS))
    reference = F.interpolate(torch.tensor(cells), size=digits.SIZE_PX, mode="bilinear").permute(0, 2, 3, 1)
    np.testing.assert_allclose(texture, reference.numpy(), atol=1e-12)


def test_splits_have_their_sizes_and_classes_and_share_nothing():
    train, train_labels = digits.scattered("train")
    test, test_labels = digits.scattered("test")
    per_train, per_test = digits.SCATTERINGS["train"], digits.SCATTERINGS["test"]
    assert train.shape == ((1797 - digits.TEST_DIGITS) * per_train, digits.SIZE_PX, digits.SIZE_PX, 3)
    assert test.shape == (digits.TEST_DIGITS * per_test, digits.SIZE_PX, digits.SIZE_PX, 3)
    counts = np.bincount(train_labels) // per_train + np.bincount(test_labels) // per_test
    np.testing.assert_array_equal(counts, np.bincount(load_digits().target))
    again, _ = digits.scattered("test")
    np.testing.assert_array_equal(test, again)
