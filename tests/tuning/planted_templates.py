"""Templates that do one thing wrong, and the jobs that run with them: imported by the worker process by this name."""

import contextlib
import ctypes
import time

import torch

from sse_tune.space import Param, Space
from sse_tune.templates import registry
from sse_tune.templates.registry import Template
from sse_tune.templates.torch import whole
from sse_tune.tuning import jobs

FAULTS = ("none", "hangs", "segfaults", "wrong_gradient", "no_memory", "device_error")


class _Scaled(torch.autograd.Function):
    """Right forward, a gradient 1 % too large backward."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return 1.01 * gradient


def run(call, tensors):
    fault = call.config["fault"]
    if fault == "hangs":
        time.sleep(3600)
    if fault == "segfaults":
        ctypes.string_at(0)
    if fault == "no_memory":
        raise MemoryError
    if fault == "device_error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if fault == "wrong_gradient":
        tensors = {**tensors, "v": _Scaled.apply(tensors["v"])} if tensors["v"].requires_grad else tensors
    whole.TEMPLATE.run(call, tensors)


TEMPLATE = Template(
    "planted", "planted", "whole", ("gla", "gdn"),
    Space((Param("fault", FAULTS, "none", "what it does wrong"), *(
        Param(param.name, (param.default,), param.default, param.doc) for param in whole.SPACE.params
    ))),
    run, (__name__,),
)  # fmt: skip


@contextlib.contextmanager
def installed():
    """The templates as a backend of their own."""
    registry._BACKENDS["planted"] = ("torch", "whole", (__name__,))
    try:
        yield
    finally:
        del registry._BACKENDS["planted"]
        registry.templates_of.cache_clear()


def check_and_time(*arguments):
    """`jobs.check_and_time` where the worker knows the templates."""
    with installed():
        return jobs.check_and_time(*arguments)


def time_in_turn(*arguments):
    with installed():
        return jobs.time_in_turn(*arguments)


def check(*arguments):
    with installed():
        return jobs.check(*arguments)
