"""Feature extraction by the frozen blocks, in low precision and without autograd.

Features are the tokens that enter the cut, the first block that trains. Those of images without
augmentation, and of kept views, are computed once for all epochs where memory allows. They are kept
in host memory, or those of images without augmentation on a GPU that has much room.

Shapes: n photos of a split, B images of a batch, N tokens, D embed_dim, C classes, h, w pixels of
the model's input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..data.augment import augment
from ..data.datasets import Data
from ..data.store import Pixels
from ..model import ViT
from ..system.progress import progress_bar
from ..system.signals import stop_here
from ..system.workers import map_ahead, write_behind
from .cuda_graph import CudaGraph

# For batches up to this size, a GPU waits for the host to launch its kernels one by one.
MAX_GRAPH_BATCH = 64
CPU = torch.device("cpu")
Source = Pixels | Tensor  # pixels, uint8 (n, 3, h, w), or features (n, N, D)
Job = TypeVar("Job")


class TrainableLayers(nn.Module):
    """The layers from the cut on: logits (B, C) from features (B, N, D)."""

    def __init__(self, model: ViT, cut: int) -> None:
        super().__init__()
        self.model = model
        self.cut = cut

    def forward(self, features: Tensor) -> Tensor:
        return self.model.logits(features, start=self.cut)


class FeatureExtractor:
    """The layers before the cut: features from pixels, for up to `batch` photos at a time."""

    def __init__(self, model: ViT, cut: int, *, batch: int, compile: bool = False) -> None:
        self.model = model
        self.cut = cut
        self.batch = batch
        self.compiled = compile
        self.tokens = torch.compile(model.tokens) if compile else model.tokens
        self.previous_size = 0
        self.graph: CudaGraph[Tensor] | None = None
        self.graph_size = 0

    @torch.no_grad()
    def __call__(self, pixels: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the features (B, N, D) of pixels, uint8 (B, 3, h, w).

        With `draws` (B, 5) the images are augmented, and the next call may overwrite the result.
        """
        size = len(pixels)
        same_size_again = size == self.previous_size
        self.previous_size = size
        if draws is None or not self._can_record(pixels):
            return self.extract(pixels, draws)
        if self.graph is None or self.graph_size != size:
            if not same_size_again:
                # This may be the short last batch of an epoch: it is not worth a recording.
                return self.extract(pixels, draws)
            self.graph = None  # Free the memory of the old recording before making a new one.
            self.graph = CudaGraph(self.extract, pixels, draws)
            self.graph_size = size
        return self.graph(pixels, draws)

    def _can_record(self, pixels: Tensor) -> bool:
        if self.compiled or self.cut == 0:
            return False
        return pixels.is_cuda and len(pixels) <= MAX_GRAPH_BATCH

    def extract(self, pixels: Tensor, draws: Tensor | None) -> Tensor:
        """Normalise and augment the images, and run the frozen blocks on them."""
        images = self.model.preprocess.normalize(pixels)
        if draws is not None:
            images = augment(images, draws)
        return self.tokens(images, stop=self.cut, only_read=True)

    def compute(
        self,
        pixels: Source,
        indices: Tensor,
        draws: Tensor | None = None,
        stop_requested: Callable[[], bool] | None = None,
        keep_on: torch.device = CPU,
    ) -> Tensor | None:
        """Compute the features (n, N, D) of the photos `indices` (n,).

        They are kept on the device `keep_on`, which is the CPU, that is in host memory, or the
        model's device. The photos are augmented by `draws` (n, 5) if there are any. If a stop was
        requested in the meantime, returns None or raises StopRequested.
        """
        weight = self.model.cls_token
        shape = (len(indices), *features_shape(self.model, self.cut))
        features = torch.empty(shape, dtype=weight.dtype, device=keep_on)

        def read(rows: slice) -> list[Tensor]:
            tensors = [gather_rows(pixels, indices[rows], weight.device)]
            if draws is not None:
                tensors.append(draws[rows])
            return tensors

        batches = [slice(i, i + self.batch) for i in range(0, len(indices), self.batch)]
        on_device = to_device_ahead(read, batches, weight.device)
        progress = progress_bar(
            on_device,
            "frozen blocks",
            len(batches),
            unit="batch",
        )
        with copier(weight.device, keep_on) as copy_later:
            for tensors, rows in zip(progress, batches):
                stop_here()
                computed = self(*tensors)
                if draws is not None:
                    computed = computed.clone()  # The next call may overwrite the result.
                copy_later(computed, features[rows])
                if stop_requested is not None and stop_requested():
                    return None
        return features

    def evaluation(
        self, pixels: Source, indices: Tensor, *, keep_on: torch.device | None
    ) -> Callable[[], Iterator[Tensor]]:
        """Return a function that yields the features of images without augmentation, in batches.

        They are computed once and kept on a device, or anew in each call if that is None.
        """
        device = self.model.cls_token.device
        if keep_on is not None:
            features = self.compute(pixels, indices, keep_on=keep_on)
            assert features is not None  # Nobody could request a stop.
            kept_batches = features.split(self.batch)
            if keep_on == device:
                return lambda: iter(kept_batches)

            def kept() -> Iterator[Tensor]:
                for (batch,) in to_device_ahead(lambda batch: [batch], kept_batches, device):
                    yield batch

            return kept

        def read(batch: Tensor) -> list[Tensor]:
            return [gather_rows(pixels, batch, device)]

        def computed_anew() -> Iterator[Tensor]:
            for (batch,) in to_device_ahead(read, indices.split(self.batch), device):
                yield self(batch)

        return computed_anew


def gather_rows(source: Source, indices: Tensor, device: torch.device) -> Tensor:
    """Return source[indices] in host memory, pinned if it is to be copied to a CUDA device.

    Pinned memory is used again, which matters: touching new memory costs more than copying.
    """
    if isinstance(source, Pixels):
        if source.stored is None:  # Photos are decoded when they are asked for.
            return source[indices]
        rows = source.stored
        indices = source.rows[indices]
    else:
        rows = source
    shape = (len(indices), *rows.shape[1:])
    out = torch.empty(shape, dtype=rows.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(rows, 0, indices, out=out)


def to_device_ahead(
    read: Callable[[Job], Sequence[Tensor]], jobs: Iterable[Job], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield read(job) for each job, copied to the device.

    Jobs are read ahead in a thread, and on CUDA copied while the device computes.
    """
    if device.type != "cuda":
        with ThreadPoolExecutor(1) as pool:
            for tensors in map_ahead(pool, read, zip(jobs), ahead=2):
                yield tuple(tensor.to(device) for tensor in tensors)
        return

    def read_pinned(job: Job) -> list[Tensor]:
        with torch.cuda.device(device):  # Another thread is on the first device by default.
            return [tensor.pin_memory() for tensor in read(job)]

    copy_stream = torch.cuda.Stream(device)
    with ThreadPoolExecutor(1) as pool:
        for tensors in map_ahead(pool, read_pinned, zip(jobs), ahead=2):
            with torch.cuda.device(device), torch.cuda.stream(copy_stream):
                copies = tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
            current_stream = torch.cuda.current_stream(device)
            current_stream.wait_stream(copy_stream)
            for tensor in copies:
                tensor.record_stream(current_stream)
            yield copies


@contextlib.contextmanager
def copier(
    device: torch.device, keep_on: torch.device
) -> Iterator[Callable[[Tensor, Tensor], object]]:
    """Yield a function copy_later(tensor, target) that copies a tensor of the device to `keep_on`.

    From CUDA to the host, a thread copies while the device computes what comes next, and all is
    copied when the context ends.
    """
    if device.type != "cuda" or keep_on == device:
        yield lambda tensor, target: target.copy_(tensor)
        return
    copy_stream = torch.cuda.Stream(device)

    def copy(tensor: Tensor, target: Tensor, is_computed: torch.cuda.Event) -> None:
        # New memory is slow when it is first touched, page by page. The copy would do that with one
        # thread, and this does it with all that torch has.
        target.fill_(0)
        with torch.cuda.device(device), torch.cuda.stream(copy_stream):
            copy_stream.wait_event(is_computed)
            target.copy_(tensor)

    with write_behind() as write_later:

        def copy_later(tensor: Tensor, target: Tensor) -> None:
            write_later(copy, tensor, target, torch.cuda.current_stream(device).record_event())

        yield copy_later


def features_shape(model: ViT, cut: int) -> tuple[int, int]:
    """Return the shape (N, D) of a photo's features.

    Behind all blocks, those are only the tokens that the head reads.
    """
    config = model.config
    only_class_token = cut == config.depth and config.pool == "cls"
    return 1 if only_class_token else config.num_tokens, config.embed_dim


def features_gib(model: ViT, n: int, cut: int) -> float:
    """Return how much memory the features of n photos take, in GiB."""
    bytes_per_photo = math.prod(features_shape(model, cut)) * model.cls_token.dtype.itemsize
    return n * bytes_per_photo / 2**30


def host_memory_gib(
    model: ViT, data: Data, cut: int, *, cache_gib: float, store_gib: float
) -> float:
    """Return how much host memory training holds, in GiB.

    That is the decoded photos and the features for evaluation, each if it is within its limit.
    """
    evaluated = len(data.train) + len(data.val)
    photos = evaluated + len(data.test)
    pixels_gib = photos * 3 * math.prod(model.config.img_size) / 2**30
    evaluation_gib = features_gib(model, evaluated, cut)
    held = 0.0
    if pixels_gib <= store_gib:
        held += pixels_gib
    if evaluation_gib <= cache_gib:
        held += evaluation_gib
    return held
