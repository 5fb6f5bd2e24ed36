"""Show where the seconds of a run of train.py go.

    python benchmarks/phases.py --model FOLDER --data DIR --out DIR [--cold] [--record FILE]

This is train.py, whose other flags may follow, with a clock around some of its functions. A line
for each call says when it began and how long it took; a call inside another one is indented, and
calls in other threads have a mark of their own. With --cold, decoded photos beside the data are
removed before. With --record, the seconds of each of STAGES become a row of a file.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import functools  # noqa: E402
import importlib.abc  # noqa: E402
import importlib.machinery  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from pkgutil import resolve_name  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from minivit import commands  # noqa: E402

# The functions that are timed, by the module in which they are looked up.
FUNCTIONS = """
minivit.train: train prepare load_data photos_checksum decode_photos new_state working_copy
minivit.train: choose_micro_batch run_epochs finish check_validation_loss
minivit.train: write_model run_until_stopped
minivit.train: train_epoch predict_photos measure_speed describe_training describe_run
minivit.train: devices.pick_device devices.pick_amp weights.load_pretrained weights.save_tail
minivit.train: weights.save_pretrained weights.check_written weights.hash_outside_tail
minivit.train: store.prepare store.open_splits run_folder.begin_run run_folder.report_result
minivit.train: Recorder.begin Recorder.save_and_report Evaluation.__init__ Evaluation.evaluate
minivit.train: Evaluation.evaluate_head_alone fit_linear_head score_predictions
minivit.train: TrainingPhotos.of_epoch report.draw_figures report.wait_for_figures report.write_card
minivit.train: FeatureExtractor.compute tensors.save_tensors RunState.snapshot
minivit.train: choose_weights calibration.choose_temperature calibration.fold_temperature
minivit.train: set_trainable metrics.confusion_matrix reference.save_reference reference.summarize
minivit.train: run_folder.check_folder Evaluation.read_by_head worker_pool
minivit.train: RunState.trainable_weights RunState.update_kept summarize_run report.write_classes
"""

# The stages of a run, and the function in the main thread whose first call begins each. The one
# before ends there.
STAGES = {
    "importing torch": "import torch",
    "choosing the device and the precision": "train",
    "listing the photos and loading the model": "prepare",
    "the copy on the device, and two steps to find the memory that is needed": "working_copy",
    "the rest of the preparation, waiting for photos included": "photos_checksum",
    "features for the evaluation": "run_epochs",
    "the head alone": "Evaluation.evaluate_head_alone",
    "the epochs, with evaluation and saved states": "TrainingPhotos.of_epoch",
    "the end: test, figures, weights written and read back": "choose_weights",
}


class Clock:
    """Notes when each call of some functions begins, and how long it takes."""

    def __init__(self) -> None:
        self.depths: dict[int, int] = {}  # of the calls under way, by thread
        self.rows: list[list] = []  # begin, seconds, depth, whether in the main thread, name

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            thread = threading.get_ident()
            depth = self.depths.get(thread, 0)
            self.depths[thread] = depth + 1
            in_main = threading.current_thread() is threading.main_thread()
            began = time.perf_counter()
            row = [began - STARTED, None, depth, in_main, name]
            self.rows.append(row)
            try:
                return function(*args, **kwargs)
            finally:
                row[1] = time.perf_counter() - began
                self.depths[thread] = depth

        return call

    def wrap_functions(self) -> None:
        for line in FUNCTIONS.strip().splitlines():
            module, _, names = line.partition(": ")
            for name in names.split():
                path, _, function = f"{module}.{name}".rpartition(".")
                try:
                    owner = resolve_name(path)
                    timed = self.timed(getattr(owner, function), name)
                except AttributeError:
                    continue  # Another version of minivit does not have it.
                setattr(owner, function, timed)

    def seconds_of_stages(self) -> dict[str, float]:
        """Return how long each of STAGES took, without those that never began."""
        begins: dict[str, float] = {}
        for stage, function in STAGES.items():
            for began, _, _, in_main, name in self.rows:
                if in_main and name == function:
                    begins[stage] = began
                    break
        ends = [*begins.values(), time.perf_counter() - STARTED][1:]
        return {stage: end - begin for (stage, begin), end in zip(begins.items(), ends)}

    def print_table(self) -> None:
        print("\n  begin   seconds")
        for began, seconds, depth, in_main, name in self.rows:
            mark = "" if in_main else "(thread) "
            took = "         " if seconds is None else f"{seconds:9.3f}"
            print(f"{began:7.3f} {took}  {'  ' * depth}{mark}{name}")
        print(f"{time.perf_counter() - STARTED:7.3f}  the end")


class TimedImport(importlib.abc.MetaPathFinder):
    """Wraps the functions as soon as minivit.train has been imported."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def find_spec(self, name, path, target=None):  # noqa: ARG002
        if name not in ("minivit.train", "torch"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            if name == "minivit.train":
                self.clock.wrap_functions()

        spec.loader.exec_module = self.clock.timed(exec_module, f"import {name}")
        return spec


def record_stages(
    args: argparse.Namespace, flags: Sequence[str], seconds: dict[str, float]
) -> None:
    """Add a row of the seconds of each stage to a file."""
    from results import commit_name, figure_of, record
    from workloads import phases

    from minivit.system.device import pick_device

    name = flags[flags.index("--device") + 1] if "--device" in flags else "auto"
    device = pick_device(name)
    figures = {stage: figure_of([value], "s") for stage, value in seconds.items()}
    args.commit = args.commit or commit_name() or "unknown"
    record(args, device, phases(device.type, cold=args.cold), figures)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--commit")
    args, flags = parser.parse_known_args()
    if args.cold:
        data = Path(flags[flags.index("--data") + 1])
        shutil.rmtree(data / ".minivit", ignore_errors=True)
    clock = Clock()
    sys.meta_path.insert(0, TimedImport(clock))
    code = commands.train(flags)
    seconds = clock.seconds_of_stages()
    clock.print_table()
    print()
    for stage, value in seconds.items():
        print(f"{value:7.3f}  {stage}")
    if args.record is not None and code == 0 and len(seconds) == len(STAGES):
        record_stages(args, flags, seconds)
    sys.exit(code)


if __name__ == "__main__":
    main()
