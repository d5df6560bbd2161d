"""Every Triton template compiles for every architecture, within the limits its constraints promise. Needs no GPU.

The default plan is compiled for every size on every architecture: it runs wherever nothing is tuned. The corners of
each template's space go round the architectures instead, since one compilation takes seconds.
"""

import dataclasses
import itertools

import pytest
import triton

from sse_tune.compile import MAX_REGISTERS, compile_stage, limits_reason
from sse_tune.device import ARCHS
from sse_tune.errors import ConstraintError
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.registry import default_plan, find_template, templates_of
from sse_tune.templates.stages import GRAPHS, stages_of

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton interprets: there is nothing to compile; `make test` runs this apart"
)

MAIN = {
    "gdn": Problem.preset("spikingbrain2-5b"),
    "gla": Problem.preset("spikingbrain2-5b", rule="gla", norm="none"),
}
OTHERS = {
    "wide": {"gdn": Problem.preset("sse-gdn"), "gla": Problem.preset("sse-gla")},  # K=256 V=512, K=V=256
    "fp32": {
        rule: Problem(rule=rule, seq_len=4096, num_heads=4, head_dim=64, dtype="fp32", norm="after")
        for rule in ("gdn", "gla")
    },
    "ragged": {
        rule: Problem(
            rule=rule, seq_len=3001, num_heads=3, head_dim=48, head_dim_v=80, dtype="fp16", num_sequences=7,
            num_partitions=5, top_k=2, read_k=3, shared=False, norm="before",
        )
        for rule in ("gdn", "gla")
    },
    "plain": {
        rule: Problem(rule=rule, seq_len=1000, num_heads=5, head_dim=128, num_partitions=0, top_k=0)
        for rule in ("gdn", "gla")
    },
}  # fmt: skip

# Shared memory every block may use without asking, and that a template without a constraint on it must keep to.
UNASKED_SMEM_BYTES = 48 * 1024

# (template, architecture) -> stack bytes of a thread that its default config may take at K = V = 128: a quarter above
# what it takes today; what is not listed spills nothing. The defaults measured fastest on sm_90 in spite of it
# (docs/log.md): the state, or the gradients' sums, hold more than a thread has registers; on sm_80 operands do too. A
# smaller number is progress, a larger one a regression to look at.
MAX_SPILL_BYTES: dict[tuple[str, str], int] = {
    ("routing_recount", "sm_80"): 8,
    ("gdn_prepare", "sm_80"): 160,
    ("gdn_scan", "sm_80"): 680,
    ("gdn_scan", "sm_90"): 8,
    ("gdn_scan", "sm_100"): 320,
    ("gdn_recompute", "sm_80"): 128,
    ("gdn_state_gradient", "sm_80"): 1056,
    ("gdn_state_gradient", "sm_90"): 288,
    ("gdn_state_gradient", "sm_100"): 384,
    ("gdn_group_states", "sm_80"): 112,
    ("gdn_group_gradients", "sm_80"): 530,
    ("gdn_group_gradients", "sm_90"): 10,
    ("gdn_group_gradients", "sm_100"): 30,
    ("gdn_score_gradients", "sm_80"): 656,
    ("gdn_gradients", "sm_80"): 440,
    ("gla_prepare", "sm_80"): 616,
    ("gla_prepare", "sm_90"): 176,
    ("gla_prepare", "sm_100"): 296,
    ("gla_scan", "sm_80"): 40,
    ("gla_state_gradient", "sm_80"): 72,
    ("gla_state_gradient", "sm_90"): 16,
    ("gla_decay_rows", "sm_80"): 1080,
    ("gla_decay_rows", "sm_90"): 288,
    ("gla_decay_rows", "sm_100"): 352,
    ("gla_value_gradients", "sm_80"): 10,
    ("gla_states_output", "sm_80"): 250,
    ("gla_states_output", "sm_100"): 20,
    ("gla_states_value_gradients", "sm_80"): 260,
    ("gla_states_value_gradients", "sm_100"): 20,
    # of the launch for gates that are not near; of the other 4808, 128, 176
    ("gla_gradients_sliced", "sm_80"): 6224,
    ("gla_gradients_sliced", "sm_90"): 464,
    ("gla_gradients_sliced", "sm_100"): 256,
}
# of GDN's scan where it keeps states
MAX_SPILL_BYTES_KEEPING: dict[str, int] = {"sm_80": 7660, "sm_90": 140, "sm_100": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    template: str
    rule: str
    arch: str
    size: str = "main"
    outer: tuple[tuple[str, object], ...] = ()
    config: tuple[tuple[str, object], ...] = ()

    def __str__(self):
        changes = "-".join(f"{name}{value}" for name, value in (*self.outer, *self.config))
        return "-".join(part for part in (self.template, self.rule, self.arch, self.size, changes) if part)

    @property
    def problem(self):
        return (MAIN if self.size == "main" else OTHERS[self.size])[self.rule]


def served():
    return [(template, rule) for template in templates_of("triton") for rule in template.rules]


def default_cases():
    return [Case(template.name, rule, arch) for template, rule in served() for arch in ARCHS]


def size_cases():
    return [Case(template.name, rule, arch, size) for template, rule in served() for size in OTHERS for arch in ARCHS]


def corner_cases():
    """The first and last value of each parameter, and of each outer choice, the rest as near the default as it can."""
    archs = itertools.cycle(ARCHS)
    cases = []
    for template, rule in served():
        if rule != template.rules[0]:
            continue  # what serves both rules was seen with the other one
        walks_groups = any(module.endswith("gdn_groups") for module in template.sources)
        for param in GRAPHS["staged"].params:
            if param.name == "states" or (param.name == "split" and not walks_groups):
                continue  # a graph of its own, or nothing to the template
            cases += [
                Case(template.name, rule, next(archs), outer=((param.name, value),))
                for value in dict.fromkeys((param.values[0], param.values[-1])) if value != param.default
            ]  # fmt: skip
        for param in template.space.params:
            cases += [
                Case(template.name, rule, next(archs), config=((param.name, value),))
                for value in dict.fromkeys((param.values[0], param.values[-1])) if value != param.default
            ]  # fmt: skip
    return cases


def nearest(space, problem, device, outer, fixed):
    """The config next to the default among those that pass and hold the fixed values; None if there is none."""
    fixed = dict(fixed)
    held = tuple(
        dataclasses.replace(param, values=(fixed[param.name],), default=fixed[param.name], rule_defaults=())
        if param.name in fixed else param
        for param in space.params
    )  # fmt: skip
    narrowed = dataclasses.replace(space, params=held)
    if next(narrowed.configs(problem, device, outer), None) is None:
        return None
    return narrowed.default(problem, device, outer)


def promised_smem_bytes(template, problem, outer, config, device):
    """The least shared memory with which the template's constraints let this config pass; 0 without a constraint."""
    low, high = 0, device.smem_per_block_bytes
    while low < high:
        middle = (low + high) // 2
        smaller = dataclasses.replace(device, smem_per_block_bytes=middle)
        if template.space.violations(problem, config, smaller, outer):
            low = middle + 1
        else:
            high = middle
    return low


def outer_with(template, problem, device):
    """The outer choices of the default plan, with the template's stage in the graph; None: there are none."""
    outer = default_plan(problem, device, "triton").outer
    if template.stage in {stage.name for stage in stages_of(problem, outer)}:
        return outer
    for other in GRAPHS["staged"].by_nearness(problem, device):
        if template.stage in {stage.name for stage in stages_of(problem, other)}:
            try:
                return default_plan(problem, device, "triton", other).outer
            except ConstraintError:
                continue
    return None


def config_of(case):
    """The outer choices and the config of a case; None if the constraints leave none."""
    template, device = find_template("triton", case.template), ARCHS[case.arch]
    outer = outer_with(template, case.problem, device)
    if outer is None:
        wide, plain = case.problem.key_dim > 128, case.problem.num_partitions == 0
        left_out = {"group_states": wide, "group_gradients": wide, "combine": plain, "combine_gradients": plain}
        assert left_out.get(template.stage), template.name
        return None
    if not case.outer and not case.config:
        return outer, template.space.default(case.problem, device, outer)
    if case.outer:
        graph = (("states", outer["states"]), ("split", outer["split"]))
        outer = nearest(GRAPHS["staged"], case.problem, device, None, (*graph, *case.outer))
    config = outer and nearest(template.space, case.problem, device, outer, case.config)
    return None if config is None else (outer, config)


def compile_case(case):
    """The artifact of a case, with what holds of every config asserted; None if the constraints leave none."""
    template, device = find_template("triton", case.template), ARCHS[case.arch]
    choices = config_of(case)
    if choices is None:
        return None
    outer, config = choices
    artifact = compile_stage(template, case.problem, outer, config, case.arch)
    assert limits_reason(artifact, device) is None, (outer, config)
    assert 0 < artifact.registers <= MAX_REGISTERS
    promised = promised_smem_bytes(template, case.problem, outer, config, device) or UNASKED_SMEM_BYTES
    assert artifact.smem_bytes <= promised, (outer, config)
    return artifact


@pytest.mark.parametrize("case", default_cases(), ids=str)
def test_default_plan(case):
    artifact = compile_case(case)
    allowed = MAX_SPILL_BYTES.get((case.template, case.arch), 0)
    assert artifact.spill_bytes <= allowed, f"{artifact.spill_bytes} > {allowed} stack bytes a thread: {artifact}"


@pytest.mark.parametrize("arch", ARCHS)
def test_a_scan_that_keeps_states(arch):
    artifact = compile_case(Case("gdn_scan", "gdn", arch, outer=(("states", "store"),)))
    assert artifact.spill_bytes <= MAX_SPILL_BYTES_KEEPING[arch], artifact


@pytest.mark.parametrize("size", OTHERS)
def test_a_scan_that_keeps_states_of_other_sizes(size):
    assert compile_case(Case("gdn_scan", "gdn", "sm_90", size, outer=(("states", "store"),))) is not None


@pytest.mark.parametrize("case", size_cases(), ids=str)
def test_default_plan_of_other_sizes(case):
    compile_case(case)


@pytest.mark.parametrize("case", corner_cases(), ids=str)
def test_corner_of_the_space(case):
    compile_case(case)  # nothing to compile where the constraints exclude the corner


def test_every_stage_of_both_rules_has_a_template():
    names = {(template.stage, rule) for template, rule in served()}
    outers = {"gdn": (("recompute", 0), ("recompute", 16)), "gla": (("store", 0), ("joint", 0), ("recompute", 0))}
    assert names == {
        (stage.name, rule)
        for rule, choices in outers.items()
        for states, split in choices
        for stage in stages_of(MAIN[rule], Config(chunk_size=64, state_dtype="io", states=states, split=split))
    }


def test_launch_grids_stay_within_bounds_for_a_million_tokens():
    from sse_tune.compile import record_launches

    for template, rule in served():
        problem = MAIN[rule].replace(seq_len=2**20, num_heads=64)
        outer = outer_with(template, problem, ARCHS["sm_90"]).replace(chunk_size=16)
        config = template.space.default(problem, ARCHS["sm_90"], outer)
        for launch in record_launches(template, problem, outer, config):
            assert launch.grid[0] < 2**31
            assert all(extent <= 65535 for extent in launch.grid[1:])
            assert launch.grid[0] <= 64 * 4 * 16 * Sizes(problem, 16).chunks
