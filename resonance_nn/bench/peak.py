"""Peak memory of a call, and a process of its own for it, so that the peak is that call's and no other's."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from resonance_nn.allocator import is_freed_memory_kept, keep_freed_memory

_Result = TypeVar("_Result")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], _Result], device: str = "cpu") -> tuple[int, _Result]:
    """Call ``function``: the most memory it held above what was held before, in bytes, and its result.

    CUDA: of tensors, by torch's own count. Linux: resident memory, the high-water mark of the kernel, reset before the
    call. Elsewhere the mark cannot be reset, and an earlier peak of this process hides a later one: use
    :func:`in_own_process`.

    Raises:
        ValueError: the system tells no peak.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start, result
    give_back_freed_memory()  # or the call takes pages that were counted before it
    start = resident("VmRSS" if _reset_mark() else "VmHWM")
    result = function()
    return max(0, resident("VmHWM") - start), result


def _reset_mark() -> bool:
    """Make the high-water mark what is resident now, and say whether the system can do that (proc(5))."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def resident(field: str) -> int:
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


def give_back_freed_memory() -> None:
    """Ask glibc to return freed pages to the system; nothing where the C library is another."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def in_own_process(
    function: Callable[..., _Result], *args: Any, progress: Callable[[int, int], None] | None = None
) -> _Result:
    """``function(*args)`` in a fresh process with this one's number of threads and allocator setting.

    Args:
        function: of a module, not a closure; it, ``args`` and the result are pickled.
        progress: told what the function, which then takes an argument ``progress`` too, tells about (done, total).

    Raises:
        ValueError: as the function raises it.
        ChildProcessError: the process was ended, as the system does when memory runs out.
        RuntimeError: any other failure, with its name.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    settings = torch.get_num_threads(), is_freed_memory_kept()
    process = context.Process(target=_child, args=(theirs, settings, function, args, progress is not None))
    process.start()
    theirs.close()
    try:
        while (message := ours.recv())[0] == "progress":
            assert progress is not None
            progress(*message[1])
    except EOFError:
        process.join()
        raise ChildProcessError(
            f"{function.__name__}: its process ended with code {process.exitcode} and no result"
            + ("; the system ends one that asks for more memory than there is" if process.exitcode == -9 else "")
        ) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        ours.close()
    kind, value = message
    if kind == "result":
        return value
    raise (ValueError if kind == "ValueError" else RuntimeError)(value)


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
    except ValueError as error:
        connection.send(("ValueError", str(error)))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        connection.close()
