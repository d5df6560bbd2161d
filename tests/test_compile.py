"""compile.py: what is recorded, how it is specialised, what the compiler reports, and how its failures read."""

import concurrent.futures
import dataclasses
import multiprocessing
import pickle

import pytest
import torch
import triton
import triton.language as tl

from sse_tune.compile import (
    Artifact,
    GpuLauncher,
    KernelArtifact,
    RecordingLauncher,
    compile_stage,
    limits_reason,
    meta_tensors,
    record_launches,
)
from sse_tune.device import ARCHS, Device
from sse_tune.errors import CompileError, DeviceError
from sse_tune.problem import Problem
from sse_tune.space import Config, Param, Space
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.registry import Template, find_template
from sse_tune.templates.stages import stages_of

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton interprets: there is nothing to compile; `make test` runs this apart"
)

PROBLEM = Problem(rule="gdn", seq_len=512, num_heads=2, head_dim=64)
OUTER = Config(chunk_size=64, state_dtype="io", states="recompute", split=0)


@triton.jit
def toy_kernel(
    x, inv, out, R, one, odd, scale, flag, nothing, D: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x + o, mask=o < R * D, other=0.0).to(tl.float32) * scale
    if MODE == "refused":
        tl.static_assert(BLOCK < 0, "a block must be what it cannot be")
    if MODE == "too much shared memory":
        o_m, o_k = tl.arange(0, 128), tl.arange(0, 512)
        b_left = tl.load(x + o_m[:, None] * 512 + o_k[None, :])
        b_right = tl.load(x + o_k[:, None] * 128 + o_m[None, :])
        b = b + tl.sum(tl.sum(tl.dot(b_left, b_right), 1), 0)
    tl.store(out + o, b + tl.load(inv + o), mask=o < R * D)


def toy(mode="plain", **changed):
    def run(call, tensors):
        out = tensors["o"]
        arguments = dict(
            x=tensors["o_rows"], inv=tensors["inv"], out=out, R=out.shape[0], one=1, odd=1001, scale=call.scale,
            flag=True, nothing=None, D=64, MODE=mode, BLOCK=call.config["block"],
        )  # fmt: skip
        call.launch(toy_kernel, (8,), {**arguments, **changed}, num_warps=call.config["num_warps"], num_stages=1)

    space = Space((Param("block", (128, 256), 128, "values"), Param("num_warps", (1, 4), 4, "warps")))
    return Template("triton", "toy", "combine", ("gdn",), space, run, (__name__,))


def compiled(template, arch="sm_90", **config):
    return compile_stage(template, PROBLEM, OUTER, Config({"block": 128, "num_warps": 4, **config}), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_every_architecture_without_a_gpu(arch):
    artifact = compiled(toy(), arch)
    assert (artifact.template, artifact.arch, artifact.config.block) == ("toy", arch, 128)
    (kernel,) = artifact.kernels
    assert kernel.name == "toy_kernel"
    assert kernel.grid == (8,)
    assert kernel.num_warps == 4
    assert 8 <= artifact.registers <= 64
    assert artifact.spill_bytes == 0
    assert artifact.smem_bytes == 0
    assert kernel.cubin[:4] == b"\x7fELF"
    assert artifact.cubin_bytes == len(kernel.cubin)
    assert limits_reason(artifact, Device.from_arch(arch)) is None


def test_the_launch_is_specialised_as_triton_would():
    (launch,) = record_launches(toy(), PROBLEM, OUTER, Config(block=128, num_warps=4))
    from triton.backends.compiler import GPUTarget

    from sse_tune.compilers.triton import specialise

    signature, constants, attributes = specialise(launch, GPUTarget("cuda", 90, 32))
    assert signature == {
        "x": "*bf16", "inv": "*i32", "out": "*bf16", "R": "i32", "one": "constexpr", "odd": "i32", "scale": "fp32",
        "flag": "u1", "nothing": "constexpr", "D": "constexpr", "MODE": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    names = list(signature)
    assert {names[i]: value for (i,), value in constants.items()} == {
        "one": 1, "nothing": None, "D": 64, "MODE": "plain", "BLOCK": 128,
    }  # fmt: skip
    divisible = {names[i] for (i,), attribute in attributes.items() if ["tt.divisibility", 16] in attribute}
    assert divisible == {"x", "inv", "out", "R"}


def test_large_integers_are_64_bit():
    from triton.backends.compiler import GPUTarget

    from sse_tune.compilers.triton import specialise

    (launch,) = record_launches(toy(R=2**31 + 16, odd=2**31 - 1), PROBLEM, OUTER, Config(block=128, num_warps=4))
    signature, _, _ = specialise(launch, GPUTarget("cuda", 80, 32))
    assert (signature["R"], signature["odd"]) == ("i64", "i32")


def test_recording_runs_nothing_and_keeps_the_order():
    launcher = RecordingLauncher()
    launcher("kernel", (1, 2), {"a": 1}, num_warps=2, num_stages=3)
    launcher("other", (4,), {}, num_warps=1, num_stages=1)
    assert [(launch.kernel, launch.grid, launch.args) for launch in launcher.launches] == [
        ("kernel", (1, 2), {"a": 1}), ("other", (4,), {}),
    ]  # fmt: skip
    assert (launcher.launches[0].num_warps, launcher.launches[0].num_stages) == (2, 3)


def test_the_gpu_launcher_hands_everything_on():
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.update(grid=grid, **arguments)

    GpuLauncher()(Kernel(), (3, 1), {"x": 5}, num_warps=8, num_stages=2)
    assert seen == {"grid": (3, 1), "x": 5, "num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize("rule", ["gla", "gdn"])
@pytest.mark.parametrize("partitions", [0, 4])
def test_meta_tensors_are_those_of_the_stage(rule, partitions):
    problem = Problem(
        rule=rule, seq_len=100, num_heads=3, head_dim=32, head_dim_v=48, num_partitions=partitions,
        top_k=min(partitions, 2), dtype="fp16",
    )  # fmt: skip
    outer = Config(chunk_size=16, state_dtype="fp32", states="recompute", split=0)
    for stage in stages_of(problem, outer):
        tensors = meta_tensors(stage, Sizes(problem, 16), outer)
        assert all(tensor.is_meta for tensor in tensors.values())
        optional = {"router_logits"} if not partitions else set()
        assert set(stage.writes) | set(stage.reads) - optional <= set(tensors)
        assert tensors["v"].shape == (100, 3, 48)
        assert tensors["shared_k"].dtype == torch.float16
        assert tensors["g"].shape == ((100, 3) if rule == "gdn" else (100, 3, 32))
        assert ("beta" in tensors) == (rule == "gdn")
        if "h" in tensors:
            assert tensors["h"].dtype == torch.float32
        without = meta_tensors(stage, Sizes(problem, 16), outer, with_states=False)
        states = {"initial_state", "final_state", "d_initial_state", "d_final_state"}
        assert set(without) == set(tensors) - states


def test_a_compilers_refusal_is_one_line_that_names_the_cause():
    with pytest.raises(CompileError) as caught:
        compiled(toy("refused"))
    message = str(caught.value)
    assert "\n" not in message
    assert "toy for sm_90 with chunk_size=64" in message
    assert "a block must be what it cannot be" in message
    assert len(message) < 600


def test_unknown_arguments_are_refused_as_a_launch_would():
    with pytest.raises(CompileError, match="no parameters \\['bogus'\\]"):
        compiled(toy(bogus=1))


def test_what_does_not_fit_has_a_reason():
    artifact = compiled(toy("too much shared memory"))
    assert artifact.smem_bytes > ARCHS["sm_90"].smem_per_block_bytes
    reason = limits_reason(artifact, ARCHS["sm_90"])
    assert f"shared memory of a block, bytes: {artifact.smem_bytes} > 232448 of sm_90" in reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"registers": 256}, "registers of a thread: 256 > 255"),
        ({"registers": 255, "num_warps": 16}, "registers of a block: 130560 > 65536"),
        ({"smem_bytes": 232449}, "232449 > 232448"),
        ({"tensor_memory": 513}, "tensor memory of a block, columns: 513 > 512"),
        ({"grid": (2**31,)}, "grid along x: 2147483648 > 2147483647"),
        ({"grid": (1, 65536)}, "grid along y: 65536 > 65535"),
        ({"grid": (2**31 - 1, 65535, 65535)}, None),
        ({"races": ("one", "two")}, "kernel: one"),
        ({"races": ("one",), "registers": 256}, "kernel: one"),  # before the limits
    ],
    ids=str,
)
def test_limits(changed, reason):
    kernel = KernelArtifact(
        name="kernel", registers=128, spill_bytes=0, smem_bytes=1024, tensor_memory=0, num_warps=4, grid=(1,), races=(),
        cubin=b"",
    )  # fmt: skip
    artifact = Artifact("toy", Config(), "sm_90", (kernel, dataclasses.replace(kernel, **changed)))
    found = limits_reason(artifact, ARCHS["sm_90"])
    assert found is None if reason is None else reason in found


@triton.jit
def gram_kernel(x, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    b_square = tl.zeros([BLOCK], tl.float32)
    b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, D, BLOCK, num_stages=STAGES):
        b = tl.load(x + o_r[:, None] * D + (i + o_k)[None, :])
        b32 = b.to(tl.float32)
        b_square += tl.sum(b32 * b32, 1)
        b_gram = tl.dot(b, tl.trans(b), b_gram)
    tl.store(out + o_r[:, None] * BLOCK + o_k[None, :], (b_gram / b_square[:, None]).to(tl.bfloat16))


def gram(stages):
    def run(call, tensors):
        arguments = dict(x=tensors["o_rows"], out=tensors["o"], D=1024, BLOCK=64, STAGES=stages)
        call.launch(gram_kernel, (8,), arguments, num_warps=4, num_stages=stages)

    return dataclasses.replace(toy(), name="gram", run=run)


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="this defect is Triton 3.6's")
def test_a_racy_kernel_is_refused():
    artifact = compiled(gram(2))
    (race,) = artifact.races
    assert race == f"gram_kernel: {artifact.kernels[0].races[0]}"
    assert "async_copy_global_to_local overwrites a slot" in race
    assert limits_reason(artifact, ARCHS["sm_90"]) == race
    for sound in (compiled(gram(1)), compiled(gram(2), "sm_80")):
        assert sound.races == ()
        assert limits_reason(sound, ARCHS[sound.arch]) is None


def test_nothing_to_compile():
    template = dataclasses.replace(toy(), backend="torch", stage="whole")
    with pytest.raises(CompileError, match="nothing to compile"):
        compiled(template)
    with pytest.raises(CompileError, match="nothing to compile"):  # a stage the problem's graph does not have
        compile_stage(
            dataclasses.replace(toy(), stage="gradients"), PROBLEM.replace(direction="fwd"), OUTER, Config(), "sm_90"
        )
    with pytest.raises(CompileError, match="must launch a kernel"):
        compiled(dataclasses.replace(toy(), run=lambda call, tensors: None))
    with pytest.raises(DeviceError, match="sm_80"):
        compiled(toy(), "sm_12")


def test_works_in_another_process():
    template = find_template("triton", "combine")
    assert pickle.loads(pickle.dumps(template)) is template
    config = template.space.default(PROBLEM, ARCHS["sm_80"], OUTER)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        artifact = pool.submit(compile_stage, template, PROBLEM, OUTER, config, "sm_80").result(timeout=120)
        failure = pool.submit(compile_stage, template, PROBLEM, OUTER, config, "sm_1").exception(timeout=120)
    assert artifact == compile_stage(template, PROBLEM, OUTER, config, "sm_80")
    assert isinstance(failure, DeviceError)
