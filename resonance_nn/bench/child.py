"""A measurement in a process of its own: fresh memory, and the allocator as the C library starts it."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Progress = Callable[[int, int], None]


def in_child(function: Callable[..., T], *arguments: Any, progress: Progress | None = None) -> T:
    """``function(*arguments)`` in a new process with as many threads, or ``function(*arguments, progress)``.

    The function is one of a module, and all that goes in and out can be pickled.

    Raises:
        ChildProcessError: the process died; on Linux most likely killed for want of memory.
        Exception: whatever the function raises.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    work = (sender, torch.get_num_threads(), function, arguments, progress is not None)
    process = context.Process(target=_work, args=work)
    process.start()
    sender.close()
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "progress" and progress is not None:
                progress(*value)
            elif kind == "error":
                raise value
            else:
                return value
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}, most likely for want of memory" if code < 0 else f"ended with code {code}"
        raise ChildProcessError(f"the process that measured {how}") from None
    finally:
        receiver.close()
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()


def _work(
    sender: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...], reports: bool
) -> None:
    torch.set_num_threads(threads)

    def report(done: int, total: int) -> None:
        sender.send(("progress", (done, total)))

    try:
        sender.send(("value", function(*arguments, report) if reports else function(*arguments)))
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(("error", error))
