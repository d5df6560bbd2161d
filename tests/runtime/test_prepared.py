"""Prepared passes: what they launch is what the stages launch, on memory that is theirs, and nothing stale is used.

Triton's interpreter stands for the GPU: the bound launches get addresses, as on a GPU, and make tensors of them again.
"""

import collections
import ctypes
import dataclasses
import gc
import threading
import types
import weakref

import pytest
import torch

from sse_tune.compilers import bound
from sse_tune.compilers.bound import ADDRESS_ALIGNMENT, Pointer
from sse_tune.device import ARCHS
from sse_tune.runtime import autograd, pipeline, prepared, recording
from sse_tune.runtime.pipeline import Execution, gradient_names
from sse_tune.runtime.prepared import Pass, backward_pass, forward_pass
from sse_tune.runtime.recording import record_backward, record_forward, saved_blocks
from sse_tune.runtime.settings import Settings, write_problem
from sse_tune.templates.registry import default_plan, find_template
from sse_tune.templates.stages import GRAPHS
from tests.runtime.cases import assert_close, exact, make_case, with_gradients
from tests.runtime.test_triton import by_triton
from tests.templates.against_reference import make_inputs, problem_of

CASES = {
    "gdn": dict(rule="gdn", norm="before", batch=2),
    "gdn in groups": dict(rule="gdn", seq_len=40, outer=dict(chunk_size=16, split=2)),
    "gla": dict(rule="gla", norm="after"),
    "gla recomputed": dict(rule="gla", outer=dict(states="recompute")),
    "plain": dict(rule="gdn", num_partitions=0, top_k=0),
    "alone": dict(rule="gdn", shared=False),
    "forward alone": dict(rule="gdn", direction="fwd"),
}
SCALE = 0.3


def case_of(name, **changes):
    """Problem, plan and inputs."""
    case = {**CASES[name], **changes}
    outer = case.pop("outer", {})
    problem = problem_of(case.pop("rule"), **case)
    chosen = GRAPHS["staged"].default(problem, ARCHS["sm_90"]).replace(**outer)
    plan = default_plan(problem, ARCHS["sm_90"], "triton", chosen)
    return problem, plan, make_inputs(problem, initial=True)


@pytest.fixture
def nothing_is_small(monkeypatch):
    """Buffers of these problems are as apart as those of large ones."""
    monkeypatch.setattr(recording, "SMALL_BYTES", -1)


def specs_of(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def tensor_at(address, dtype):
    """A tensor of one element there; the interpreter reads on from its address."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def bind_interpreter(launch, index):
    names = tuple(launch.args)

    def run(values, stream):
        arguments = {
            name: tensor_at(value, launch.args[name].dtype) if isinstance(launch.args[name], Pointer) else value
            for name, value in zip(names, values)
        }
        launch.kernel[launch.grid](**arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)

    return names, run


@pytest.fixture
def poisoned_blocks(monkeypatch):
    """Memory of bytes is full of NaN (-1 in integers) until it is written."""
    empty = torch.empty

    def allocate(*shape, dtype=None, **more):
        made = empty(*shape, dtype=dtype, **more)
        return made.fill_(255) if dtype == torch.uint8 and made.device.type == "cpu" else made

    monkeypatch.setattr(torch, "empty", allocate)


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_a_pass_gives_what_its_stages_give(name, poisoned_blocks):
    problem, plan, inputs = case_of(name)
    given = inputs.present()
    execution = Execution(plan, problem, inputs, scale=SCALE, output_final_state=True)
    expected = list(execution.forward())
    made = record_forward(plan, problem, specs_of(given), SCALE, True)
    forward = Pass(made, [tensor.shape for tensor in expected], bind_interpreter)
    actual = forward.run(list(given.values()))
    assert all(torch.equal(a, e) for a, e in zip(actual.tensors, expected, strict=True))
    if not problem.trains:
        assert actual.saved == []
        return
    more = {"do": torch.randn_like(expected[0]), "d_final_state": torch.randn_like(expected[1])}
    gradients = execution.backward(*more.values())
    shapes = [given[key].shape for key in gradient_names(given)]
    backward = Pass(record_backward(plan, problem, specs_of(given | more), SCALE), shapes, bind_interpreter)
    found = backward.run([*given.values(), *more.values()], actual.saved)
    for key, tensor in zip(gradient_names(given), found.tensors, strict=True):
        assert torch.equal(tensor, gradients[key]), key


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU runs prepared passes, in the interpreter."""
    monkeypatch.setattr(autograd, "is_prepared", lambda tensor: True)
    monkeypatch.setattr(Pass.__init__, "__defaults__", (bind_interpreter,))
    for cached in (forward_pass, backward_pass):
        cached.cache_clear()
    yield
    for cached in (forward_pass, backward_pass):
        cached.cache_clear()


OPS = {
    "gdn": dict(rule="gdn", seq_len=19, state=True),
    "packed": dict(rule="gla", lengths=(3, 0, 18), partitions=2),
    "plain": dict(rule="gla", partitions=0, seq_len=17, batch=1),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_the_operation_on_prepared_passes(name, as_on_a_gpu, poisoned_blocks):
    case = make_case(**OPS[name], key=16, value=16)
    case["q"] = case["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(with_gradients(by_triton, case), exact(case), 1e-4)


@pytest.mark.interpret
def test_the_operators_on_prepared_passes(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr("sse_tune.runtime.call.runs_at_once", lambda tensors: False)
    case = make_case(**OPS["gdn"], key=16, value=16)
    assert_close(with_gradients(by_triton, case), exact(case), 1e-4)


class Spy:
    """Binds launches that write down what they get and launch nothing."""

    def __init__(self):
        self.bound, self.calls = [], []

    def __call__(self, launch, index):
        self.bound.append(index)
        names = tuple(launch.args)

        def run(values, stream):
            self.calls.append((launch, dict(zip(names, values)), stream, threading.get_ident()))

        return names, run


def spied_forward(problem, plan, given, **more):
    spy = Spy()
    made = record_forward(plan, problem, specs_of(given), SCALE, False)
    return spy, Pass(made, [given["v"].shape], spy)


def pointers(call):
    launch, values, *_ = call
    return {name: values[name] for name, value in launch.args.items() if isinstance(value, Pointer)}


def test_a_tensor_that_is_not_aligned_is_copied():
    problem, plan, inputs = case_of("gdn")
    given = inputs.present()
    shifted = torch.empty(given["g"].numel() + 1)[1:].view(given["g"].shape).copy_(given["g"])
    assert shifted.data_ptr() % ADDRESS_ALIGNMENT and shifted.is_contiguous()
    found = []

    def bind(launch, index):
        def run(values, stream):
            named = dict(zip(launch.args, values))
            if "shared_g" in named and "g_cumsum" in named:
                found.append((named["g"], tensor_at(named["g"], torch.float32).item()))

        return tuple(launch.args), run

    made = Pass(record_forward(plan, problem, specs_of(given), SCALE, False), [given["v"].shape], bind)
    for g in (given["g"], shifted, given["g"]):
        made.run(list((given | {"g": g}).values()))
    first, copied, last = found
    assert first[0] == last[0] == given["g"].data_ptr()
    assert copied[0] not in (shifted.data_ptr(), first[0]) and copied[0] % ADDRESS_ALIGNMENT == 0
    assert copied[1] == given["g"].flatten()[0].item()


def test_every_call_launches_on_its_own_tensors():
    problem, plan, inputs = case_of("gdn")
    given = inputs.present()
    spy, made = spied_forward(problem, plan, given)
    for _ in range(3):
        own = {name: tensor.clone() for name, tensor in given.items()}
        spy.calls.clear()
        made.run(list(own.values()))
        seen = {name: address for call in spy.calls for name, address in pointers(call).items() if name in own}
        assert seen == {name: tensor.data_ptr() for name, tensor in own.items()}


def test_threads_do_not_mix_their_tensors():
    problem, plan, inputs = case_of("gdn")
    spy, made = spied_forward(problem, plan, inputs.present())
    own = {}

    def work():
        tensors = [tensor.clone() for tensor in inputs.present().values()]
        own[threading.get_ident()] = {tensor.data_ptr() for tensor in tensors}
        barrier.wait()
        for _ in range(50):
            made.run(tensors)
        barrier.wait()

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(own) == 3
    everyones = set().union(*own.values())
    for call in spy.calls:
        assert set(pointers(call).values()) & everyones <= own[call[3]]


def test_nothing_of_a_call_stays():
    problem, plan, inputs = case_of("gdn")
    _, made = spied_forward(problem, plan, inputs.present())
    tensors = [tensor.clone() for tensor in inputs.present().values()]
    results = made.run(tensors)
    alive = [weakref.ref(tensor) for tensor in (*tensors, *results.tensors, *results.saved)]
    del tensors, results
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_other_shapes_dtypes_and_scales_are_other_passes(as_on_a_gpu):
    problem, plan, inputs = case_of("gdn")
    longer, _, more = case_of("gdn", seq_len=37)
    names, specs = ",".join(inputs.present()), tuple(specs_of(inputs.present()).values())
    low = tuple(specs_of(inputs.present() | {"g": inputs.g.half()}).values())
    first = forward_pass(names, specs, write_problem(problem), plan.to_json(), SCALE, False)
    others = [
        forward_pass(names, specs_, write_problem(posed), plan.to_json(), scale, states)
        for specs_, posed, scale, states in (
            (low, problem, SCALE, False), (tuple(specs_of(more.present()).values()), longer, SCALE, False),
            (specs, problem, 1.0, False), (specs, problem, SCALE, True),
        )
    ]
    assert forward_pass(names, specs, write_problem(problem), plan.to_json(), SCALE, False) is first
    assert len({id(made) for made in (first, *others)}) == 5

    def g_of(made):
        launches = [launch for step in made._recording.steps for launch, _ in step.launches]
        return next(launch.args["g"].dtype for launch in launches if "g" in launch.args)

    def grids(made):
        return [launch.grid for step in made._recording.steps for launch, _ in step.launches]

    assert (g_of(first), g_of(others[0])) == (torch.float32, torch.float16)
    assert grids(first) != grids(others[1])


def test_launches_are_bound_for_each_gpu_and_state_of_the_compiler(monkeypatch):
    problem, plan, inputs = case_of("gdn")
    spy, made = spied_forward(problem, plan, inputs.present())
    launches = made._launches(0, (False, ""))
    count = len(spy.bound)
    assert made._launches(0, (False, "")) is launches and len(spy.bound) == count
    assert made._launches(1, (False, "")) is not launches and made._launches(0, (True, "")) is not launches
    assert collections.Counter(spy.bound) == {0: 2 * count, 1: count}
    monkeypatch.setattr(prepared, "_MAX_BOUND", 1)
    made._launches(2, ())
    assert len(made._bound) == 1


def test_a_gpu_is_made_the_current_one(monkeypatch):
    problem, plan, inputs = case_of("gdn")
    _, made = spied_forward(problem, plan, inputs.present())
    entered = []
    device = types.SimpleNamespace(type="cuda", index=1)
    first = types.SimpleNamespace(device=device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or torch.no_grad())
    monkeypatch.setattr(made, "_run_on_gpu", lambda tensors, saved, d: (d, list(entered)))
    assert made.run([first]) == (device, [device])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert made.run([first]) == (device, [device])


def passes_of(name):
    """Problem, plan, the forward pass's recording and, if there is one, the backward pass's."""
    problem, plan, inputs = case_of(name)
    given = inputs.present()
    forward = record_forward(plan, problem, specs_of(given), SCALE, True)
    if not problem.trains:
        return problem, plan, given, [forward]
    state = torch.empty(pipeline.state_shape(problem))
    more = {"do": torch.empty_like(given["v"]), "d_final_state": state}
    return problem, plan, given, [forward, record_backward(plan, problem, specs_of(given | more), SCALE)]


@pytest.mark.parametrize("small", [-1, 1024, recording.SMALL_BYTES])
@pytest.mark.parametrize("name", CASES)
def test_launches_use_memory_that_is_there_and_their_own(name, small, monkeypatch):
    monkeypatch.setattr(recording, "SMALL_BYTES", small)
    _, _, given, passes = passes_of(name)
    for made, handed_in in zip(passes, (len(given), len(given) + 2)):
        there = dict.fromkeys(range(handed_in)) | {slot: None for block in made.saved_in for slot, _ in block.members}
        alive = {}
        for step in made.steps:
            there |= {slot: None for slot, _ in step.results}
            for number, block in step.blocks:
                alive[number] = block
                ends = [*(offset for _, offset in block.members[1:]), block.nbytes]
                assert all(start < end for (_, start), end in zip(block.members, ends)), "buffers of a block overlap"
            reach = there.keys() | {slot for block in alive.values() for slot, _ in block.members}
            for launch, slots in step.launches:
                used = {slots[name] for name, value in launch.args.items() if isinstance(value, Pointer)}
                assert used <= reach, launch
            for number in step.ends:
                del alive[number]
        assert alive.keys() == set(made.saved_out)


@pytest.mark.parametrize("name", CASES)
def test_memory_lasts_no_longer_than_the_stages_need(name, nothing_is_small):
    """The bytes alive while a stage runs are at most those of `Execution`, but for alignment."""
    problem, plan, given, passes = passes_of(name)
    held = []  # by stage

    class Weighing(Execution):
        def _call(self, stage, choice):
            own = [t for n, t in self.tensors.items() if n in pipeline.BUFFERS]
            held.append(sum(t.untyped_storage().nbytes() for t in own))
            super()._call(stage, choice)

    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in given.items()}
    execution = Weighing(
        plan, problem, pipeline.Inputs(**meta), scale=SCALE, output_final_state=True, launcher=lambda *a, **k: None
    )
    execution.forward()
    forward = len(held)
    if problem.trains:
        execution.backward(meta["v"], torch.empty(pipeline.state_shape(problem), device="meta"))
    for made, expected in zip(passes, (held[:forward], held[forward:])):
        alive = {("saved", place): block for place, block in enumerate(made.saved_in)}
        for step, allowed in zip(made.steps, expected, strict=True):
            alive |= dict(step.blocks)
            scratch = sum(block.nbytes for block in alive.values() if _is_scratch(block, step))
            slack = 2 * recording.BLOCK_ALIGNMENT * sum(len(block.members) for block in alive.values())
            now = sum(block.nbytes for block in alive.values()) - scratch
            assert now <= allowed + slack
            for number in (*step.ends, *(("saved", place) for place in step.saved_ends)):
                del alive[number]


@pytest.mark.parametrize("name", CASES)
def test_small_buffers_share_an_allocation(name, monkeypatch):
    """One for what passes and one for what is saved; a buffer larger than that keeps its own."""

    def blocks_of(limit):
        monkeypatch.setattr(recording, "SMALL_BYTES", limit)
        return [[block for step in made.steps for _, block in step.blocks] for made in passes_of(name)[-1]]

    apart, together = blocks_of(-1), blocks_of(2**40)
    largest = [max((b for b in found if len(b.members) == 1), key=lambda block: block.nbytes) for found in apart]
    for before, after, passes in zip(apart, together, passes_of(name)[-1], strict=True):
        assert len(after) == 1 + bool(passes.saved_out) < len(before)
        slots = [sorted(slot for block in blocks for slot, _ in block.members) for blocks in (before, after)]
        assert slots[0] == slots[1]
    for block, after in zip(largest, blocks_of(min(block.nbytes for block in largest) - recording.BLOCK_ALIGNMENT)):
        assert block in after and len(after) > 1


def test_blocks_are_freed_with_the_stages_they_end_with(monkeypatch, nothing_is_small):
    problem, plan, inputs = case_of("gdn")
    empty, blocks, alive = torch.empty, [], []

    def allocate(*shape, **more):
        made = empty(*shape, **more)
        if made.dtype == torch.uint8:
            blocks.append(weakref.ref(made))
        return made

    def bind(launch, index):
        return tuple(launch.args), lambda values, stream: alive.append(sum(block() is not None for block in blocks))

    made = record_forward(plan, problem, specs_of(inputs.present()), SCALE, False)
    monkeypatch.setattr(torch, "empty", allocate)
    results = Pass(made, [inputs.v.shape], bind).run(list(inputs.present().values()))
    expected, count = [], 0
    for step in made.steps:
        count += len(step.blocks)
        expected += [count] * len(step.launches)
        count -= len(step.ends)
    assert alive == expected and len(results.saved) == count


def test_saved_blocks_are_let_go_while_a_backward_pass_runs_unless_the_graph_is_kept(monkeypatch, nothing_is_small):
    problem, plan, inputs = case_of("gdn")
    empty, blocks, alive = torch.empty, [], []

    def allocate(*shape, **more):
        made = empty(*shape, **more)
        if made.dtype == torch.uint8:
            blocks.append(weakref.ref(made))
        return made

    def bind(launch, index):
        return tuple(launch.args), lambda values, stream: alive.append(sum(block() is not None for block in saved))

    monkeypatch.setattr(autograd, "is_prepared", lambda tensor: True)
    monkeypatch.setattr(Pass.__init__, "__defaults__", (bind,))
    monkeypatch.setattr(torch, "empty", allocate)
    forward_pass.cache_clear()
    backward_pass.cache_clear()
    saved = []
    settings = Settings(write_problem(problem), plan.to_json(), SCALE, False)
    tensors = {
        name: tensor.detach().requires_grad_(name != "cu_seqlens" and tensor.is_floating_point())
        for name, tensor in inputs.present().items()
    }
    o, _ = autograd.run_at_once(tensors, settings)
    saved += [block for block in blocks if block() is not None]
    count = len(saved_blocks(plan, problem))
    assert len(saved) == count > 2
    alive.clear()
    o.sum().backward(retain_graph=True)
    assert set(alive) == {count}
    alive.clear()
    o.sum().backward()
    assert alive[0] == count and alive == sorted(alive, reverse=True)
    last_stage = [block for block in saved_blocks(plan, problem) if {"inv", "chosen"} & {name for name, _ in block[1]}]
    assert alive[-1] == len(last_stage) < count
    forward_pass.cache_clear()
    backward_pass.cache_clear()


def _is_scratch(block, step):
    """Whether a block is born and ends with one stage: a template's scratch, which `Execution` does not know of."""
    return any(block is own and number in step.ends for number, own in step.blocks)


def test_a_template_that_computes_is_not_recorded(monkeypatch):
    problem, plan, inputs = case_of("gdn")

    def find(backend, name):
        def run(call, tensors):
            tensors["k_scale"].zero_()

        found = find_template(backend, name)
        return dataclasses.replace(found, run=run) if found.stage == "prepare" else found

    monkeypatch.setattr(pipeline, "find_template", find)
    with pytest.raises(AssertionError, match="may launch kernels and allocate scratch"):
        record_forward(plan, problem, specs_of(inputs.present()), SCALE, False)


def test_compilers_state_is_what_triton_can_change(monkeypatch):
    import triton

    before = bound.compiler_state()
    monkeypatch.setattr(triton.knobs.runtime, "debug", not triton.knobs.runtime.debug)
    assert bound.compiler_state() != before


def test_only_plain_tensors_outside_of_any_mode_run_at_once():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    plain = torch.zeros(2)
    assert autograd.runs_at_once([plain, torch.nn.Parameter(plain)])
    with FakeTensorMode() as mode:
        assert not autograd.runs_at_once([plain])
        fake = mode.from_tensor(plain)
    assert not autograd.runs_at_once([plain, fake])
    with FlopCounterMode(display=False):
        assert not autograd.runs_at_once([plain])
    seen = []
    torch.func.grad(lambda x: seen.append(autograd.runs_at_once([x])) or x.sum())(plain)
    assert seen == [False]
