"""The programs in the kernel of a notebook, which goes on afterwards as it was."""

from __future__ import annotations

import contextlib

import pytest
from conftest import ROOT

from minivit.tools.demo.drawings import draw_pets

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

SETTINGS = "--model demo --data data --device cpu --amp off --batch-size 8 --workers 2"


class Kernel:
    """A kernel that runs cells, and returns what they print."""

    def __init__(self, cwd) -> None:
        self.process, self.client = manager.start_new_kernel(cwd=str(cwd))

    def run(self, code: str, interrupt_at: str | None = None) -> str:
        """Run a cell, and interrupt it once it has printed the text `interrupt_at`."""
        printed = ""

        def receive(message) -> None:
            nonlocal printed, interrupt_at
            content = message["content"]
            printed += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            if interrupt_at is not None and interrupt_at in printed:
                interrupt_at = None
                self.process.interrupt_kernel()

        reply = self.client.execute_interactive(code, timeout=300, output_hook=receive)
        assert reply["content"]["status"] == "ok", (code, reply["content"], printed)
        assert self.process.is_alive()
        return printed

    def close(self) -> None:
        self.client.stop_channels()
        self.process.shutdown_kernel(now=True)
        self.process.cleanup_resources()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("notebook")
    draw_pets(cwd / "data", per_breed=(3, 1), seed=0, workers=2)
    with contextlib.closing(Kernel(cwd)) as kernel:
        yield kernel


STATE = "(signal.getsignal(2), signal.getsignal(15), sys.stdout, sorted(map(str, threads())))"


def test_train_and_infer_return_in_a_notebook(kernel):
    kernel.run(
        "import signal, sys, threading\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "def threads():\n"
        "    names = {each.name for each in threading.enumerate()}\n"
        "    return names - {'tqdm_monitor'}"  # which tqdm starts once for a whole process
    )
    before = kernel.run(STATE)
    printed = kernel.run(f"%run {ROOT}/train.py {SETTINGS} --epochs 1 --out run")
    assert "test accuracy" in printed
    printed = kernel.run(f"%run {ROOT}/infer.py data/nothing.jpg --model run --device cpu")
    assert "no such photo" in printed
    assert "SystemExit" not in printed
    printed = kernel.run(f"%run {ROOT}/train.py --epochs none")
    assert "expected a whole number" in printed
    assert kernel.run("from minivit.__main__ import main\nmain(['infer'])").endswith("2")
    assert kernel.run("main(['doctor', '--data', 'data'])").endswith("0")
    assert kernel.run(STATE) == before


def test_an_interrupt_stops_a_run_and_not_the_notebook(kernel):
    run = f"%run {ROOT}/train.py {SETTINGS} --epochs 50 --out interrupted"
    printed = kernel.run(run, interrupt_at="epoch 1/50")
    assert "the same command with --resume goes on" in printed
    assert "epoch 9/50" not in printed
    assert kernel.run("signal.getsignal(2) is signal.default_int_handler") == "True"


def test_an_interrupted_call_leaves_a_run_to_go_on_with(kernel):
    kernel.run(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    printed = kernel.run(
        "import minivit\n"
        "try:\n"
        "    minivit.fine_tune('demo', 'data', epochs=50, batch_size=8, amp='off', device='cpu')\n"
        "except KeyboardInterrupt as stopped:\n"
        "    print('stopped:', stopped)\n",
        interrupt_at="epoch 1/50",
    )
    assert "stopped: runs/pets holds all; the same call with resume=True goes on" in printed
    printed = kernel.run(
        "try:\n"
        "    minivit.Run.load('runs/pets')\n"
        "except minivit.UserError as error:\n"
        "    print(error)\n"
    )
    assert "runs/pets: holds a run that is not finished" in printed
