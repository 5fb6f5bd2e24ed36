"""The linear head: regularised logistic regression, its folds, and runs that train nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TIMES, make_trainable, rows_of, run_train, start_run, train_epochs
from safetensors.torch import load_file
from torch.testing import assert_close

from minivit import load_pretrained
from minivit import train as train_job
from minivit.figures import plots
from minivit.model import freeze_except
from minivit.system.signals import StopRequested
from minivit.training import linear_head
from minivit.training import run_folder as runs
from minivit.training.linear_head import FOLDS, STRENGTHS, assign_folds, fit_linear_head, solve


def make_features(
    num_photos: int, dim: int, num_classes: int, *, distance: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (n, D) of classes around centres, with a decaying spectrum, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_photos) * num_classes // num_photos
    centres = distance * torch.randn(num_classes, dim, generator=generator)
    features = centres[labels] + torch.randn(num_photos, dim, generator=generator)
    return features * torch.logspace(0.5, -1, dim) + 3, labels


def solve_with_lbfgs(
    inputs: torch.Tensor, labels: torch.Tensor, num_classes: int, strength: float
) -> torch.Tensor:
    """Return the weights (D + 1, C) that torch.optim.LBFGS finds, in float64.

    The objective is scikit-learn's LogisticRegression's, divided by n, with C = 1 / (n strength).
    """
    inputs = inputs.double()
    weight = torch.zeros(inputs.shape[1], num_classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels)
        loss = loss + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = torch.cat([weight, bias[None] - bias.mean()]).detach()
    return found.float()


# The weights of weak penalties are determined less well: along some directions, the loss hardly
# changes. The tolerance is relative to the norm of all weights.
@pytest.mark.parametrize("shape", [(20, 30, 3), (60, 10, 4)], ids=["few photos", "many photos"])
def test_the_weights_are_those_of_lbfgs(shape):
    features, labels = make_features(*shape)
    num_photos, _, num_classes = shape
    strengths = {1.0: 1e-3, 0.1: 3e-3, 0.01: 3e-2}
    used = torch.ones(2, num_photos)
    used[0, ::4] = 0.0
    for (strength, tolerance), found in zip(
        strengths.items(), solve(features, labels, used, num_classes, strengths)
    ):
        for problem, photos in enumerate(used.bool()):
            expected = solve_with_lbfgs(features[photos], labels[photos], num_classes, strength)
            found[problem, -1] -= found[problem, -1].mean()  # Biases are free up to a constant.
            error = (found[problem] - expected).norm() / expected.norm()
            assert error < tolerance, (strength, problem)


def test_the_strength_is_that_with_which_left_out_photos_are_predicted_best():
    features, labels = make_features(60, 30, 3, distance=0.4)
    head = fit_linear_head(features, labels, 3)
    scores = {}
    scaled = (features - features.mean(0)) / (features - features.mean(0)).square().mean().sqrt()
    for strength in STRENGTHS:
        logits = torch.zeros(60, 3)
        for fold in range(FOLDS):
            left_out = head.fold_of == fold
            weights = solve_with_lbfgs(scaled[~left_out], labels[~left_out], 3, strength)
            logits[left_out] = scaled[left_out] @ weights[:-1] + weights[-1]
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        scores[strength] = (accuracy, -F.cross_entropy(logits, labels).item())
    best = max(scores, key=scores.__getitem__)
    assert STRENGTHS[0] > best > STRENGTHS[-1]  # or the test would show little
    assert head.strength == best
    assert head.accuracy == pytest.approx(scores[best][0])
    expected = solve_with_lbfgs(scaled, labels, 3, best)
    logits = features @ head.weight.T + head.bias
    assert_close(logits.softmax(1), (scaled @ expected[:-1] + expected[-1]).softmax(1), atol=0.01,
                 rtol=0)  # fmt: skip


@pytest.mark.parametrize("sizes", [[10, 10, 10], [12, 7, 13], [6] * 37, [3, 2, 4], [1, 1], [9, 1]])
def test_folds_are_equally_large_and_hold_as_many_of_each_class(sizes):
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    fold_of = assign_folds(labels, len(sizes))
    for c in range(len(sizes)):
        counts = fold_of[labels == c].bincount(minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    counts = fold_of.bincount(minlength=FOLDS)
    assert counts.max() - counts.min() <= min(2, len(sizes))
    if sizes == [10, 10, 10]:
        # Photos of one series, whose names follow each other, stay together.
        assert fold_of[:10].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def check_fit(features, labels, num_classes, *, accuracy=1.0):
    """Check that a head is finite and as accurate on its own photos; return it."""
    head = fit_linear_head(features, labels, num_classes)
    assert head.weight.shape == (num_classes, features.shape[1])
    for tensor in (head.weight, head.bias, head.held_out_logits):
        assert tensor.isfinite().all()
        assert tensor.is_contiguous()  # safetensors wants it so.
    predicted = (features @ head.weight.T + head.bias).argmax(1)
    assert (predicted == labels).float().mean() >= accuracy
    return head


def test_one_photo_and_fewer_photos_than_folds_are_fitted():
    check_fit(torch.randn(1, 8), torch.tensor([1]), 2)
    check_fit(torch.eye(3), torch.tensor([0, 1, 2]), 3)
    check_fit(torch.eye(4), torch.tensor([0, 1, 2, 2]), 5)  # two classes without a photo


def test_features_that_tell_nothing_give_the_classes_frequencies():
    labels = torch.tensor([0] * 30 + [1] * 10)
    for features in (torch.zeros(40, 6), torch.full((40, 6), 1e4)):
        head = check_fit(features, labels, 2, accuracy=0.75)
        probabilities = (features @ head.weight.T + head.bias).softmax(1)
        assert_close(probabilities, torch.tensor([[0.75, 0.25]]).expand(40, 2), atol=0.02, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("most_on_cpu", [1024, 0], ids=["axes from the CPU", "axes from the GPU"])
def test_replayed_steps_find_the_head_that_the_cpu_finds(monkeypatch, most_on_cpu):
    monkeypatch.setattr(linear_head, "MOST_AXES_ON_CPU", most_on_cpu)
    for shape in ((60, 30, 3), (300, 20, 5)):
        features, labels = make_features(*shape)
        expected = fit_linear_head(features, labels, shape[2])
        for _ in range(2):
            head = fit_linear_head(features.cuda(), labels.cuda(), shape[2])
            assert head.strength == expected.strength
            assert_close(head.weight.cpu(), expected.weight, atol=1e-3, rtol=1e-2)
            assert_close(head.held_out_logits.cpu(), expected.held_out_logits, atol=1e-2, rtol=1e-2)


def test_neither_scale_nor_offset_of_all_features_matters():
    features, labels = make_features(60, 10, 3)
    head = check_fit(features, labels, 3, accuracy=0.7)
    for scale, offset in ((1e-6, 0.0), (1e5, 0.0), (1.0, 50.0)):
        changed = check_fit(features * scale + offset, labels, 3, accuracy=0.7)
        assert changed.strength == head.strength
        assert_close(changed.held_out_logits, head.held_out_logits, atol=0.02, rtol=0.02)


def test_features_of_very_different_scales_stay_finite_and_classes_far_apart_too():
    features, labels = make_features(60, 12, 3, distance=5.0)
    check_fit(features * torch.logspace(-6, 6, 12), labels, 3, accuracy=0.5)
    head = check_fit(features, labels, 3)  # All classes are separable.
    assert head.accuracy == 1.0


def test_a_fit_can_be_interrupted(monkeypatch):
    def stop():
        raise StopRequested

    monkeypatch.setattr(linear_head, "stop_here", stop)
    with pytest.raises(StopRequested):
        fit_linear_head(torch.randn(6, 4), torch.arange(6) % 2, 2)


# In a run


def test_the_first_row_is_the_head_alone_and_leaves_the_model_as_it_was(pixels):
    run = start_run(make_trainable())
    before = run.trainable_weights()
    stops = iter([True])
    train_epochs(run, pixels, cache_views=1, stop_requested=lambda: next(stops, True))
    row, *others = run.rows
    assert not others and (row["epoch"], row["lr"], run.step) == (0, 0.0, 0)
    assert row["loss"] == row["train_loss"]
    assert all(
        torch.equal(weight, before[name]) for name, weight in run.trainable_weights().items()
    )
    changed = {name for name, weight in run.kept.items() if not torch.equal(weight, before[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.fixture(scope="module")
def none_run(tiny_saved, shapes_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("none") / "run"
    assert run_train(tiny_saved, shapes_data, out, "--blocks", "none") == 0
    return out


def test_blocks_none_fits_the_head_once_and_changes_nothing_else(none_run, tiny_saved, photos):
    from PIL import Image
    from transformers import pipeline

    (row,) = rows_of(none_run)
    assert row["epoch"] == 0
    summary = json.loads((none_run / "summary.json").read_text())
    assert (summary["best_epoch"], summary["kept"]) == (0, "the head alone was trained")
    assert summary["test_accuracy"] >= 0.9
    written, base = load_pretrained(none_run), load_pretrained(tiny_saved)
    for name, parameter in written.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(parameter, base.get_parameter(name)), name
    tail = load_file(none_run / "tail.safetensors")
    assert sum(tensor.numel() for tensor in tail.values()) == summary["trainable_parameters"]
    assert set(tail) == {"head.weight", "head.bias"}
    photo = Image.open(photos[0]).convert("RGB")
    answers = pipeline("image-classification", str(none_run))(photo)
    assert {answer["label"] for answer in answers} == {"red", "green", "blue"}
    with torch.no_grad():
        ours = written(written.preprocess(photo)[None]).softmax(1).max().item()
    assert answers[0]["score"] == pytest.approx(ours, abs=1e-4)


@pytest.mark.usefixtures("no_figures")
def test_blocks_none_resumes_whenever_it_was_stopped(
    none_run, tiny_saved, shapes_data, tmp_path, monkeypatch, capsys
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for i, name in enumerate(("fit_linear_head", "finish")):
        out = tmp_path / str(i)
        with monkeypatch.context() as patch:
            patch.setattr(train_job, name, interrupted)
            assert run_train(tiny_saved, shapes_data, out, "--blocks", "none") == 130
        assert (out / runs.STATE).exists() == (name == "finish")
        assert run_train(tiny_saved, shapes_data, out, "--blocks", "none", "--resume") == 0
        for file in ("model.safetensors", "tail.safetensors"):
            assert (out / file).read_bytes() == (none_run / file).read_bytes()
    capsys.readouterr()
    out = shutil.copytree(none_run, tmp_path / "finished")
    assert run_train(tiny_saved, shapes_data, out, "--blocks", "none", "--resume") == 0
    assert "holds a finished run" in capsys.readouterr().err


def test_without_blocks_the_head_is_that_of_the_features(pixels):
    model = make_trainable()
    cut = freeze_except(model, [])
    run = start_run(model, cut=cut)
    train_epochs(run, pixels)
    with torch.no_grad():
        images = model.preprocess.normalize(pixels[0])
        inputs = model.head_inputs(model.tokens(images))
        head = fit_linear_head(inputs, pixels[1], 5)
    assert_close(model.head.weight.detach(), head.weight, rtol=1e-4, atol=1e-5)
    assert set(run.rows[0]) >= TIMES - {"mfu"}


def test_curves_show_the_head_alone_as_a_level(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure))
    row = {"train_loss": 0.5, "val_loss": 0.6, "train_accuracy": 0.9, "val_accuracy": 0.8}
    head_alone = row | {"epoch": 0, "val_loss": 2.5, "val_accuracy": 0.3}
    plots.draw_curves(None, [head_alone, row | {"epoch": 1}, row | {"epoch": 2}], 2)
    plots.draw_curves(None, [head_alone], 0)
    for figure, epochs in zip(figures, ([1, 2], [0])):
        for ax, level in zip(figure.axes, (2.5, 0.3)):
            lines = {line.get_label(): line for line in ax.get_lines()}
            assert list(lines["validation, the head alone"].get_ydata()) == [level, level]
            assert list(lines["validation"].get_xdata()) == epochs
            assert all(float(tick).is_integer() for tick in ax.get_xticks())
            low, high = ax.get_ylim()
            assert low <= level < high
