"""--class-weights balanced: in training, in the linear head, and what the user reads of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_trainable, start_run, train_epochs, trainable_vector
from torch.testing import assert_close

from minivit.data.datasets import Data, Split
from minivit.model import trainable
from minivit.settings import TrainSettings
from minivit.training import linear_head, step
from minivit.training.class_weights import balanced_weights
from minivit.training.linear_head import fit_linear_head
from minivit.training.overview import describe_class_weights
from minivit.training.step import Batch, train_step

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
SCALER_OFF = torch.amp.GradScaler("cpu", enabled=False)


class NoStep:
    """An optimizer that leaves the weights as they are, so that gradients can be added up."""

    def __init__(self, model):
        self.param_groups = [{"params": list(trainable(model).values())}]

    def zero_grad(self):
        pass

    def step(self):
        pass


def gradients(model, parts, micro_batch, monkeypatch):
    """Return the loss and the gradients of shares of one batch, added up as ranks add theirs."""
    monkeypatch.setattr(step, "MAX_GRAD_NORM", 1e9)
    weights = balanced_weights(LABELS, 5)
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(())
    for part in parts:
        batch = Batch(images[part].__getitem__, LABELS[part], len(LABELS))
        loss, _ = train_step(
            model,
            NoStep(model),
            SCALER_OFF,
            batch,
            micro_batch=micro_batch,
            amp=None,
            class_weights=weights,
        )
        total += loss
    return images, total, [p.grad.clone() for p in trainable(model).values()]


def test_balanced_weights_give_every_class_the_same_sum_and_a_mean_of_1():
    weights = balanced_weights(LABELS, 3)
    assert_close(weights, torch.tensor([9 / 18, 9 / 6, 9 / 3]))
    assert_close(weights[LABELS].mean(), torch.tensor(1.0))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 9])
@pytest.mark.parametrize("shares", [[slice(0, 9)], [slice(0, 5), slice(5, 9)]], ids=["1", "2"])
def test_the_loss_and_its_gradients_are_torchs_weighted_mean(shares, micro_batch, monkeypatch):
    """Over all photos, that is; in micro-batches, and in the shares of several ranks."""
    model = make_trainable()
    images, loss, found = gradients(model, shares, micro_batch, monkeypatch)
    model.zero_grad()
    expected = F.cross_entropy(model(images), LABELS, weight=balanced_weights(LABELS, 5))
    expected.backward()
    assert_close(loss, expected.detach())
    for p, gradient in zip(trainable(model).values(), found):
        assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


def test_the_flag_reaches_the_steps_and_changes_nothing_for_equal_classes(pixels):
    def weights_after(labels, **settings):
        torch.manual_seed(0)
        state = start_run(make_trainable())
        train_epochs(state, (pixels[0], labels), epochs=1, cache_views=0, **settings)
        return trainable_vector(state.model)

    plain, balanced = (weights_after(LABELS, class_weights=w) for w in ("none", "balanced"))
    assert not torch.allclose(plain, balanced, atol=1e-5)
    equal = torch.arange(9) % 3  # The model has two more classes, which have no photos.
    assert torch.equal(weights_after(equal), weights_after(equal, class_weights="balanced"))


def test_a_weighted_linear_head_is_that_of_repeated_photos():
    """A weight of 2 is the same as having a photo twice, apart from the folds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 4, generator=generator) + labels[:, None]
    used = torch.ones(1, 60)
    twice = torch.cat([features, features[labels == 1]])
    labels_twice = torch.cat([labels, labels[labels == 1]])
    (repeated,) = linear_head.solve(twice, labels_twice, torch.ones(1, 90), 2, [0.1])
    (weighted,) = linear_head.solve(features, labels, used + (labels == 1), 2, [0.1])
    assert_close(weighted, repeated, rtol=1e-3, atol=1e-3)


def test_class_weights_move_the_linear_head_to_the_rare_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 180 + [1] * 20)
    features = torch.randn(200, 3, generator=generator) + 1.2 * labels[:, None]
    recalls = []
    for weights in (None, balanced_weights(labels, 2)):
        head = fit_linear_head(features, labels, 2, class_weights=weights)
        predicted = (features @ head.weight.T + head.bias).argmax(1)
        recalls.append((predicted[labels == 1] == 1).float().mean().item())
    assert recalls[1] > recalls[0] + 0.1


def test_the_table_says_how_much_a_photo_counts():
    train = Split([Path("photo.png")] * len(LABELS), LABELS.tolist())
    data = Data(("cat", "dog", "bird"), train, train, train, Path("data"))
    assert describe_class_weights(data, TrainSettings()) == []
    (line,) = describe_class_weights(data, TrainSettings(class_weights="balanced"))
    assert line == (
        "classes count the same: each photo counts 0.50 times (cat) to 3.00 times (bird)"
    )
