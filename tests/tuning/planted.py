"""Bad candidates, planted: what a worker must survive. Imported by the worker process by this name."""

import ctypes
import os
import time

import torch


def fine(number):
    return number + 1


def pid():
    return os.getpid()


def hangs():
    time.sleep(3600)


def exits():
    os._exit(7)


def segfaults():
    ctypes.string_at(0)


def greedy():
    return len([torch.empty(2**28) for _ in range(64)])


def raises():
    raise ValueError("planted")


def device_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def share(task, device, quick, names):
    """A share of a check whose first case is the slowest, whose "gates" kills its process and whose "no_decay" meets
    a device error."""
    from sse_tune.tuning.check import CaseResult, Report

    results = []
    for name in names:
        if name == "ordinary":
            time.sleep(1.0)
        if name == "gates":
            segfaults()
        if name == "no_decay":
            return Report((*results, CaseResult(name, "crash", "planted", {})), poisoned=True)
        results.append(CaseResult(name, "ok", None, {"pid": os.getpid()}))
    return Report(tuple(results))
