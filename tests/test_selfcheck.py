from __future__ import annotations

import pytest
import torch

from minivit import __main__, model
from minivit.training import state
from minivit.training import step as loop


def check(capsys, *flags):
    code = __main__.main(["selfcheck", "--device", "cpu", *flags])
    return code, [
        line for line in capsys.readouterr().out.splitlines() if line.endswith(("ok", "FAILED"))
    ]


@pytest.fixture(autouse=True)
def deterministic_only_here():
    yield
    torch.use_deterministic_algorithms(False)


def test_every_check_is_within_its_bound(tiny_folder, capsys):
    code, lines = check(capsys, "--model", str(tiny_folder), "--amp", "bf16")
    assert code == 0
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines)


def wrong_step(real):
    def step(*args, micro_batch, **kwargs):
        found = real(*args, micro_batch=micro_batch, **kwargs)
        if micro_batch == 1:
            args[0].head.weight.grad *= 1.001
        return found

    return step


DEFECTS = {
    "accumulation": (loop, "train_step", wrong_step, "micro-batches of 1 "),
    "resume": (
        state.State,
        "load",
        lambda real: lambda self, tensors, about: real(self, tensors, about | {"step": 0}),
        "went on",
    ),
    "attention": (
        model.Attention,
        "forward",
        lambda real: lambda self, *args: real(self, *args) * (1 + 1e-4),
        "fused against explicit",
    ),
}


@pytest.mark.parametrize("owner, name, broken, line", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found(tiny_folder, capsys, monkeypatch, owner, name, broken, line):
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    code, lines = check(capsys, "--model", str(tiny_folder), "--amp", "off")
    assert code == 1
    assert any(line in found for found in lines if found.endswith("FAILED"))
    assert any(found.endswith("ok") for found in lines)
