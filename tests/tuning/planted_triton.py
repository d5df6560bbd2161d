"""A Triton template that does one thing wrong on a GPU, and the jobs that run it: imported by workers by this name.

It is `combine_gradients`, followed by a kernel that spoils d_v. One launch, so what is caught is what that kernel does.
"""

import contextlib

import torch
import triton
import triton.language as tl

from sse_tune.space import Constraint, Param, Space
from sse_tune.templates import registry
from sse_tune.templates.registry import Template
from sse_tune.templates.triton import combine_gradients
from sse_tune.tuning import ahead, jobs

BACKEND = "planted_triton"
STAGE = "combine_gradients"
LATE_TOKENS = 1024  # more than any case of the quick admission has, fewer than what is timed
FAULTS = (
    "none", "hangs", "out_of_bounds", "late_out_of_bounds", "wrong_gradient", "unordered", "overwritten_in_flight"
)  # fmt: skip


@triton.jit
def never_ends_kernel(flag):
    """Waits for what nobody writes; by atomics, so that no compiler takes the loop to have no effect."""
    b_flag = tl.atomic_add(flag, 0)
    while b_flag == 0:
        b_flag = tl.atomic_add(flag, 0)


@triton.jit
def out_of_bounds_kernel(out):
    """Stores 2**40 values before a tensor, where no allocation ends."""
    o_far = tl.arange(0, 128).to(tl.int64) - 1099511627776
    tl.store(out + o_far, tl.zeros((128,), tl.float32).to(out.dtype.element_ty))


@triton.jit
def scale_kernel(out, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(out + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(out + o, (b * FACTOR).to(out.dtype.element_ty), mask=o < n)


@triton.jit
def unordered_kernel(out, arrivals, n, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Every block takes its turn as it comes, and scales its values by how it came: within the tolerance each time,
    and with other bits each time."""
    b_turn = 0
    for _ in range(8):
        b_turn = tl.atomic_add(arrivals, 1)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(out + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(out + o, (b * (1.0 + EPS * (b_turn % 2))).to(out.dtype.element_ty), mask=o < n)


@triton.jit
def overwritten_in_flight_kernel(x, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A tile with two uses in a pipelined loop, to which Triton 3.6 gives a slot too few (`sse_tune/races.py`)."""
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    b_square = tl.full([BLOCK], 1.0, tl.float32)
    b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, D, BLOCK, num_stages=STAGES):
        b = tl.load(x + o_r[:, None] * D + (i + o_k)[None, :])
        b32 = b.to(tl.float32)
        b_square += tl.sum(b32 * b32, 1)
        b_gram = tl.dot(b, tl.trans(b), b_gram)
    tl.store(out + o_r[:, None] * BLOCK + o_k[None, :], b_gram / b_square[:, None])


def run(call, tensors):
    combine_gradients.run(call, tensors)
    fault, out = call.config["fault"], tensors["d_v"]
    n, block = out.numel(), 128
    number = torch.zeros(1, dtype=torch.int32, device=out.device)

    def launch(kernel, blocks, num_stages=1, **arguments):
        call.launch(kernel, (blocks,), arguments, num_warps=4, num_stages=num_stages)

    if fault == "hangs":
        launch(never_ends_kernel, 1, flag=number)
    if fault == "out_of_bounds" or (fault == "late_out_of_bounds" and out.shape[0] > LATE_TOKENS):
        launch(out_of_bounds_kernel, 1, out=out)
    if fault == "wrong_gradient":
        launch(scale_kernel, triton.cdiv(n, block), out=out, n=n, FACTOR=1.01, BLOCK=block)
    if fault == "unordered":
        # less than the tolerance of either dtype, and more than half of what the last bit means
        eps = 2.0**-8 if out.dtype == torch.bfloat16 else 2.0**-19
        launch(unordered_kernel, triton.cdiv(n, block), out=out, arrivals=number, n=n, EPS=eps, BLOCK=block)
    if fault == "overwritten_in_flight":
        scratch = torch.empty((64, 64), dtype=torch.float32, device=out.device)
        arguments = dict(x=out, out=scratch, D=n // 4096 * 64, BLOCK=64, STAGES=2)
        launch(overwritten_in_flight_kernel, 1, num_stages=2, **arguments)


TEMPLATE = Template(
    BACKEND, "planted", STAGE, ("gla", "gdn"),
    Space(
        (
            Param("fault", FAULTS, "none", "what it does wrong"),
            Param("block_t", (2,), 2, "tokens per block"),
            Param("block_d", (1024,), 1024, "values of a token per block"),
            Param("num_warps", (2, 4, 8), 4, "warps per block"),
        ),
        (Constraint("faults are planted with 4 warps", lambda p, c, d: c["fault"] == "none" or c["num_warps"] == 4),),
    ),
    run, (__name__,),
)  # fmt: skip


@contextlib.contextmanager
def installed():
    """The template as a backend of its own, beside Triton's for the other stages."""
    registry._BACKENDS[BACKEND] = ("triton", "staged", (__name__,))
    registry._BESIDE[BACKEND] = ("triton",)
    try:
        yield
    finally:
        del registry._BACKENDS[BACKEND], registry._BESIDE[BACKEND]
        registry.templates_of.cache_clear()
        registry.default_plan.cache_clear()


def check_and_time(*arguments):
    """`jobs.check_and_time` where the worker knows the template."""
    with installed():
        return jobs.check_and_time(*arguments)


def check_and_time_stage(*arguments):
    with installed():
        return jobs.check_and_time_stage(*arguments)


def compile_choice(*arguments):
    with installed():
        return ahead.compile_choice(*arguments)
