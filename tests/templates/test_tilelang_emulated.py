"""TileLang's kernels of GLA, run on the CPU as generated for sm_90, against float64. Needs no GPU.

`emulated_cuda` says what such a run can show and what it cannot.
"""

import itertools
import re

import pytest
import torch

from sse_tune.compile import meta_tensors
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.space import Config
from sse_tune.templates.buffers import Sizes
from sse_tune.templates.registry import Call, find_template
from sse_tune.templates.stages import stages_of
from tests.conftest import POISON
from tests.templates import emulated_cuda
from tests.templates.emulated_cuda import MODES, EmulationError, Launcher

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=f"nothing to emulate with: {emulated_cuda.missing()}"
)

CHUNK = 64
OUTER = Config(chunk_size=CHUNK, state_dtype="io", states="store", split=0)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp16": 1e-3, "bf16": 5e-3}  # relative, of the whole; a rounding is 2^-11 or 2^-8 at most
# tokens of each sequence that choose each partition: segments that are empty, shorter than a chunk, of a whole chunk,
# and of more chunks than are in flight
CHOICES = ((0, 64, 5), (270, 1, 129))
PROBLEM = Problem(
    rule="gla", seq_len=sum(map(sum, CHOICES)), num_heads=2, head_dim=64, head_dim_v=64, dtype="bf16",
    num_sequences=len(CHOICES), num_partitions=len(CHOICES[0]), top_k=1, read_k=1, norm="none",
)  # fmt: skip
WIDE = PROBLEM.replace(head_dim=128, head_dim_v=128, dtype="fp16")


class Segments:
    """Where the rows and chunks of PROBLEM's segments lie, and its tables."""

    def __init__(self, problem):
        sizes = Sizes.of(problem, OUTER)
        random = torch.Generator().manual_seed(1)
        lengths = [sum(choices) for choices in CHOICES] + [length for choices in CHOICES for length in choices]
        self.rows = [0, *itertools.accumulate(lengths)]
        self.n_chunks = [-(-length // CHUNK) for length in lengths]
        self.chunks = [0, *itertools.accumulate(self.n_chunks)]
        self.boundaries = [0, *itertools.accumulate(max(0, n - 1) for n in self.n_chunks)]
        perm, first = [token * 2 for token in range(problem.seq_len)], 0
        for choices in CHOICES:  # tokens of a partition lie anywhere in their sequence, in order
            order = first + torch.randperm(sum(choices), generator=random)
            perm += [int(token) * 2 + 1 for part in order.split(list(choices)) for token in part.sort().values]
            first += sum(choices)
        table = torch.tensor([[-1, 0, 0, -1, -1]]).repeat(sizes.chunks, 1)
        for chunk, (segment, i) in enumerate(self.all_chunks()):
            begin, boundary = self.rows[segment] + i * CHUNK, self.boundaries[segment] + i
            n_rows = min(CHUNK, self.rows[segment + 1] - begin)
            after = boundary if i + 1 < self.n_chunks[segment] else -1
            table[chunk] = torch.tensor([segment, begin, n_rows, boundary - 1 if i else -1, after])
        tables = dict(
            perm=perm, segment_rows=self.rows, segment_chunks=self.chunks, segment_boundaries=self.boundaries,
            chunk_table=table,
        )  # fmt: skip
        self.tables = {name: torch.as_tensor(values).to(torch.int32) for name, values in tables.items()}

    def all_chunks(self):
        return [(segment, i) for segment, n in enumerate(self.n_chunks) for i in range(n)]

    def state_of(self, segment):
        """Where in [S, P] its state lies."""
        n = len(CHOICES)
        return (segment, 0) if segment < n else ((segment - n) // len(CHOICES[0]), 1 + (segment - n) % len(CHOICES[0]))

    def slice_of(self, segment, i):
        begin = self.rows[segment] + i * CHUNK
        return slice(begin, min(begin + CHUNK, self.rows[segment + 1]))


def case_of(name, problem, **choices):
    """A template, its call's arguments without the launcher, and tensors whose outputs are poison; `choices` are those
    of the plan's outer ones and of the template's own that are not the default."""
    template = find_template("tilelang", name)
    outer = OUTER.replace(**{key: value for key, value in choices.items() if key in OUTER})
    sizes = Sizes.of(problem, outer)
    stage = next(stage for stage in stages_of(problem, outer) if stage.name == template.stage)
    own = {key: value for key, value in choices.items() if key not in OUTER}
    config = Config({**outer, **template.space.default(problem, ARCHS["sm_90"], outer).replace(**own)})
    segments = Segments(problem)
    random = torch.Generator().manual_seed(2)
    tensors = {}
    for key, meta in meta_tensors(stage, sizes, outer).items():
        if key in segments.tables:
            assert segments.tables[key].shape == meta.shape, key
            tensors[key] = segments.tables[key]
        elif key in stage.writes:
            tensors[key] = torch.full(meta.shape, POISON.get(meta.dtype, float("nan")), dtype=meta.dtype)
        else:
            made = torch.rand if key == "decay" else torch.randn
            tensors[key] = made(meta.shape, generator=random).to(meta.dtype)
    return template, (sizes, config), tensors, segments


def run(case, mode=MODES[0], edit=None):
    """What the kernel makes of a case, by name; its tensors stay as they are."""
    template, (sizes, config), tensors, _ = case
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    template.run(Call(sizes, config, Launcher(mode, edit), sizes.problem.key_dim**-0.5), tensors)
    return tensors


def walk(case, x, y, states, first, last, reverse):
    """S <- e^(b_C) S + xᵀ y."""
    *_, tensors, segments = case
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    token = tensors["perm"].long() // 2
    for segment, n_chunks in enumerate(segments.n_chunks):
        at = segments.state_of(segment)
        state = exact[first][at]
        for i in reversed(range(n_chunks)) if reverse else range(n_chunks):
            rows = segments.slice_of(segment, i)
            decay = exact["decay"][segments.chunks[segment] + i]
            state = decay[:, :, None] * state + torch.einsum("hck,chv->hkv", exact[x][:, rows], exact[y][token[rows]])
            if i != (0 if reverse else n_chunks - 1):
                exact[states][segments.boundaries[segment] + (i - 1 if reverse else i)] = state
        exact[last][at] = state
    return {name: exact[name] for name in (states, last)}


def apply(case, x, y, states, end, out, after):
    """O = qg S + P V, or dV = kg dS + Pᵀ dO."""
    *_, tensors, segments = case
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    token = tensors["perm"].long() // 2
    for chunk, (segment, i) in enumerate(segments.all_chunks()):
        rows = segments.slice_of(segment, i)
        boundary = tensors["chunk_table"][chunk, 4 if after else 3]
        state = exact[states][boundary] if boundary >= 0 else exact[end][segments.state_of(segment)]
        # of rows that are not there, P has columns too
        scores = exact["P"][:, rows] if after else exact["P"][:, rows, : rows.stop - rows.start]
        products = "hcd,chv->dhv" if after else "hdc,chv->dhv"
        inner = torch.einsum(products, scores, exact[y][token[rows]])[: rows.stop - rows.start]
        exact[out][rows] = torch.einsum("hck,hkv->chv", exact[x][:, rows], state) + inner
    return {out: exact[out]}


def walk_and_apply(case, rows, states, ends, out, reverse):
    """Both: the rows x, z and y, of which x meet the states that z and y make."""
    template, arguments, tensors, segments = case
    walked = walk(case, *rows[1:], states, *ends, reverse)
    tensors = {**tensors, states: walked[states], "chunk_table": segments.tables["chunk_table"]}
    return walked | apply(
        (template, arguments, tensors, segments), rows[0], rows[2], states, ends[0], out, after=reverse
    )


FORWARD, BACKWARD = ("initial_state", "final_state"), ("d_final_state", "d_initial_state")
EXACT = {
    "gla_states": lambda case: walk(case, "kg", "v", "h", *FORWARD, reverse=False),
    "gla_states_backward": lambda case: walk(case, "qg", "do", "dh", *BACKWARD, reverse=True),
    "gla_output": lambda case: apply(case, "qg", "v", "h", FORWARD[0], "o_rows", after=False),
    "gla_value_gradients": lambda case: apply(case, "kg", "do", "dh", BACKWARD[0], "dv_rows", after=True),
    "gla_states_output": lambda case: walk_and_apply(case, ("qg", "kg", "v"), "h", FORWARD, "o_rows", reverse=False),
    "gla_states_value_gradients": lambda case: walk_and_apply(
        case, ("kg", "qg", "do"), "dh", BACKWARD, "dv_rows", reverse=True
    ),
}


def differing(case, actual, exact):
    """Names of the outputs that are not the exact ones; where those are NaN, nothing was to be written."""
    template, (sizes, _), *_ = case
    wrong = []
    for name, expected in exact.items():
        assert expected.isnan().float().mean() < 0.5
        difference = torch.where(expected.isnan() & actual[name].isnan(), 0.0, actual[name].double() - expected)
        if not difference.norm() <= TOLERANCE[sizes.problem.dtype] * expected.nan_to_num().norm():
            wrong.append(name)
    return wrong


CASES = (
    ("gla_states", PROBLEM, {}),
    ("gla_states_backward", WIDE, {}),
    ("gla_output", WIDE, {}),
    ("gla_value_gradients", PROBLEM, {}),
    ("gla_states_output", WIDE, {"states": "joint"}),
    ("gla_states_value_gradients", PROBLEM, {"states": "joint", "num_stages": 3}),
)


@pytest.mark.parametrize(("name", "problem", "choices"), CASES, ids=[name for name, *_ in CASES])
def test_it_computes_its_formula(name, problem, choices):
    case = case_of(name, problem, **choices)
    exact = EXACT[name](case)
    results = {mode: run(case, mode) for mode in MODES}
    for mode, actual in results.items():
        assert not differing(case, actual, exact), str(mode)
        for output in exact:  # the order of threads is no part of the sum's
            assert torch.equal(actual[output].nan_to_num(), results[MODES[0]][output].nan_to_num()), str(mode)


@pytest.fixture(scope="module")
def states():
    """A case of gla_states, and what is exact."""
    case = case_of("gla_states", PROBLEM)
    return case, EXACT["gla_states"](case)


def modes_that_show(states, pattern, replacement):
    """The modes whose results differ once a part of the source is another, or that refuse to go on, by their reason."""
    case, exact = states
    shown = {}

    def edit(text):
        edited, count = re.subn(pattern, replacement, text)
        assert count == 1, (pattern, count)
        return edited

    for mode in MODES:
        try:
            wrong = differing(case, run(case, mode, edit), exact)
        except EmulationError as error:
            wrong = str(error)
        if wrong:
            shown[mode] = wrong
    return shown


def late_ones(shown):
    return {mode.order for mode in shown if mode.timing == "late"}


def test_it_shows_a_copy_that_is_not_waited_for(states):
    shown = modes_that_show(states, r"cp_async_wait<2>", "cp_async_wait<3>")
    assert late_ones(shown) == {"forward", "backward", "scattered"}


def test_it_shows_a_product_that_is_not_waited_for(states):
    shown = modes_that_show(states, r"tl::wait_wgmma<0>\(\);", "")
    assert late_ones(shown) == {"forward", "backward", "scattered"}


def test_it_shows_a_barrier_that_is_missing_behind_a_copy(states):
    barriers = r"__syncthreads\(\);\s*(tl::fence_proxy_async\(\);)\s*__syncthreads\(\);"
    assert modes_that_show(states, barriers, r"\1")


def test_it_shows_a_tile_that_is_written_while_others_read_it(states):
    """Without the barriers between the stores of a state that leaves and the next state in its tile."""
    barriers = r"(?s)__syncthreads\(\);(\s*if \(\(step \+ 3\).*)__syncthreads\(\);(.*ptx_stmatrix)"
    assert modes_that_show(states, barriers, r"\1\2")


def test_it_shows_a_missing_fence_of_the_async_proxy(states):
    shown = modes_that_show(states, r"tl::fence_proxy_async\(\);\s*__syncthreads", "__syncthreads")
    assert set(shown) == set(MODES)
    assert all("last fence of the async proxy" in reason for reason in shown.values())


def test_it_shows_a_read_past_the_end_of_a_tensor(states):
    (template, arguments, tensors, segments), exact = states
    perm = tensors["perm"].clone()
    perm[-1] = 2 * PROBLEM.seq_len
    case = (template, arguments, {**tensors, "perm": perm}, segments)
    with pytest.raises(EmulationError, match=r"gla_walk_kernel: block .*, \d+ bytes past the end of y"):
        run(case)


def test_it_shows_threads_that_wait_for_ever(states):
    shown = modes_that_show(states, r"\}\s*\Z", "if (threadIdx.x < 64) __syncthreads(); }")
    assert set(shown) == set(MODES)
    assert all("64 threads wait for others that do not come" in reason for reason in shown.values())
