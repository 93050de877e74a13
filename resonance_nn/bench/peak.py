"""Peak memory of a call, and a process of its own for it, so that the peak is that call's and no other's."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from resonance_nn.allocator import is_freed_memory_kept, keep_freed_memory, release_freed_memory
from resonance_nn.bench.common import Progress

_Result = TypeVar("_Result")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple, Generic[_Result]):
    """Bytes at the peak of a call ``above`` those held before it, bytes of the ``whole`` process then, and what the
    call returned."""

    above: int
    whole: int
    result: _Result


def peak_memory(function: Callable[[], _Result], device: str = "cpu") -> Peak[_Result]:
    """Call ``function`` and tell the most memory it held.

    CUDA: of tensors, by torch's own count. Linux: resident memory, the high-water mark of the kernel, reset before the
    call. Elsewhere the mark cannot be reset, and an earlier peak of this process hides a later one: use
    :func:`in_own_process`.

    Raises:
        ValueError: as :func:`check_device`.
    """
    check_device(device)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        whole = torch.cuda.max_memory_allocated(device)
    else:
        release_freed_memory()  # or the call takes pages that were counted before it
        start = _resident("VmRSS" if _reset_mark() else "VmHWM")
        result = function()
        whole = _resident("VmHWM")
    return Peak(max(0, whole - start), whole, result)


def check_device(device: str) -> None:
    """Raise ValueError if nothing tells the peak memory of this device, or of this system."""
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r}: its peak memory cannot be read; use cpu or cuda")
    if torch.device(device).type == "cpu":
        _resident("VmRSS")


def _reset_mark() -> bool:
    """Make the high-water mark what is resident now, and say whether the system can do that (proc(5))."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def _resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since the mark was reset. Where there is no
    /proc, both are the most since the process began."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError as error:
        raise ValueError(f"peak memory: {platform.system()} does not tell it; measure on Linux or macOS") from error
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if platform.system() == "Darwin" else 1024 * largest


def in_own_process(
    function: Callable[..., _Result], *args: Any, progress: Progress | None = None, keep: bool | None = None
) -> _Result:
    """``function(*args)`` in a fresh process with this one's number of threads.

    Args:
        function: of a module, not a closure; it, ``args`` and the result are pickled.
        progress: told what the function, which then takes an argument ``progress`` too, tells about (done, total).
        keep: whether the C library keeps freed memory there; None means as in this process.

    Raises:
        ValueError: as the function raises it.
        ChildProcessError: it found no memory, or its process was ended, as the system does when memory runs out.
        RuntimeError: any other failure, with its name, and its traceback as a note.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    settings = torch.get_num_threads(), is_freed_memory_kept() if keep is None else keep
    process = context.Process(target=_child, args=(theirs, settings, function, args, progress is not None))
    process.start()
    theirs.close()
    try:
        while (message := ours.recv())[0] == "progress":
            if progress is not None:
                progress(*message[1])
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}, most likely for want of memory" if code < 0 else f"ended with code {code}"
        raise ChildProcessError(f"the process that measured {how}") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        ours.close()
    kind, value, *note = message
    if kind == "result":
        return value
    error = {"value": ValueError, "memory": ChildProcessError}.get(kind, RuntimeError)(value)
    for text in note:
        error.add_note(text)
    raise error


def _child(
    connection: Connection, settings: tuple[int, bool], function: Callable[..., Any], args: Any, tells: bool
) -> None:
    threads, keep = settings
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    try:
        more = {"progress": lambda done, total: connection.send(("progress", (done, total)))} if tells else {}
        connection.send(("result", function(*args, **more)))
    except KeyboardInterrupt:  # the parent has it too
        pass
    except ValueError as error:
        connection.send(("value", str(error)))
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            connection.send(("memory", "out of memory"))
        else:
            connection.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
    finally:
        connection.close()
