"""The training job: load data and model, freeze, train epoch by epoch, test the kept weights.

Read `train` for the whole story, `run_epochs` for the loop, and training/step.py for one step.
A job needs three copies of the model, which share memory wherever their weights are equal:
`model` is the checkpoint in float32 on the CPU, from which everything is written; `state.model`
is the working copy that trains, its frozen layers in low precision; `eval_model` is in low
precision as a whole, and is what validation and test are computed with, as infer.py does.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .checkpoints import tensors, weights
from .cli import parse_blocks
from .data import store
from .data.datasets import Data, split_data
from .data.layout import is_absent_or_empty, is_default_folder
from .data.listing import list_data
from .data.store import Pixels
from .data.survey import quick_findings
from .errors import UserError
from .model import ViT, copy_trainable, freeze_except, trainable, working_copy
from .settings import AUTO, TrainSettings, batch_size_for, epochs_for
from .system import device as devices
from .system import distributed, files
from .system.launch import launched_rank, launched_world_size
from .system.signals import StopRequested, during_evaluation, held_back, stop_requests
from .system.workers import worker_pool, write_behind
from .training import calibration, metrics, publishing, reference, report, run_folder
from .training.class_weights import balanced_weights
from .training.features import (
    FeatureExtractor,
    TrainableLayers,
    features_gib,
    host_memory_gib,
)
from .training.fingerprint import describe_run
from .training.linear_head import fit_linear_head
from .training.overview import describe_training
from .training.rehearsal import describe_time, rehearse
from .training.run_photos import photos_checksum
from .training.state import RunState, new_state, save_state, set_trainable
from .training.step import (
    mean_loss,
    predict,
    predict_photos,
    score_predictions,
    train_epoch,
)
from .training.views import TrainingPhotos, views_for

PixelsAndLabels = tuple[Pixels | Tensor, Tensor]  # pixels, uint8 (n, 3, h, w), and labels (n,)

# From this many test photos on, the figures are drawn in worker processes, which start while the
# photos are tested.
DRAW_IN_WORKERS_FROM = 64

# A run that is killed loses the epoch under way, and about this much training before it.
SECONDS_BETWEEN_SAVES = 5.0


@devices.own_defaults()
def train(settings: TrainSettings, wait_for_photos: Callable[[], None] | None = None) -> int:
    """Do the whole job, and return its exit code.

    If another process decodes the photos, `wait_for_photos` waits until it has done so.
    """
    started = time.perf_counter()
    out = Path(settings.out)
    device = devices.pick_device(distributed.local_device(settings.device))
    amp = devices.pick_amp(settings.amp, device)
    prepare(settings, device)
    with contextlib.ExitStack() as lock, devices.current(device):
        # The device starts while this thread lists the photos and loads the model.
        warm_up = devices.begin_warm_up(device, amp)
        with distributed.process_group(device):
            is_rank_0 = distributed.rank() == 0  # the only rank that writes
            if not settings.dry_run and distributed.on_rank_0(
                lambda: conclude_finished_run(settings, amp)
            ):
                return 0

            data = distributed.on_rank_0(lambda: load_data(settings))
            with devices.few_threads():  # Photos may be decoded meanwhile.
                model = weights.load_pretrained(
                    settings.model,
                    revision=settings.revision,
                    labels=data.classes,
                    img_size=settings.img_size,
                )
            cut = freeze_except(model, parse_blocks(settings.blocks, model.config.depth))
            settings = choose_settings(settings, model, data, cut, device, amp)
            print(describe_training(model, data, settings, device, amp), flush=True)

            warm_up.join()
            working_model = working_copy(model, device, amp, train=True)
            micro_batch = choose_micro_batch(settings, working_model, data, cut, amp)
            distributed.on_rank_0(lambda: publishing.prepare(settings))
            if settings.dry_run:
                return 0

            checksum = photos_checksum(data)
            data, train_split, val_split, test_split = decode_photos(
                settings, data, model, wait_for_photos
            )
            state = new_state(
                working_model,
                cut=cut,
                amp=amp,
                micro_batch=micro_batch,
                weight_decay=settings.weight_decay,
                layer_decay=settings.layer_decay,
                head_scale=settings.head_lr / settings.lr,
            )
            with write_behind() as write_later:
                recorder = Recorder(settings, model, data, write_later)
                recorder.begin(state, started, lock)
                outcome = run_until_stopped(state, train_split, val_split, settings, recorder)
                recorder.end(state)
                if outcome is None:
                    if is_rank_0:
                        print(
                            f"\ninterrupted; all is saved in {out}: the same command with --resume "
                            "goes on",
                            file=sys.stderr,
                        )
                    return 130
                # Meanwhile, the state of the last epoch may still be on its way to the disk.
                if is_rank_0:
                    num_workers = 3 if len(data.test) >= DRAW_IN_WORKERS_FROM else 0  # one a figure
                    with worker_pool(num_workers, "minivit.figures.plots") as pool:
                        has_all_figures = finish(
                            recorder, state, outcome, val_split, test_split, checksum, pool
                        )
        if is_rank_0:
            if has_all_figures:  # Otherwise, --resume draws them again.
                files.remove_file(out / run_folder.STATE)
            run_folder.report_result(out)
            if settings.push_to_hub:
                publishing.publish(out, settings.push_to_hub)
    return 0


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: the weights to keep, and what the head reads with them."""

    kept: metrics.Kept
    weights: dict[str, Tensor]
    inputs: Tensor  # (n, D), of the training photos


def run_until_stopped(
    state: RunState,
    train_split: PixelsAndLabels,
    val_split: PixelsAndLabels,
    settings: TrainSettings,
    recorder: Recorder,
) -> Outcome | None:
    """Run the epochs that are left; return None, with state.stopped set, if a signal came."""
    with stop_requests() as stop_requested:
        try:
            evaluation = run_epochs(
                state, train_split, val_split, settings, stop_requested, recorder
            )
            if state.stopped:
                return None
            kept, kept_weights = choose_weights(state, settings, len(val_split[1]))
            inputs = evaluation.read_by_head(state, kept, kept_weights)
            return Outcome(kept, kept_weights, inputs)
        except StopRequested:
            state.stopped = True
            return None


def run_epochs(
    state: RunState,
    train_split: PixelsAndLabels,
    val_split: PixelsAndLabels,
    settings: TrainSettings,
    stop_requested: Callable[[], bool],
    recorder: Recorder | None = None,
) -> Evaluation:
    """Train from where the state stands to the last epoch; evaluate, save and report each.

    The head alone, fitted to the frozen model, comes first, as epoch 0. One seed gives one order of
    photos and one augmentation, whatever the number of ranks. Ends early after `settings.patience`
    epochs without a better one, and, with state.stopped set, at the end of the step during which a
    stop was requested. Without a recorder nothing is saved or reported.
    Raises UserError as soon as the loss of an epoch is not finite, and if the features of the
    views take more than `settings.cache_gib` of memory.
    """
    if AUTO in (settings.epochs, settings.batch_size, settings.cache_views):
        raise ValueError("expected settings for which choose_settings() has chosen all values")
    keep_on = place_for_features(
        state.model, state.cut, len(train_split[1]), len(val_split[1]), settings
    )
    extractor = FeatureExtractor(
        state.model,
        state.cut,
        batch=devices.eval_batch(state.device, settings.batch_size, state.micro_batch, state.amp),
        compile=settings.compile,
    )
    layers = TrainableLayers(state.model, state.cut)
    if settings.compile:
        layers.compile()
    network = distributed.wrap(layers)
    photos = TrainingPhotos(extractor, *train_split, settings)
    evaluation = Evaluation(state, extractor, train_split, val_split, keep_on=keep_on)

    if not state.rows:
        state.rows.append(evaluation.evaluate_head_alone(state, settings))
        if recorder is not None:
            recorder.save_and_report(state, state.trainable_weights())
    if state.cut == state.model.config.depth:
        return evaluation  # No block trains, so the head alone is all.

    while epochs_are_left(state, settings):
        started = time.perf_counter() - state.seconds
        photos_of_epoch = photos.of_epoch(state.epoch, stop_requested)
        if photos_of_epoch is None:
            state.stopped = True
            return evaluation

        train_epoch(state, network, photos_of_epoch, settings, stop_requested)
        row = {
            "epoch": state.epoch,
            "loss": mean_loss(state, len(photos.labels), settings),
            "lr": state.lr,
        }
        state.seconds = time.perf_counter() - started
        if state.stopped:
            return evaluation

        row |= measure_speed(state, len(photos.labels), photos_of_epoch.runs_frozen_blocks)
        row |= evaluation.evaluate(state)
        row["seconds"] = time.perf_counter() - started
        row["peak_gib"] = devices.peak_gib(state.device)

        state.rows.append(row)
        state.epoch += 1
        state.losses = []
        state.skipped = []
        state.seconds = 0.0
        current_weights = state.trainable_weights()
        state.update_kept(current_weights, settings)
        if recorder is not None:
            recorder.save_and_report(state, current_weights)
        state.stopped = stop_requested()
        if state.stopped:
            break
    return evaluation


class Evaluation:
    """Evaluates each epoch on the training and validation photos, without augmentation."""

    @during_evaluation()
    def __init__(
        self,
        state: RunState,
        extractor: FeatureExtractor,
        train_split: PixelsAndLabels,
        val_split: PixelsAndLabels,
        *,
        keep_on: torch.device | None,
    ) -> None:
        dtype = state.model.cls_token.dtype  # that of the frozen layers
        self.eval_model = working_copy(state.model, state.device, dtype, train=False)
        self.labels = {"train": train_split[1], "val": val_split[1]}
        self.batches: dict[str, Callable[[], Iterator[Tensor]]] = {}
        # What the head read of this rank's training photos in the latest evaluation, (n, D).
        self.train_inputs: Tensor | None = None
        for name, (pixels, labels) in (("train", train_split), ("val", val_split)):
            share = distributed.shard(torch.arange(len(labels)))
            self.batches[name] = extractor.evaluation(pixels, share, keep_on=keep_on)

    @during_evaluation()
    def evaluate_head_alone(self, state: RunState, settings: TrainSettings) -> dict[str, float]:
        """Fit the head alone to the frozen model, and return a row for it, as epoch 0.

        The weights with the fitted head become state.kept, and those of the model if no block is
        to train. Otherwise training starts from the head as it was: benchmarks/recipe.py found no
        gain in starting from the fitted one.
        """
        started = time.perf_counter()
        labels = self.labels["train"]
        read: dict[str, Tensor] = {}
        for name, batches in self.batches.items():
            _, read[name] = predict(self.eval_model, batches(), cut=state.cut)
        self.train_inputs = read["train"]
        inputs = distributed.gather(read["train"], len(labels))

        def fit() -> dict[str, Tensor]:
            # mps lacks some of linear algebra.
            device = state.device if state.device.type == "cuda" else torch.device("cpu")
            num_classes = state.model.config.num_classes
            class_weights = None
            if settings.class_weights == "balanced":
                class_weights = balanced_weights(labels, num_classes).to(device)
            head = fit_linear_head(
                inputs.to(device), labels.to(device), num_classes, class_weights=class_weights
            )
            return {"head.weight": head.weight.cpu(), "head.bias": head.bias.cpu()}

        untrained = state.trainable_weights()
        fitted = untrained | distributed.on_rank_0(fit)
        set_trainable(state.model, fitted)
        try:
            copy_trainable(self.eval_model, state.model)
            # The blocks are the same, so that only the head has to compute once more.
            logits = {name: self._head(of_split) for name, of_split in read.items()}
            row: dict[str, float] = {"epoch": 0, **self._score(logits)}
        finally:
            # A run that is stopped meanwhile is saved with the head that training starts from.
            set_trainable(state.model, untrained)
        state.kept = fitted
        if state.cut == state.model.config.depth:
            set_trainable(state.model, fitted)
        row["loss"] = row["train_loss"]
        row["lr"] = 0.0
        row["seconds"] = time.perf_counter() - started
        row["images_per_s"] = len(labels) / row["seconds"]
        row["peak_gib"] = devices.peak_gib(state.device)
        return row

    @during_evaluation()
    def evaluate(self, state: RunState) -> dict[str, float]:
        """Return train_accuracy, val_accuracy, train_loss and so on, of the present weights."""
        copy_trainable(self.eval_model, state.model)
        logits: dict[str, Tensor] = {}
        for name, batches in self.batches.items():
            logits[name], inputs = predict(self.eval_model, batches(), cut=state.cut)
            if name == "train":
                self.train_inputs = inputs
        return self._score(logits)

    @torch.no_grad()
    def _head(self, inputs: Tensor) -> Tensor:
        """Return the logits (n, C), float32 on the CPU, of what the head reads (n, D)."""
        weight = self.eval_model.get_parameter("head.weight")
        return self.eval_model.head(inputs.to(weight)).float().cpu()

    def _score(self, logits: dict[str, Tensor]) -> dict[str, float]:
        """Return the scores of each split from the logits that this rank has computed."""
        row: dict[str, float] = {}
        for name, labels in self.labels.items():
            scores = score_predictions(distributed.gather(logits[name], len(labels)), labels)
            row |= {f"{name}_{metric}": value for metric, value in scores.items()}
        return row

    @during_evaluation()
    def read_by_head(
        self, state: RunState, kept: metrics.Kept, weights: dict[str, Tensor]
    ) -> Tensor:
        """Return what the head reads of the training photos (n, D) with the weights to keep."""
        inputs = self.train_inputs
        # The latest evaluation of this process was of the last epoch. There is none if the run was
        # resumed after that.
        if inputs is None or kept.weights != "last":
            for name, weight in weights.items():
                self.eval_model.get_parameter(name).copy_(weight)
            _, inputs = predict(self.eval_model, self.batches["train"](), cut=state.cut)
        return distributed.gather(inputs, len(self.labels["train"]))


def place_for_features(
    model: ViT, cut: int, num_train: int, num_val: int, settings: TrainSettings
) -> torch.device | None:
    """Choose where to keep the features of all photos without augmentation.

    Returns the model's device if that has much room, and else the CPU, that is host memory. Returns
    None, to compute them anew each time, if they do not fit into `settings.cache_gib` beside the
    features of the kept views. Raises UserError if those of the views alone do not fit.
    """
    views = settings.views_to_keep()
    views_gib = features_gib(model, num_train * views, cut)
    if views_gib > settings.cache_gib:
        raise UserError(
            f"the features of {views} views take {views_gib:.1f} GiB; "
            f"raise --cache-gib {settings.cache_gib:g}, or keep fewer"
        )
    evaluation_gib = features_gib(model, num_train + num_val, cut)
    if views_gib + evaluation_gib > settings.cache_gib:
        return None
    device = model.cls_token.device
    gib_of_rank = evaluation_gib / distributed.world_size()
    if devices.has_much_room(device, gib_of_rank, settings.memory_gib):
        return device
    return torch.device("cpu")


def epochs_are_left(state: RunState, settings: TrainSettings) -> bool:
    """Return whether another epoch is to be trained, or the one under way to be finished."""
    if state.epoch > settings.epochs:
        return False
    if settings.patience is None or not state.rows:
        return True
    return metrics.epochs_without_better(state.rows) < settings.patience


def measure_speed(state: RunState, n: int, runs_frozen_blocks: bool) -> dict[str, float]:
    """Return images a second, and the share of the device's product speed that they take."""
    forward = state.model.flops(0 if runs_frozen_blocks else state.cut)
    backward = 2 * state.model.flops(state.cut)  # twice as much as the forward pass
    flops_per_second = n * (forward + backward) / state.seconds / distributed.world_size()
    return {
        "images_per_s": n / state.seconds,
        "mfu": flops_per_second / devices.product_flops(state.device, state.amp),
    }


class Recorder:
    """Saves the state of a run and reports its epochs. Only rank 0 writes and prints."""

    def __init__(
        self,
        settings: TrainSettings,
        model: ViT,
        data: Data,
        write_later: Callable[..., Future],
    ) -> None:
        self.settings = settings
        self.model = model
        self.data = data
        self.write_later = write_later
        self.out = Path(settings.out)
        self.started = 0.0  # when the run would have started if it had never been interrupted
        self.last_save: float | None = None  # when the state of an epoch was last saved
        self.described: Future[tuple[str, dict[str, object]]] | None = None

    def begin(self, state: RunState, started: float, lock: contextlib.ExitStack) -> None:
        """Begin a new run in the folder, or restore the run that is there.

        The folder stays locked until the stack `lock` is closed.
        """
        if distributed.rank() == 0:
            # Hashing takes half a second, so it goes on while features are computed and the head
            # alone is fitted.
            initial = {}
            for name in weights.tail_names(self.model):
                weight = self.model.get_parameter(name).detach()
                # On a CPU, the weights that train are the model's own, and change meanwhile.
                initial[name] = weight.clone() if state.device.type == "cpu" else weight
            self.described = self.write_later(self._describe, initial, state.amp)
        saved = distributed.on_rank_0(lambda: self._open_folder(lock))
        if saved is not None:
            state.restore(*saved)
        self.started = started - state.spent

    def _open_folder(self, lock: contextlib.ExitStack) -> tuple[dict[str, Tensor], dict] | None:
        run_folder.lock_folder(self.out, lock)
        if run_folder.has_state(self.out, self.settings.resume):
            return run_folder.resume_run(self.out, self.fingerprint())
        run_folder.begin_run(self.out, self.settings.resume)
        return None

    def _describe(
        self, initial: dict[str, Tensor], amp: torch.dtype | None
    ) -> tuple[str, dict[str, object]]:
        base_hash = weights.hash_outside_tail(self.model)
        return base_hash, describe_run(
            self.settings, self.model, base_hash, initial, self.data, amp
        )

    def base_hash(self) -> str:
        """Return weights.hash_outside_tail(model)."""
        assert self.described is not None  # Only rank 0 asks.
        return self.described.result()[0]

    def fingerprint(self) -> dict[str, object]:
        """Return all that the result depends on: a run is resumed only if all of it is the same."""
        assert self.described is not None
        return self.described.result()[1]

    def save_and_report(self, state: RunState, current_weights: dict[str, Tensor]) -> None:
        """Print the row of an epoch, and save the state in the background if it is due.

        On a GPU, a save takes a tenth of the time of a short epoch, so SECONDS_BETWEEN_SAVES lie
        between two saves. The last epoch is always saved, because what follows it may fail.
        """
        now = time.perf_counter()
        state.spent = now - self.started
        if distributed.rank() != 0:
            return
        is_due = self.last_save is None or now - self.last_save >= SECONDS_BETWEEN_SAVES
        if is_due or not epochs_are_left(state, self.settings):
            self.last_save = now
            snapshot = state.snapshot(self.fingerprint(), current_weights)
            self.write_later(tensors.save_tensors, self.out / run_folder.STATE, *snapshot)
        run_folder.report_epoch(state.rows, self.settings.epochs, self.out)

    def end(self, state: RunState) -> None:
        """Note the time that the run took, and save the state if it was stopped in an epoch."""
        state.spent = time.perf_counter() - self.started
        if state.stopped and distributed.rank() == 0:
            with held_back():  # torchrun repeats its signal.
                # The state of the last epoch, if it is still being written, comes first.
                path = self.out / run_folder.STATE
                self.write_later(save_state, path, state, self.fingerprint()).result()


def prepare(settings: TrainSettings, device: torch.device) -> None:
    """Check what can be checked before anything is loaded, and set torch up for the run."""
    if settings.out.encode(errors="ignore").decode() != settings.out:
        raise UserError(
            f"{settings.out}: expected a name in UTF-8, without which safetensors reads no file"
        )
    if settings.keep == "average" and settings.patience is not None:
        raise UserError(
            "--keep average takes the mean over the second half of all epochs, and --patience may "
            "end the run before; leave one of the two away"
        )
    if launched_rank() == 0:
        run_folder.check_inputs(settings)
        run_folder.check_folder(Path(settings.out))
        publishing.check(settings)
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        devices.be_deterministic()
    if settings.memory_gib:
        devices.limit_memory(device, settings.memory_gib)


def conclude_finished_run(settings: TrainSettings, amp: torch.dtype | None) -> bool:
    """Upload a finished run that is to be resumed, if asked to, and print its result again.

    Returns whether the folder holds such a run.
    """
    out = Path(settings.out)
    run_folder.settle(out)
    if not settings.resume or not run_folder.is_finished(out):
        return False
    run_folder.check_finished(out, settings, precision_name(amp))
    print(f"{out} holds a finished run", file=sys.stderr)
    run_folder.report_result(out)
    if settings.push_to_hub:
        publishing.prepare(settings)
        publishing.publish(out, settings.push_to_hub)
    return True


def precision_name(amp: torch.dtype | None) -> str:
    return str(amp or torch.float32).removeprefix("torch.")


def load_data(settings: TrainSettings) -> Data:
    """List the data set, downloaded if need be, and print what is odd about it."""
    may_download = settings.download or is_default_folder(settings.data)
    if settings.dry_run and may_download and is_absent_or_empty(settings.data):
        raise UserError(
            f"{settings.data}: there are no photos yet, and a dry run downloads nothing; "
            "leave --dry-run away to have Oxford-IIIT Pet downloaded there"
        )
    listing = list_data(settings.data, download=True, anywhere=settings.download)
    if settings.download and not listing.folder.is_pets:
        raise UserError(
            f"{settings.data}: holds class folders, and --download fetches Oxford-IIIT Pet only "
            "into an absent or empty folder; name another one, or leave --download away"
        )
    data = split_data(listing, seed=settings.seed, skip_bad=settings.skip_bad)
    for finding in quick_findings(listing):
        print(finding, file=sys.stderr)
    return data


def choose_settings(
    settings: TrainSettings,
    model: ViT,
    data: Data,
    cut: int,
    device: torch.device,
    amp: torch.dtype | None,
) -> TrainSettings:
    """Return the settings with values for the batch size, epochs and kept views that are AUTO.

    The size and number of batches follow from the number of photos alone. Kept views depend on
    the device, too, so that a run that is resumed on another one stays with those that it has.
    """
    num_train = len(data.train)
    settings = settings.choose(batch_size=batch_size_for(num_train))
    settings = settings.choose(epochs=epochs_for(settings.steps_per_epoch(num_train)))
    views = None
    if settings.resume:
        views = distributed.on_rank_0(lambda: run_folder.views_of_state(Path(settings.out)))
    if views is None:
        views = views_for(settings.epochs, device, cut)
        gib = features_gib(model, views * num_train, cut)
        if amp is not None:  # The features have the precision of the frozen layers.
            gib *= amp.itemsize / torch.float32.itemsize
        if gib > settings.cache_gib:
            views = 0
    return settings.choose(cache_views=views)


def choose_micro_batch(
    settings: TrainSettings, model: ViT, data: Data, cut: int, amp: torch.dtype | None
) -> int:
    """Return how many photos to take per forward pass; print what memory or time that needs.

    On a GPU that is the memory, which a rehearsal finds; on other devices the time of a long run.
    """
    device = model.cls_token.device
    micro_batch = devices.pick_micro_batch(settings.micro_batch, settings.batch_size, device, amp)
    if device.type != "cuda":
        expected_time = describe_time(model, data, settings, cut, amp)
        if expected_time is not None:
            print(f"{expected_time}\n", flush=True)
        if not settings.dry_run:
            return micro_batch
    micro_batch, gib = rehearse(
        model, cut=cut, batch_size=settings.batch_size, micro_batch=micro_batch, amp=amp
    )
    if device.type == "cuda":
        num_train, num_val = len(data.train), len(data.val)
        if place_for_features(model, cut, num_train, num_val, settings) == device:
            gib += features_gib(model, num_train + num_val, cut) / distributed.world_size()
    else:  # Photos and kept features lie in the same memory.
        gib += host_memory_gib(
            model, data, cut, cache_gib=settings.cache_gib, store_gib=settings.store_gib
        )
    print(f"up to {gib:.2f} GiB of memory, with {micro_batch} photos at a time\n", flush=True)
    return micro_batch


def decode_photos(
    settings: TrainSettings,
    data: Data,
    model: ViT,
    wait_for_photos: Callable[[], None] | None,
) -> tuple[Data, PixelsAndLabels, PixelsAndLabels, PixelsAndLabels]:
    """Decode all photos once; return the data without bad photos, and train, val and test."""

    def prepare_store() -> tuple[Data, Path | None]:
        if wait_for_photos is not None:
            wait_for_photos()
        return store.prepare(
            data,
            model.preprocess,
            workers=settings.workers,
            cap_gib=settings.store_gib,
            skip_bad=settings.skip_bad,
        )

    data, file = distributed.on_rank_0(prepare_store)
    train_split, val_split, test_split = store.open_splits(
        data, file, model.preprocess, settings.workers
    )
    return data, train_split, val_split, test_split


def finish(
    recorder: Recorder,
    state: RunState,
    outcome: Outcome,
    val_split: PixelsAndLabels,
    test_split: PixelsAndLabels,
    checksum: str,
    pool: Executor,
) -> bool:
    """Test the weights to keep once, and write everything that the run leaves behind.

    `checksum` is photos_checksum of all data. Returns whether all figures could be drawn.
    """
    started = time.perf_counter()
    settings = recorder.settings
    model = recorder.model
    data = recorder.data
    out = recorder.out
    device = state.device
    peak_gib = devices.peak_gib(device)

    # Files are written from here on that may have appeared here while the run trained.
    run_folder.check_folder(out)
    # This thread writes weights while the main one predicts and has figures drawn.
    with ThreadPoolExecutor(1) as thread:
        # The kept weights become those of the model that is tested and of the one that is written.
        kept = outcome.kept
        set_trainable(state.model, outcome.weights)
        for name, parameter in trainable(model).items():
            parameter.data = outcome.weights[name]
        eval_model = working_copy(state.model, device, state.amp, train=False)
        state.free_device_memory()
        batch = devices.eval_batch(device, settings.batch_size, state.micro_batch, state.amp)
        val_logits, val_inputs = predict_photos(eval_model, val_split[0], batch=batch)
        if kept.weights != "average":  # No epoch has evaluated a mean.
            check_validation_loss(state.rows[kept.epoch], state.amp, val_logits, val_split[1])
        temperature = calibration.choose_temperature(settings.calibrate, val_logits, val_split[1])
        if temperature is not None:
            calibration.fold_temperature(temperature, model, eval_model)
        # The tail comes first, because by it the other files are known to be this run's.
        base_hash = recorder.base_hash()
        tail = thread.submit(weights.save_tail, model, out / run_folder.TAIL, base_hash)
        whole_model = thread.submit(write_model, model, out, tail, base_hash)
        test_logits, test_inputs = predict_photos(eval_model, test_split[0], batch=batch)
        num_classes = len(data.classes)
        confusion = metrics.confusion_matrix(test_logits.argmax(1), test_split[1], num_classes)
        tail.result()
        figures = report.draw_figures(
            pool, out, state.rows, kept, data, test_logits, confusion, temperature
        )
        known, threshold = reference.save_reference(
            out / run_folder.REFERENCE, model, data, outcome.inputs, val_inputs, settings.seed
        )
        scores = score_predictions(test_logits, test_split[1])
        summary: dict[str, object] = {f"test_{name}": value for name, value in scores.items()}
        summary |= summarize_run(settings, state, kept, model, data)
        summary |= calibration.summarize(temperature, len(val_split[1]), test_logits, test_split[1])
        summary |= reference.summarize(known, threshold, val_inputs, test_inputs)
    whole_model.result()
    summary["photos_checksum"] = checksum
    summary["confused"] = report.name_pairs(confusion, data.classes)
    summary["seconds"] = state.spent + time.perf_counter() - started
    summary["peak_gib"] = peak_gib
    summary["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    run_folder.write_rows(state.rows, out)
    report.write_classes(out / "classes.csv", confusion, data.classes)
    report.write_card(out, summary, name=settings.push_to_hub)
    files.write_json(out / run_folder.SUMMARY, summary)

    # All results are on the disk now, so a figure that cannot be drawn costs nothing else.
    has_all_figures = report.wait_for_figures(figures, out)
    print(summary["verdict"])
    return has_all_figures


def choose_weights(
    state: RunState, settings: TrainSettings, num_val: int
) -> tuple[metrics.Kept, dict[str, Tensor]]:
    """Return which weights the run keeps, and these weights."""
    kept = metrics.choose_kept(
        state.rows, settings.keep, num_val, ended_early=state.epoch <= settings.epochs
    )
    if kept.weights == "last":
        return kept, state.trainable_weights()
    return kept, state.kept


def check_validation_loss(
    row: dict[str, float], amp: torch.dtype | None, logits: Tensor, labels: Tensor
) -> None:
    """Check that the weights about to be tested reproduce the validation loss of their epoch.

    `row` is the epoch's row of metrics.jsonl; the logits (n, C) and labels (n,) are those of the
    validation photos, before any calibration. Raises RuntimeError if they do not.
    """
    loss = score_predictions(logits, labels)["loss"]
    # In bf16 and fp16, the loss of 30 photos changed by up to 1.7% with the rest of their batch.
    tolerance = 0.05 if amp else 1e-3
    if abs(loss - row["val_loss"]) > tolerance * max(1, row["val_loss"]):
        raise RuntimeError(
            f"the weights of epoch {row['epoch']} validate at a loss of {loss}, "
            f"not {row['val_loss']}"
        )


def write_model(model: ViT, out: Path, tail: Future[None], base_hash: str) -> None:
    """Write the whole model behind its tail, and make sure that both read back as they were."""
    tail.result()  # If the tail cannot be written, nothing else is.
    weights.save_pretrained(model, out)
    weights.check_written(model, out, base_hash)


def summarize_run(
    settings: TrainSettings, state: RunState, kept: metrics.Kept, model: ViT, data: Data
) -> dict[str, object]:
    """Return what summary.json says of the run besides the test scores, time and device."""
    return {
        "test_photos": len(data.test),
        "best_epoch": kept.epoch,  # the one whose weights are kept; 0 is the head alone
        "kept": kept.reason,
        "head_alone_val_accuracy": state.rows[0]["val_accuracy"],
        "verdict": metrics.verdict(state.rows, kept),
        "trainable_parameters": sum(p.numel() for p in trainable(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "base": model.origin.source,
        "tail_base": model.origin.base or None,  # if the base is a tail: what it is a tail of
        "base_commit": model.origin.commit,
        "is_pets": data.is_pets,
        "processes": launched_world_size(),
        "precision": precision_name(state.amp),
        "settings": asdict(settings),
        "classes": list(data.classes),
        "versions": {
            "minivit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
