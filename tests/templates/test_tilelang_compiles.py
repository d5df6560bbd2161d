"""Every TileLang template compiles for every architecture, within the limits its constraints promise. Needs no GPU.

One compilation takes ten seconds, so all of them run side by side before the first test looks at its own.
"""

import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import re

import pytest

from sse_tune.compile import MAX_REGISTERS, compile_stage, limits_reason, record_launches
from sse_tune.compilers import tilelang
from sse_tune.device import ARCHS
from sse_tune.errors import CompileError, ConstraintError, DeviceError
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.registry import Program, default_plan, find_template, templates_of, validate_plan

pytestmark = pytest.mark.skipif(tilelang.missing() is not None, reason=f"nothing to compile with: {tilelang.missing()}")

MAIN = Problem.preset("spikingbrain2-5b")
WIDE = Problem.preset("sse-gdn")  # K=256 V=512
RAGGED = Problem(
    rule="gdn", seq_len=3001, num_heads=3, head_dim=64, head_dim_v=192, dtype="fp16", num_sequences=7,
    num_partitions=5, top_k=2, read_k=3, shared=False, norm="after",
)  # fmt: skip
GLA = Problem.preset("sse-gla-128")
WIDE_GLA = Problem.preset("sse-gla")  # K=256 V=512
OUTER = Config(chunk_size=64, state_dtype="io", states="recompute", split=0)
NAMES = (
    "gdn_prepare", "gdn_scan", "gdn_recompute", "gdn_state_gradient", "gdn_score_gradients", "gdn_gradients"
)  # fmt: skip
GLA_NAMES = ("gla_decay_rows", "gla_states", "gla_output", "gla_states_backward", "gla_value_gradients")
SPECIALIZED_NAMES = ("gdn_scan_specialized", "gdn_state_gradient_specialized")
TRANSPOSED = "gdn_scan_transposed"  # not for sm_80
JOINT_NAMES = ("gla_states_output", "gla_states_value_gradients")
TWICE_AS_WIDE = (("block_v", 128), ("num_warps", 8), ("copy_warps", 4))
# stack bytes of a thread, where a default spills
MAX_SPILL_BYTES = {
    ("gdn_prepare", "sm_100"): 48, ("gdn_state_gradient_specialized", "sm_100"): 32,
    (TRANSPOSED, "sm_100"): 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    template: str
    arch: str
    problem: Problem = MAIN
    config: tuple[tuple[str, object], ...] = ()
    states: str = "recompute"

    def __str__(self):
        changes = "-".join(f"{name}{value}" for name, value in self.config)
        sizes = f"K{self.problem.key_dim}V{self.problem.value_dim}"
        return "-".join(part for part in (self.template, self.arch, sizes, self.states, changes) if part)

    @property
    def outer(self):
        of_gla = "joint" if self.template in JOINT_NAMES else "store"
        states = of_gla if self.problem.rule == "gla" else self.states
        return OUTER.replace(states=states, **{name: value for name, value in self.config if name in OUTER})


GLA_CASE = Case("gla_decay_rows", "sm_90", GLA)
KEEPING = [
    *(Case(name, arch, states="store") for name in ("gdn_scan", "gdn_scan_specialized") for arch in ARCHS),
    *(Case(TRANSPOSED, arch, states="store") for arch in ("sm_90", "sm_100")),
]
DEFAULTS = [
    *(Case(name, arch) for name in (*NAMES, *SPECIALIZED_NAMES) for arch in ARCHS),
    *(Case(name, arch, GLA) for name in (*GLA_NAMES, *JOINT_NAMES) for arch in ARCHS),
    *KEEPING,
]
OTHERS = [
    Case("gdn_scan", "sm_90", WIDE),
    Case("gdn_scan", "sm_90", RAGGED, states="store"),
    Case("gdn_scan", "sm_90", config=(("num_stages", 1),), states="store"),
    Case("gdn_gradients", "sm_90", RAGGED),
    Case("gdn_gradients", "sm_90", config=(("num_stages", 2),)),
    Case("gdn_score_gradients", "sm_90", RAGGED),
    Case("gdn_prepare", "sm_90", RAGGED, config=(("products", "fp32"),)),
    *(Case("gdn_prepare", arch, config=(("products", "fp32"), ("solve_block", 32))) for arch in ("sm_80", "sm_90")),
    Case("gdn_state_gradient", "sm_90", config=(("num_warps", 8), ("num_stages", 1))),
    Case("gdn_scan_specialized", "sm_90", WIDE, states="store"),
    Case(TRANSPOSED, "sm_90", RAGGED),
    Case(TRANSPOSED, "sm_90", RAGGED.replace(head_dim_v=128), TWICE_AS_WIDE, "store"),
    Case("gdn_state_gradient_specialized", "sm_90", RAGGED),
    Case("gdn_state_gradient_specialized", "sm_90", config=(("num_warps", 8),)),
    Case("gdn_state_gradient_specialized", "sm_90", config=(("block_v", 32), ("num_stages", 3), ("copy_warps", 4))),
    Case("gla_decay_rows", "sm_90", WIDE_GLA, (("num_warps", 8),)),
    Case("gla_decay_rows", "sm_80", RAGGED.replace(rule="gla")),
    Case("gla_decay_rows", "sm_90", GLA.replace(dtype="fp16", head_dim=192, norm="after")),
    Case("gla_decay_rows", "sm_90", GLA.replace(norm="before"), (("chunk_size", 128),)),
    Case("gla_states", "sm_90", WIDE_GLA, (("block_k", 128), ("block_v", 128), ("num_warps", 8), ("num_stages", 2))),
    Case("gla_states_backward", "sm_90", RAGGED.replace(rule="gla"), (("block_v", 32), ("num_stages", 6))),
    Case("gla_states_backward", "sm_90", GLA, (("state_dtype", "fp32"),)),
    Case("gla_output", "sm_90", WIDE_GLA),
    Case("gla_value_gradients", "sm_90", RAGGED.replace(rule="gla"), (("num_warps", 8),)),
    Case("gla_states_output", "sm_90", WIDE_GLA),
    Case("gla_states_output", "sm_90", GLA, (("block_v", 128), ("num_warps", 8), ("num_stages", 3))),
    Case("gla_states_value_gradients", "sm_90", RAGGED.replace(rule="gla"), (("num_stages", 4),)),
    Case("gla_states_value_gradients", "sm_90", GLA, (("chunk_size", 128), ("block_v", 32), ("num_warps", 8))),
]


def config_of(case):
    template = find_template("tilelang", case.template)
    changes = {name: value for name, value in case.config if name not in OUTER}
    return template.space.default(case.problem, ARCHS[case.arch], case.outer).replace(**changes)


def compiled(case):
    template = find_template("tilelang", case.template)
    return compile_stage(template, case.problem, case.outer, config_of(case), case.arch)


def promised_smem_bytes(case):
    """By the first module of the template that has a say in it: its own, or of the kernel that two of them share."""
    modules = map(importlib.import_module, find_template("tilelang", case.template).sources)
    module = next(module for module in modules if hasattr(module, "smem_bytes"))
    return module.smem_bytes(case.problem, Config({**case.outer, **config_of(case)}))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def artifacts(home):
    """Case to artifact, or to what its compilation raised."""
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(home)  # for the processes
    try:
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            futures = {case: pool.submit(compiled, case) for case in (*DEFAULTS, *OTHERS)}
            return {case: future.exception() or future.result() for case, future in futures.items()}
    finally:
        os.environ["HOME"] = before or ""


@pytest.fixture
def compiled_before(artifacts, home, monkeypatch):
    """The cache of `artifacts`, and a compiler that must not run again."""
    monkeypatch.setattr(tilelang, "cache_folder", lambda: home / ".cache" / "sse_tune" / "tilelang")
    monkeypatch.setattr(tilelang, "_generate", lambda *_: pytest.fail("compiled again"))
    return artifacts


@pytest.mark.parametrize("case", [*DEFAULTS, *OTHERS], ids=str)
def test_compiles_within_its_limits(case, artifacts):
    artifact = artifacts[case]
    assert not isinstance(artifact, BaseException), artifact
    assert limits_reason(artifact, ARCHS[case.arch]) is None
    assert 0 < artifact.registers <= MAX_REGISTERS
    if case in DEFAULTS:
        assert artifact.spill_bytes <= MAX_SPILL_BYTES.get((case.template, case.arch), 0), artifact
    assert artifact.smem_bytes <= promised_smem_bytes(case)


@pytest.mark.parametrize("case", [case for case in DEFAULTS if case.arch == "sm_90"], ids=str)
def test_what_was_compiled_is_found_again(case, compiled_before):
    template = find_template("tilelang", case.template)
    (launch,) = record_launches(template, case.problem, case.outer, config_of(case))
    built = tilelang.build(launch.kernel, "sm_90")
    assert built.cubin == compiled_before[case].kernels[0].cubin
    assert {parameter.name for parameter in built.parameters} <= set(launch.args)  # each parameter has an argument


def test_halves_of_a_block_meet_at_no_barrier():
    """They run code of their own: at a barrier between its two ends one half would wait for the other for ever."""
    (launch,) = record_launches(
        find_template("tilelang", "gla_decay_rows"), GLA, GLA_CASE.outer, config_of(GLA_CASE)
    )
    source, *_ = tilelang._generate(launch.kernel, "sm_90")
    near = source[source.index("if (is_far == 0) {") : source.index("tl::fence_proxy_async();")]
    assert near.count("exp2_or_zero(") == 32 and "sync" not in near  # two of each row at once, in each half
    assert tilelang.cache_key(launch.kernel, "sm_90") != tilelang.cache_key(
        dataclasses.replace(launch.kernel, own_barriers=False), "sm_90"
    )


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [(name, n) for name in ("gla_states", "gla_states_backward") for n in (2, 3, 4, 6)]
    + [(name, n) for name in JOINT_NAMES for n in (2, 4)],
)
def test_no_step_of_a_gla_walk_waits_for_what_it_loads(name, num_stages):
    """Whatever a step reads from memory are copies, and those of the num_stages - 2 chunks after it stay in flight."""
    case = Case(name, "sm_90", GLA, (("num_stages", num_stages),))
    (launch,) = record_launches(find_template("tilelang", name), GLA, case.outer, config_of(case))
    source, *_ = tilelang._generate(launch.kernel, "sm_90")
    loop = source[source.index("cp_async_wait<") : source.rindex("wait_wgmma<")]
    assert re.findall(r"cp_async_wait<(\d+)>", loop) == [str(num_stages - 2)]
    for line in loop.splitlines():
        assert "cp_async_gs" in line or not re.search(r"\b(x|y|z|P|perm|decay|segment_\w+)\[", line), line


@pytest.mark.parametrize("name", [*SPECIALIZED_NAMES, TRANSPOSED])
def test_products_of_specialized_warps_run_beside_others(name):
    """ptxas says where it has each product waited for at once: C7518, C7514 and others, by reason."""
    case = Case(name, "sm_90", states="store")
    (launch,) = record_launches(find_template("tilelang", name), case.problem, case.outer, config_of(case))
    _, said = tilelang._assemble(tilelang._generate(launch.kernel, case.arch)[0], "sm_90a")
    assert not re.search("C7518|serialized", said), said


def test_the_key_tells_programs_apart():
    template = find_template("tilelang", "gdn_scan")
    keys = set()
    for block_v in (64, 128):
        config = config_of(Case("gdn_scan", "sm_90")).replace(block_v=block_v)
        (launch,) = record_launches(template, MAIN, OUTER, config)
        keys |= {tilelang.cache_key(launch.kernel, arch) for arch in ARCHS}
    assert len(keys) == 6


@pytest.mark.parametrize("rule", ["gdn", "gla"])
def test_its_default_plan_is_mixed(rule):
    problem = MAIN if rule == "gdn" else MAIN.replace(rule="gla", norm="none")
    plan = default_plan(problem, ARCHS["sm_90"], "tilelang")
    validate_plan(plan, problem, ARCHS["sm_90"])
    own = {choice.template for choice in plan.stages.values() if choice.backend == "tilelang"}
    assert own == set(NAMES if rule == "gdn" else (*GLA_NAMES, "gla_gradients"))
    assert {choice.backend for choice in plan.stages.values()} <= {"tilelang", "triton"}
    assert {choice.backend for choice in default_plan(problem, ARCHS["sm_90"]).stages.values()} == {"triton"}


def test_a_refusal_is_one_line():
    program = Program("sse_tune.templates.tilelang.gdn_scan", "factory", (("H", 1),), ("sse_tune.compile",))
    template = dataclasses.replace(
        find_template("tilelang", "gdn_scan"),
        run=lambda call, tensors: call.launch(program, (1,), {}, num_warps=4, num_stages=1),
    )
    with pytest.raises(CompileError, match=r"gdn_scan for sm_90 with .*missing") as caught:
        compile_stage(template, MAIN, OUTER, Config(), "sm_90")
    assert "\n" not in str(caught.value)


def test_without_nvcc_it_says_so(monkeypatch):
    monkeypatch.setattr(tilelang, "nvcc", lambda: None)
    tilelang._versions.cache_clear()
    try:
        with pytest.raises(DeviceError, match="nvcc is neither on the PATH"):
            compiled(Case("gdn_scan", "sm_90", config=(("num_stages", 1),)))
    finally:
        monkeypatch.undo()
        tilelang._versions.cache_clear()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "fp32"}, "16-bit operands"),
        ({"head_dim": 96}, "K must be a multiple of 64"),
        ({"head_dim_v": 80}, "block_v must divide V|V must be a multiple of 64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_its_reason(changes, rule):
    for template in templates_of("tilelang"):
        if "head_dim_v" in changes and template.stage in ("prepare", "decay_rows"):
            continue  # has nothing to do with V
        with pytest.raises(ConstraintError, match=rule):
            template.space.default(MAIN.replace(**changes), ARCHS["sm_90"], OUTER)


def test_a_scan_keeps_states_of_the_problems_dtype_only():
    space, fp32 = find_template("tilelang", "gdn_scan").space, OUTER.replace(state_dtype="fp32")
    space.default(MAIN, ARCHS["sm_90"], fp32)  # it stores none
    with pytest.raises(ConstraintError, match="states that the scan keeps"):
        space.default(MAIN, ARCHS["sm_90"], fp32.replace(states="store"))


def test_warps_that_hand_over_registers_have_enough_of_them():
    space = find_template("tilelang", TRANSPOSED).space
    with pytest.raises(ConstraintError, match="need sm_90"):
        space.default(MAIN, ARCHS["sm_80"], OUTER)
    with pytest.raises(ConstraintError, match="registers of a thread that multiplies"):
        space.default(WIDE, ARCHS["sm_90"], OUTER)
    warps = {config["num_warps"] for config in space.configs(MAIN, ARCHS["sm_90"], OUTER)}
    assert warps == {4}  # twice as many would leave too few for a state of K = 128


@pytest.mark.parametrize("arch", ARCHS)
def test_warps_of_score_gradients_have_rows_of_their_own(arch):
    """Two warps to the same rows do not compile: TileLang finds no layout for sums that are halved in registers."""
    space = find_template("tilelang", "gdn_score_gradients").space
    for chunk_size in (64, 128):
        outer = OUTER.replace(chunk_size=chunk_size)
        for config in space.configs(MAIN, ARCHS[arch], outer):
            assert 16 * config["num_warps"] == chunk_size
            assert space.violations(MAIN, config.replace(num_warps=8), ARCHS[arch], outer)
    assert next(space.configs(MAIN, ARCHS[arch], OUTER), None) is not None


@pytest.mark.parametrize(("block_v", "num_stages", "times"), [(128, 2, 1), (64, 1, 2)])
def test_gradients_fetch_no_piece_beyond_the_last(block_v, num_stages, times):
    """With one piece of V and two slots, the loop over the first pieces fetched a third one: past the end of h."""
    case = Case("gdn_gradients", "sm_90", config=(("block_v", block_v), ("num_stages", num_stages)), states="store")
    (launch,) = record_launches(
        find_template("tilelang", case.template), case.problem, case.outer, config_of(case), with_states=False
    )
    source = str(tilelang._generate(launch.kernel, case.arch)[0])
    assert len(re.findall(r"&\(h\[", source)) == times
