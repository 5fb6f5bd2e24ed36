"""The command `selfcheck` passes on this machine and finds each planted defect."""

from __future__ import annotations

import pytest
import torch

from minivit import __main__
from minivit.model import Attention
from minivit.tools.selfcheck import checks
from minivit.training.state import RunState


def selfcheck(capsys, *flags):
    code = __main__.main(["selfcheck", "--device", "cpu", *flags])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.endswith(("ok", "FAILED"))]


@pytest.fixture(autouse=True)
def deterministic_only_here():
    yield
    torch.use_deterministic_algorithms(False)


def test_every_check_is_within_its_bound(tiny_folder, capsys):
    code, lines = selfcheck(capsys, "--model", str(tiny_folder), "--amp", "bf16")
    assert code == 0
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines)


def inexact_attention(forward):
    return lambda self, *args: forward(self, *args) * (1 + 1e-4)


def inexact_gradients_of_single_photos(train_step):
    def step(network, *args, micro_batch, **kwargs):
        result = train_step(network, *args, micro_batch=micro_batch, **kwargs)
        if micro_batch == 1:
            network.head.weight.grad *= 1.001
        return result

    return step


def forgets_its_step(restore):
    return lambda self, tensors, about: restore(self, tensors, about | {"step": 0})


DEFECTS = {
    "attention": (Attention, "forward", inexact_attention, "fused against explicit"),
    "accumulation": (
        checks,
        "train_step",
        inexact_gradients_of_single_photos,
        "micro-batches of 1 ",
    ),
    "resume": (RunState, "restore", forgets_its_step, "interrupted and resumed"),
}


@pytest.mark.parametrize("owner, name, broken, check", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found(tiny_folder, capsys, monkeypatch, owner, name, broken, check):
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    code, lines = selfcheck(capsys, "--model", str(tiny_folder), "--amp", "off")
    assert code == 1
    assert any(check in line for line in lines if line.endswith("FAILED"))
    assert any(line.endswith("ok") for line in lines)
