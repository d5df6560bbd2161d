"""TileLang's gradients of GLA: two compilers' kernels in one stage, and the room two blocks need. Needs no GPU."""

import concurrent.futures
import dataclasses
import multiprocessing
import re

import pytest

from sse_tune.compile import REGISTERS_PER_BLOCK, compile_stage, limits_reason, record_launches
from sse_tune.compilers import tilelang
from sse_tune.device import ARCHS
from sse_tune.errors import ConstraintError
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import Program, default_plan, find_template, validate_plan
from sse_tune.templates.tilelang.gla_gradients import smem_bytes

MAIN = Problem.preset("sse-gla-128")
NARROW = Problem(
    rule="gla", seq_len=3001, num_heads=3, head_dim=64, head_dim_v=192, dtype="fp16", num_sequences=7,
    num_partitions=5, top_k=2, read_k=3, shared=False, norm="after",
)  # fmt: skip
WIDE = MAIN.replace(head_dim=256, head_dim_v=256)
OUTER = Config(chunk_size=64, state_dtype="io", states="store", split=0)
SMEM_OF_A_MULTIPROCESSOR = 228 * 1024  # sm_90; each block takes a KiB more than it asks for
TEMPLATE = find_template("tilelang", "gla_gradients")
CASES = {
    "main-sm_80": (MAIN, "sm_80", {}),
    "main-sm_90": (MAIN, "sm_90", {}),
    "main-sm_100": (MAIN, "sm_100", {}),
    "four warps": (MAIN, "sm_90", {"num_warps": 4}),
    "narrow fp16": (NARROW, "sm_90", {}),
    "wide": (WIDE, "sm_90", {}),
}
# stack bytes of a thread: two blocks of eight warps leave 128 registers
MAX_SPILL_BYTES = {"main-sm_90": 88, "main-sm_100": 64}


def config_of(problem, arch, changes):
    return TEMPLATE.space.default(problem, ARCHS[arch], OUTER).replace(**changes)


def compiled(problem, arch, changes):
    return compile_stage(TEMPLATE, problem, OUTER, config_of(problem, arch, changes), arch)


@pytest.fixture(scope="module")
def artifacts():
    """Compiled side by side: one takes half a minute."""
    if tilelang.missing() is not None:
        pytest.skip(f"nothing to compile with: {tilelang.missing()}")
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = {name: pool.submit(compiled, *case) for name, case in CASES.items()}
        return {name: future.exception() or future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", CASES)
def test_compiles_within_its_limits(name, artifacts):
    problem, arch, changes = CASES[name]
    artifact, config = artifacts[name], config_of(problem, arch, changes)
    assert not isinstance(artifact, BaseException), artifact
    assert limits_reason(artifact, ARCHS[arch]) is None
    near = artifact.kernels[0]
    assert near.smem_bytes <= smem_bytes(problem, Config({**OUTER, **config}))
    assert near.registers * near.num_warps * 32 * config["blocks_per_sm"] <= REGISTERS_PER_BLOCK
    assert near.spill_bytes <= MAX_SPILL_BYTES.get(name, 0)


def test_two_blocks_share_a_multiprocessor(artifacts):
    near = artifacts["main-sm_90"].kernels[0]
    assert 2 * (near.smem_bytes + 1024) <= SMEM_OF_A_MULTIPROCESSOR


def launches_of(problem):
    return record_launches(TEMPLATE, problem, OUTER, config_of(problem, "sm_90", {}))


@pytest.mark.parametrize(
    ("problem", "others"),
    [(MAIN, ["gla_far_kernel", "gla_slice_sums_kernel"]), (NARROW, ["gla_far_kernel"])],
    ids=["slices", "one slice"],
)
def test_triton_runs_what_is_left(problem, others):
    near, *rest = launches_of(problem)
    assert isinstance(near.kernel, Program)
    assert [launch.kernel.__name__ for launch in rest] == others
    for launch in rest:
        shared = [name for name in ("far", "sums") if name in launch.args]
        assert shared and all(launch.args[name] is near.args[name] for name in shared)
    far = rest[0]
    slices = problem.key_dim // far.args["BK"]
    assert far.args["far"].shape == (near.grid[0] * slices,) == (far.args["n_flags"],)
    assert far.grid[0] * far.args["FLAGS"] >= far.args["n_flags"]


def test_the_binary_has_an_argument_for_each_parameter(artifacts):
    problem, arch, changes = CASES["main-sm_90"]
    (near, *_) = record_launches(TEMPLATE, problem, OUTER, config_of(problem, arch, changes))
    built = tilelang.build(near.kernel, arch)
    assert {parameter.name for parameter in built.parameters} <= set(near.args)


def test_its_sources_are_those_of_both_compilers():
    others = find_template("triton", "gla_gradients_sliced")
    assert set(others.sources) < set(TEMPLATE.sources)
    near = launches_of(MAIN)[0].kernel
    assert set(near.sources) == set(TEMPLATE.sources) - set(others.sources)


def test_it_mixes_with_other_stages():
    plan = default_plan(MAIN, ARCHS["sm_90"], "tilelang", OUTER)
    assert plan.stages["gradients"].template == "gla_gradients"
    validate_plan(plan, MAIN, ARCHS["sm_90"])


@pytest.mark.parametrize(
    ("problem", "changes", "rule"),
    [
        (MAIN.replace(dtype="fp32"), {}, "16-bit operands"),
        (MAIN.replace(head_dim=96), {}, "K must be a multiple of 64"),
        (MAIN.replace(head_dim_v=80), {}, "V must be a multiple of 64"),
        (MAIN.replace(head_dim_v=512), {}, "have shared memory for their tiles"),
        (MAIN, {"chunk_size": 128}, "chunk_size must be 64"),
        (MAIN, {"state_dtype": "fp32"}, "stored states must be of the problem's dtype"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_with_its_reason(problem, changes, rule):
    with pytest.raises(ConstraintError, match=rule):
        TEMPLATE.space.default(problem, ARCHS["sm_90"], OUTER.replace(**changes))


def test_gates_of_another_dtype_are_another_program_that_fits_too():
    """Copies do not convert: the code depends on the dtypes of both streams' gates. Calls may bring fp32 ones."""
    near, names = launches_of(MAIN)[0].kernel, ("G_DTYPE", "SHARED_G_DTYPE")
    constants = dict(near.constants)
    assert [constants[name] for name in names] == ["bfloat16", "bfloat16"]
    other = dataclasses.replace(
        near, constants=tuple(sorted({**constants, **dict.fromkeys(names, "float32")}.items()))
    )
    if tilelang.missing() is not None:
        pytest.skip(f"nothing to compile with: {tilelang.missing()}")
    assert tilelang.cache_key(near, "sm_90") != tilelang.cache_key(other, "sm_90")
    built = tilelang.build(other, "sm_90")
    config = config_of(MAIN, "sm_90", {})
    assert built.dynamic_smem_bytes + built.static_smem_bytes <= smem_bytes(MAIN, Config({**OUTER, **config}))
    assert built.registers * config["num_warps"] * 32 * config["blocks_per_sm"] <= REGISTERS_PER_BLOCK
    assert built.stack_bytes <= MAX_SPILL_BYTES["main-sm_90"]


@pytest.mark.parametrize("name", ["gla_gradients", "gla_decay_rows"])
def test_gates_are_copied_in_the_background(name):
    """A load by each thread, converted and put into shared memory, took longer than all else of the kernel."""
    if tilelang.missing() is not None:
        pytest.skip(f"nothing to compile with: {tilelang.missing()}")
    template = find_template("tilelang", name)
    config = template.space.default(MAIN, ARCHS["sm_90"], OUTER)
    kernel = record_launches(template, MAIN, OUTER, config)[0].kernel
    code = tilelang._generate(kernel, "sm_90")[0]
    read = [line for line in code.splitlines() if re.search(r"[^\w](shared_)?g\[", line)]
    assert read and all("cp_async" in line for line in read)
