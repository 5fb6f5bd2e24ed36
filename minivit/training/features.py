"""What is frozen: held in the precision that it computes in, run without a graph, and computed once where it can be kept.

Shapes: A all photos, n of a split, B of a batch, N tokens, D embed_dim, C classes, K views, h, w pixels of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.augment import augment
from ..data.datasets import Data
from ..data.store import Pixels
from ..model import ViT
from ..system.prefetch import Job, read_ahead

REPLAYED = (
    64  # photos at once, up to which a GPU waits for the host to launch its kernels one by one
)
Source = Pixels | Tensor  # pixels, uint8 (n, 3, h, w), by index


class Tail(nn.Module):
    """What trains: logits (B, C) from the tokens (B, N, D) that enter block `cut`."""

    def __init__(self, model: ViT, cut: int) -> None:
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.logits(tokens, start=self.cut)


def take(source: Source, index: Tensor, device: torch.device) -> Tensor:
    """Return source[index]: for CUDA in pinned memory, which is used again, as to touch new memory costs more than to copy."""
    rows = source.stored if isinstance(source, Pixels) else source
    if rows is None:
        return source[index]
    index = source.rows[index] if isinstance(source, Pixels) else index
    out = torch.empty(
        (len(index), *rows.shape[1:]), dtype=rows.dtype, pin_memory=device.type == "cuda"
    )
    return torch.index_select(rows, 0, index, out=out)


def on_device(
    read: Callable[[Job], Sequence[Tensor]], jobs: Iterable[Job], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield read(job) for each job, on the device: read ahead in a thread, and copied there while the device computes."""
    if device.type != "cuda":
        for tensors in read_ahead(read, jobs, workers=1, ahead=0, quiet=False):
            yield tuple(tensor.to(device) for tensor in tensors)
        return

    def pinned(job: Job) -> list[Tensor]:
        with torch.cuda.device(device):  # a thread of its own is on the first one
            return [tensor.pin_memory() for tensor in read(job)]

    side = torch.cuda.Stream(device)
    for tensors in read_ahead(pinned, jobs, workers=1, ahead=0, quiet=False):
        with torch.cuda.stream(side):
            there = tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
        torch.cuda.current_stream(device).wait_stream(side)
        for tensor in there:
            tensor.record_stream(torch.cuda.current_stream(device))
        yield there


class Frozen:
    """The blocks before the cut at work: a model's tokens that enter block `cut`, up to `batch` photos at a time."""

    def __init__(self, model: ViT, cut: int, *, batch: int, compile: bool = False) -> None:
        self.model, self.cut, self.batch, self.compiled = model, cut, batch, compile
        self.run = torch.compile(model.tokens) if compile else model.tokens
        self.last = 0
        self.replay: Replay | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the tokens (B, N, D) of pixels, uint8 (B, 3, h, w), augmented by draws (B, 5) if any.

        With draws, the next call may write over them.
        """
        n, last, self.last = len(pixels), self.last, len(pixels)
        if (
            draws is None
            or not self.cut
            or self.compiled
            or pixels.device.type != "cuda"
            or n > REPLAYED
        ):
            return self.tokens(pixels, draws)
        if self.replay is None or self.replay.size != n:
            if n != last:  # perhaps the last batch of an epoch, which stands alone
                return self.tokens(pixels, draws)
            self.replay = None  # whose memory is free to be used again
            self.replay = Replay(self.tokens, pixels, draws)
        return self.replay(pixels, draws)

    def tokens(self, pixels: Tensor, draws: Tensor | None) -> Tensor:
        images = self.model.preprocess.normalize(pixels)
        return self.run(
            images if draws is None else augment(images, draws), stop=self.cut, only_read=True
        )

    def view(
        self, _: int, pixels: Source, draws: Tensor, stopped: Callable[[], bool]
    ) -> Tensor | None:
        """Return the tokens (n, N, D) of one view of all photos, augmented by its draws (n, 5)."""
        return self.keep(pixels, torch.arange(len(draws)), draws, stopped)

    @overload
    def keep(self, pixels: Source, own: Tensor, draws: Tensor | None = None) -> Tensor: ...

    @overload
    def keep(
        self, pixels: Source, own: Tensor, draws: Tensor | None, stopped: Callable[[], bool]
    ) -> Tensor | None: ...

    def keep(
        self,
        pixels: Source,
        own: Tensor,
        draws: Tensor | None = None,
        stopped: Callable[[], bool] = bool,
    ) -> Tensor | None:
        """Compute the tokens of photos, those of the indices `own` (n,), augmented by draws (n, 5) if any: (n, N, D).

        They lie in host memory. None if `stopped` says so in the meantime.
        """
        weight, jobs, start = self.model.cls_token, own.split(self.batch), 0
        shape = (len(own), *tokens_shape(self.model, self.cut))
        # Touched by all cores at once: memory that a copy is the first to touch comes page by page. To pin it takes longer.
        kept = torch.empty(shape, dtype=weight.dtype).fill_(0)
        places = torch.arange(len(own)).split(self.batch)
        read = lambda i: [
            take(pixels, jobs[i], weight.device),
            *(() if draws is None else [draws[places[i]]]),
        ]
        moved = on_device(read, range(len(jobs)), weight.device)
        for found in tqdm(moved, "frozen blocks", len(jobs), unit="batch", leave=False):
            tokens = self(*found)
            kept[start : start + len(tokens)].copy_(tokens)
            start += len(tokens)
            if stopped():
                return None
        return kept

    def evaluation(
        self, pixels: Source, own: Tensor, *, keep: bool
    ) -> Callable[[], Iterator[Tensor]]:
        """Return a function that gives the tokens of photos as they are, in batches: computed once, or anew if not `keep`."""
        parts = self.keep(pixels, own).split(self.batch) if keep else own.split(self.batch)

        def tokens() -> Iterator[Tensor]:
            device = self.model.cls_token.device
            for (found,) in on_device(
                lambda part: [part if keep else take(pixels, part, device)], parts, device
            ):
                yield found if keep else self(found)

        return tokens


class Replay:
    """A function of CUDA tensors of one size: its kernels are recorded once, and started together each time.

    A result is written over by the next. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.size, self.inputs, self.graph = (
            len(inputs[0]),
            [x.clone() for x in inputs],
            torch.cuda.CUDAGraph(),
        )
        device = inputs[0].device  # which need not be the first
        ours, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            function(*self.inputs)  # sets up what cannot be recorded
            torch.cuda.empty_cache()  # as what is recorded has memory of its own
            self.graph.capture_begin(
                capture_error_mode="thread_local"
            )  # other threads may copy to the device meanwhile
            try:
                self.result = function(*self.inputs)
            finally:
                self.graph.capture_end()
        ours.wait_stream(side)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, given in zip(self.inputs, inputs):
            held.copy_(given)
        self.graph.replay()
        return self.result


def tokens_shape(model: ViT, cut: int) -> tuple[int, int]:
    """Return the shape (N, D) of a photo's tokens at the cut: behind all blocks, those that the head reads."""
    c = model.config
    return (1 if cut == c.depth and c.pool == "cls" else c.num_tokens), c.embed_dim


def held_gib(model: ViT, data: Data, cut: int, *, cache_gib: float, store_gib: float) -> float:
    """Return what training holds in host memory: decoded photos, and the tokens to evaluate with, each if within its limit."""
    scored = len(data.train) + len(data.val)
    pixels = (scored + len(data.test)) * 3 * math.prod(model.config.img_size) / 2**30
    tokens = token_gib(model, scored, cut)
    return (pixels if pixels <= store_gib else 0) + (tokens if tokens <= cache_gib else 0)


def token_gib(model: ViT, n: int, cut: int = 0) -> float:
    """Return what n photos' tokens take of host memory."""
    return n * math.prod(tokens_shape(model, cut)) * model.cls_token.dtype.itemsize / 2**30
