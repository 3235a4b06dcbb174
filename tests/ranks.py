"""Several ranks on this machine: real processes, gloo between them.

They are forked from a server that has imported what they need, so that its seconds are paid once. As under
torchrun, a rank finds its place in the environment.
"""

import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

PRELOAD = ["conftest", "ranks", "leap_pl.cli.fit", "transformers.models.llama.modeling_llama"]


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, folder: Path, seconds: float = 600
) -> list[Any]:
    """What ``function(rank, *arguments)`` returned on each of ``size`` ranks (plain values and tensors).

    What a rank prints goes to ``folder/rank-N.txt``.

    Raises:
        AssertionError: A rank failed, or they have not all ended after ``seconds``; with their last words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, size, port, folder, function, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 5)  # the others may wait for it for ever
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    if any(process.exitcode for process in processes):
        ends = [f"--- rank {rank} ({process.exitcode})" for rank, process in enumerate(processes)]
        # A crash in native code is told with the stack of every thread and all modules, which is long.
        words = [(folder / f"rank-{rank}.txt").read_text()[-16000:] for rank in range(size)]
        raise AssertionError("\n".join(line for rank in zip(ends, words, strict=True) for line in rank))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(
    rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    words = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "tests",
        "LEAP_PL_COMPILE": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    rank_zero_only.rank = rank  # set from the environment, but when it was imported
    torch.set_num_threads(1)
    try:
        torch.save(function(rank, *arguments), folder / f"rank-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # no waiting for the others in a destructor
