"""Find planted label errors: review's ranking beside cleanlab's and a trained run's loss.

    pip install --target cleanlab cleanlab
    PYTHONPATH=cleanlab python benchmarks/review.py --model .cache/dinov2-small --data pets3

For each seed, some labels are replaced by another class. Average precision says how well a ranking
finds them: 1 if they all come first, and about their share for a ranking by chance. The features
are computed once and kept in --cache. cleanlab is no dependency of minivit; without it, its columns
are left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivit import load_pretrained
from minivit.data.datasets import load_data
from minivit.model import working_copy
from minivit.settings import TrainSettings, batch_size_for, epochs_for
from minivit.system.device import pick_amp, pick_device
from minivit.tools.review import blocks as retraining
from minivit.tools.review.command import list_photos
from minivit.tools.review.labels import find_suspicious
from minivit.tools.review.measure import measure
from minivit.tools.study.features import StudyFeatures
from minivit.training.linear_head import fit_linear_head

BLOCKS = [10, 11]


def plant_errors(
    labels: Tensor, num_classes: int, share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return labels of which a share is replaced by another class, and which these are."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
    planted = labels.clone()
    for i in chosen:
        planted[i] = (labels[i] + rng.integers(1, num_classes)) % num_classes
    return planted, planted != labels


def average_precision(scores: Tensor, is_error: Tensor) -> float:
    """Return the average precision of a ranking that begins with the lowest score."""
    hits = is_error[scores.argsort(stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return ((precision * hits).sum() / hits.sum()).item()


def cleanlab_scores(labels: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Return cleanlab's scores of each label by its two usual methods."""
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return {}
    scores = {}
    for method in ("self_confidence", "normalized_margin"):
        values = get_label_quality_scores(labels.numpy(), probabilities.numpy(), method=method)
        scores[f"cleanlab {method}"] = torch.from_numpy(values)
    return scores


def rank(planted: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Return scores of each label, low where it is hard to believe, by each method."""
    own = probabilities.gather(1, planted[:, None])[:, 0]
    return {"review": own, **cleanlab_scores(planted, probabilities)}


def trained_run_loss(model, features: StudyFeatures, planted: Tensor) -> Tensor:
    """Return minus the loss of each photo, by blocks that were trained on all of them."""
    settings = TrainSettings(batch_size=batch_size_for(len(planted)))
    settings = settings.choose(epochs=epochs_for(settings.steps_per_epoch(len(planted))))
    paths = list(features.row_of)
    amp = pick_amp("auto", features.model.cls_token.device)
    logits = retraining.train_and_predict(
        model, BLOCKS, features, paths, planted, paths, settings, amp
    )
    return -F.cross_entropy(logits, planted, reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", type=Path, help="file that the features are kept in")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--run", action="store_true", help="also train blocks 10-11, which is slow")
    args = parser.parse_args()

    data = load_data(args.data, seed=0)
    paths, _, labels = list_photos(data)
    true = torch.tensor(labels)
    device = pick_device("cpu")
    amp = pick_amp("auto", device)
    model = load_pretrained(args.model, labels=data.classes)
    if args.cache is not None and args.cache.exists():
        features = torch.load(args.cache, weights_only=True)
    else:
        low = working_copy(model, device, amp, train=False)
        features = measure(low, low, model.config.depth, paths, 2, amp).features
        if args.cache is not None:
            torch.save(features, args.cache)
    kept = None
    if args.run:
        kept = retraining.keep_features(
            model, BLOCKS[0], paths, device=device, amp=amp, workers=2, cache_gib=8.0
        )

    precisions: dict[str, list[float]] = {}
    found: list[tuple[int, int, int]] = []
    for seed in range(args.seeds):
        planted, is_error = plant_errors(true, len(data.classes), args.share, seed)
        head = fit_linear_head(features, planted, len(data.classes))
        probabilities = head.held_out_logits.softmax(1)
        rankings: Mapping[str, Tensor] = rank(planted, probabilities)
        logits = features @ head.weight.T + head.bias
        loss = F.cross_entropy(logits, planted, reduction="none")
        rankings = {**rankings, "loss of a run of --blocks none": -loss}
        if kept is not None:
            run_loss = trained_run_loss(model, kept, planted)
            rankings = {**rankings, "loss of a run of --blocks 10-11": run_loss}
        for name, scores in rankings.items():
            precisions.setdefault(name, []).append(average_precision(scores, is_error))
        suspicious = find_suspicious(probabilities, planted)
        found.append(
            (int((suspicious & is_error).sum()), int(suspicious.sum()), int(is_error.sum()))
        )
        print(f"seed {seed}: {found[-1][0]} of {found[-1][2]} errors among {found[-1][1]} flagged")
    for name, values in precisions.items():
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{name:31} {statistics.mean(values):.3f}   ({each})")


if __name__ == "__main__":
    main()
