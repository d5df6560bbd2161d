"""Kernels of specialized warps in the emulator: whole plans against the reference, and each meeting of their warps; the
walk with its state in registers is one of them.

Needs no GPU. Segments have more chunks than there are slots for them.
"""

import itertools
import re

import pytest
import torch

from sse_tune.device import ARCHS
from sse_tune.plan import StageChoice
from sse_tune.templates.registry import find_template, validate_plan
from sse_tune.templates.tilelang import specialized, transposed
from tests.templates import emulated_cuda, test_tilelang_emulated, test_tilelang_whole
from tests.templates.against_reference import compare, make_inputs
from tests.templates.emulated_cuda import EmulationError, Launcher, Mode
from tests.templates.test_tilelang_emulated import case_of, run
from tests.templates.test_tilelang_whole import plan_of

lacks = emulated_cuda.missing()
pytestmark = pytest.mark.skipif(lacks is not None, reason=f"nothing to emulate with: {lacks}")

TEMPLATES = ("gdn_scan_specialized", "gdn_state_gradient_specialized")
TURNED = "gdn_scan_transposed"
LENGTHS = [0, 63, 330]
PROBLEM = test_tilelang_whole.PROBLEM.replace(seq_len=sum(LENGTHS))
NARROW = {"block_v": 32, "copy_warps": 4, "num_stages": 3}
ALONE = test_tilelang_emulated.PROBLEM.replace(rule="gdn", num_heads=1, dtype="fp16")
_OF_TWO = {getattr(specialized, name) for name in ("READY", "STATE", "VALUES", "OWN", "COPIED", "LAST")}
BARRIERS = {
    **dict.fromkeys(TEMPLATES, _OF_TWO),
    TURNED: {transposed.READY, transposed.FREE, transposed.MADE, transposed.STORED, transposed.COPIED},
}
UNSEEN = {
    # waited for at the end, only so that no barrier is left half full
    "gdn_scan_specialized": [specialized.STATE],
    # and after each step: those that multiply wait for the storers next, and here all others go on meanwhile
    TURNED: [transposed.READY, transposed.FREE],
}
MEETINGS = r"tl::(?:__sync_thread_partial|__named_barrier_arrive)\((\d+), \d+\);"


def specialized_plan(problem, arch, names, changes, states):
    plan = plan_of(problem, arch, states=states)
    for template in (find_template("tilelang", name) for name in names):
        config = template.space.default(problem, ARCHS[arch], plan.outer).replace(**changes)
        plan = plan.replace_stage(template.stage, StageChoice("tilelang", template.name, config))
    validate_plan(plan, problem, ARCHS[arch])
    return plan


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("arch", "states", "sizes", "names", "changes", "order"),
    [
        ("sm_90", "store", (64, 64), TEMPLATES, {"num_warps": 8}, "scattered"),
        ("sm_90", "store", (128, 128), TEMPLATES, NARROW, "backward"),
        ("sm_80", "recompute", (64, 64), TEMPLATES, {}, "forward"),
        ("sm_90", "store", (64, 128), (TURNED,), {"copy_warps": 4}, "backward"),
    ],
    ids=["eight warps", "narrow", "older", "turned"],
)
def test_it_matches_the_reference(arch, states, sizes, names, changes, order, poisoned_empty):
    problem = PROBLEM.replace(head_dim=sizes[0], head_dim_v=sizes[1])
    plan = specialized_plan(problem, arch, names, changes, states)
    inputs = make_inputs(problem, LENGTHS, initial=True, gate=0.02)  # or nothing of a state is left after a chunk
    compare(problem, inputs, poisoned_empty, plan=plan, launcher=Launcher(Mode("late", order), arch=arch))


@pytest.mark.parametrize("name", [*TEMPLATES, TURNED])
def test_warps_need_each_of_their_meetings(name, monkeypatch):
    """Without one of them threads wait for ever, or products come before their fence, or results are others."""
    template, arguments, tensors, segments = case_of(name, ALONE)
    # small, or states leave the range of fp16
    tensors = {name: 0.2 * tensor if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    numbers = []

    def edit(text):
        """Compiled once: leaves out the statement WITHOUT, of those at which warps meet, or all of barrier -WITHOUT."""
        numbers[:] = map(int, re.findall(MEETINGS, text))
        statements = itertools.count()
        return re.sub(
            MEETINGS,
            lambda found: (
                f'if (int i = atoi(getenv("WITHOUT")); i != {next(statements)} && i != -{found[1]}) {found[0]}'
            ),
            text,
        )

    def results(without, order):
        monkeypatch.setenv("WITHOUT", str(without))
        return run((template, arguments, tensors, segments), Mode("late", order), edit)

    def shows(without, order):
        try:
            actual = results(without, order)
        except EmulationError:
            return True
        return not all(
            torch.allclose(actual[name], tensor, rtol=0, atol=0, equal_nan=True)
            for name, tensor in expected[order].items()
        )

    nothing = 99
    expected = {order: results(nothing, order) for order in ("forward", "backward")}
    assert set(numbers) == BARRIERS[name]
    assert not any(shows(nothing, order) for order in expected)
    each = [*range(len(numbers)), *(-number for number in set(numbers))]
    unseen = [without for without in each if not any(shows(without, order) for order in expected)]
    assert all(without >= 0 for without in unseen)
    assert [numbers[without] for without in unseen] == UNSEEN.get(name, [])
