"""The measure of memory: a known number of bytes is seen, in this process and in its own, and so is how that ends."""

from __future__ import annotations

import multiprocessing
import signal
from functools import partial

import pytest
import torch

from resonance_nn.allocator import is_freed_memory_kept, keep_freed_memory
from resonance_nn.bench.peak import Peak, _child, check_device, in_own_process, peak_memory

MB = 1 << 20


def allocate(megabytes: int) -> float:
    """Holds that much at once, twice, and half as much as its result's origin."""
    for _ in range(2):
        torch.ones(megabytes * MB // 4).sum()
    return torch.ones(megabytes * MB // 8).sum().item()


def allocate_and_tell(megabytes: int, progress) -> tuple[int, float, int, bool]:
    progress(1, 2)
    kept = is_freed_memory_kept()
    keep_freed_memory()
    allocate(4 * megabytes)  # an earlier, larger peak, whose pages the allocator keeps
    peak, _, result = peak_memory(lambda: allocate(megabytes))
    progress(2, 2)
    return peak, result, torch.get_num_threads(), kept


def peaks_of(*sizes: int) -> list[Peak[int]]:
    """After a larger peak, which must not count."""
    allocate(200)
    return [peak_memory(partial(allocate, megabytes)) for megabytes in sizes]


def test_peak_of_a_known_number_of_bytes():
    """In a process of its own: here an earlier test may have told the allocator to keep what is freed."""
    for megabytes, (peak, whole, result) in zip((64, 96), in_own_process(peaks_of, 64, 96), strict=True):
        assert abs(peak - megabytes * MB) < 8 * MB
        assert whole > peak
        assert result == megabytes * MB // 8


def test_what_is_held_before_does_not_count():
    held = torch.ones(64 * MB // 4)
    peak, whole, _ = peak_memory(lambda: held.sum().item())
    assert peak < 8 * MB
    assert whole > 64 * MB


def test_own_process_gives_result_and_progress_and_is_set_as_this_one():
    kept, told = keep_freed_memory(), []
    peak, result, threads, kept_there = in_own_process(allocate_and_tell, 64, progress=lambda *a: told.append(a))
    assert abs(peak - 64 * MB) < 8 * MB
    assert result == 64 * MB // 8
    assert told == [(1, 2), (2, 2)]
    assert threads == torch.get_num_threads()
    assert kept_there is kept


def test_own_process_has_the_allocator_as_it_comes_on_request():
    keep_freed_memory()
    assert in_own_process(is_freed_memory_kept, keep=False) is False


def fail(how: str) -> None:
    if how == "value":
        raise ValueError("value = 3: must be 4")
    if how == "memory":
        raise torch.OutOfMemoryError("tried to allocate")
    if how == "cpu memory":
        torch.empty(1 << 60)
    if how == "bug":
        raise KeyError("a bug")
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "killed":
        signal.raise_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("value", ValueError, "^value = 3: must be 4$"),
        ("memory", ChildProcessError, "out of memory"),
        ("cpu memory", ChildProcessError, "out of memory"),
        ("bug", RuntimeError, "KeyError: 'a bug'"),
    ],
)
def test_failures_are_told(how, error, text):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    _child(theirs, (torch.get_num_threads(), False), fail, (how,), False)
    kind, message, *_ = ours.recv()
    with pytest.raises(error, match=text):
        raise {"value": ValueError, "memory": ChildProcessError, "error": RuntimeError}[kind](message)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("bug", RuntimeError, "KeyError: 'a bug'"),
        ("killed", ChildProcessError, "killed by signal 9"),
        ("interrupted", ChildProcessError, "ended with code 0"),
    ],
)
def test_ends_of_a_process_of_its_own(how, error, text):
    with pytest.raises(error, match=text) as caught:
        in_own_process(fail, how)
    if how == "bug":
        assert "in fail" in caught.value.__notes__[0]


def test_devices_whose_peak_nothing_tells():
    check_device("cpu")
    with pytest.raises(ValueError, match="device = 'mps'"):
        check_device("mps")
