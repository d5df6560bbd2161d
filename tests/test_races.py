"""races.py: on what Triton makes of small kernels for sm_90, each judged here by its own reading too, and on texts."""

import re

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sse_tune.races import pipeline_races

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton interprets: there is nothing to compile; `make test` runs this apart"
)

triton_3_6 = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="this defect is Triton 3.6's")


@triton.jit
def gram_kernel(x, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr):
    """A product of a tile with its own transpose; SQUARES: and the sum of its squares, a second use of the tile."""
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    b_square = tl.full([BLOCK], 1.0, tl.float32)
    b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, D, BLOCK, num_stages=STAGES):
        b = tl.load(x + o_r[:, None] * D + (i + o_k)[None, :])
        if SQUARES:
            b32 = b.to(tl.float32)
            b_square += tl.sum(b32 * b32, 1)
        b_gram = tl.dot(b, tl.trans(b), b_gram)
    tl.store(out + o_r[:, None] * BLOCK + o_k[None, :], b_gram / b_square[:, None])


@triton.jit
def gemm_kernel(x, y, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    b_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, D, BLOCK, num_stages=STAGES):
        b_x = tl.load(x + o_r[:, None] * D + (i + o_k)[None, :])
        b_y = tl.load(y + (i + o_r)[:, None] * BLOCK + o_k[None, :])
        b_out = tl.dot(b_x, b_y, b_out)
    tl.store(out + o_r[:, None] * BLOCK + o_k[None, :], b_out)


@triton.jit
def tma_kernel(x, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr):
    """As `gram_kernel`, copied by the tensor memory accelerator."""
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    rows = tl.make_tensor_descriptor(x, [BLOCK, D], [D, 1], [BLOCK, BLOCK])
    b_square = tl.full([BLOCK], 1.0, tl.float32)
    b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in tl.range(0, D, BLOCK, num_stages=STAGES):
        b = rows.load([0, i])
        if SQUARES:
            b32 = b.to(tl.float32)
            b_square += tl.sum(b32 * b32, 1)
        b_gram = tl.dot(b, tl.trans(b), b_gram)
    tl.store(out + o_r[:, None] * BLOCK + o_k[None, :], b_gram / b_square[:, None])


@triton.jit
def nested_kernel(x, out, D, BLOCK: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr):
    """As `gram_kernel`, for many blocks of rows in turn, the result of every other one stored."""
    o_r, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    for j in range(D):
        b_square = tl.full([BLOCK], 1.0, tl.float32)
        b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        for i in tl.range(0, D, BLOCK, num_stages=STAGES):
            b = tl.load(x + (j * BLOCK + o_r)[:, None] * D + (i + o_k)[None, :])
            if SQUARES:
                b32 = b.to(tl.float32)
                b_square += tl.sum(b32 * b32, 1)
            b_gram = tl.dot(b, tl.trans(b), b_gram)
        if j % 2:
            tl.store(out + (j * BLOCK + o_r)[:, None] * BLOCK + o_k[None, :], b_gram / b_square[:, None])


def ttgir(kernel, capability=90, num_warps=4, **constants):
    constants["BLOCK"] = 64
    kinds = {"x": "*bf16", "y": "*bf16", "out": "*fp32", "D": "i32"}
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in kinds if name in position},
    )
    options = {"num_warps": num_warps, "num_stages": constants["STAGES"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ttgir"]


def racy_by_counting(text):
    """Whether a plain loop's slots are too few: fewer than the tiles copied ahead and the products left in flight.

    In round t the copy is that of tile t + ahead, into the slot that tile t + ahead - slots had.
    """
    before, _, loop = text.partition("scf.for")
    slots = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x64x64xbf16", before)
    if not slots:
        return False  # not pipelined
    ahead = before.count("async_copy_global_to_local") // len(slots)
    pendings = int(re.search(r"warp_group_dot_wait .*pendings = (\d+)", loop)[1])
    return int(slots[0]) < ahead + pendings


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("squares", [False, True])
def test_a_tile_used_twice(stages, squares):
    text = ttgir(gram_kernel, STAGES=stages, SQUARES=squares)
    races = pipeline_races(text)
    assert bool(races) == racy_by_counting(text)
    if not squares or stages == 1:
        assert races == ()


@triton_3_6
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_triton_3_6_gives_a_tile_used_twice_a_slot_too_few(stages):
    text = ttgir(gram_kernel, STAGES=stages, SQUARES=True)
    buffer, slots = re.search(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", text).groups()
    product = re.search(r"(%\S+) = ttng\.warp_group_dot ", text)[1]
    assert int(slots) == stages - 1
    assert pipeline_races(text) == (
        f"ttg.async_copy_global_to_local overwrites a slot of {buffer} ({slots}x64x64xbf16) "
        f"that {product}, in flight, may still read",
    )


@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_an_ordinary_product(stages, num_warps):
    text = ttgir(gemm_kernel, num_warps=num_warps, STAGES=stages)
    assert "ttng.warp_group_dot " in text
    assert ("pendings = 1" in text) == (stages > 1)  # in flight, and yet no race
    assert not racy_by_counting(text)
    assert pipeline_races(text) == ()


@triton_3_6
@pytest.mark.parametrize("kernel", [tma_kernel, nested_kernel], ids=str)
def test_other_copies_and_loops_in_loops(kernel):
    for stages in (2, 3):
        (race,) = pipeline_races(ttgir(kernel, STAGES=stages, SQUARES=True))
        assert ("tma" in race) == (kernel is tma_kernel)
        assert pipeline_races(ttgir(kernel, STAGES=stages, SQUARES=False)) == ()


@pytest.mark.parametrize("capability", [80, 100])
def test_other_architectures_have_no_such_products(capability):
    assert pipeline_races(ttgir(gram_kernel, capability, STAGES=2, SQUARES=True)) == ()


TILE = "!ttg.memdesc<64x64xbf16, #shared, #smem, mutable>"
TEXT = """
#loc = loc("kernel.py":1:0)
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%p: tensor<64x64x!tt.ptr<bf16>> loc("p"(#loc)), %n: i32, %flag: i1) {
    %c-1_i32 = arith.constant -1 : i32 loc(#loc)
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c1_i32 = arith.constant 1 : i32 loc(#loc)
    %c2_i32 = arith.constant SLOTS : i32 loc(#loc)
    %false = arith.constant false loc(#loc)
    %acc = arith.constant dense<0.000000e+00> : tensor<64x64xf32> loc(#loc)
    %buffer = ttg.local_alloc : () -> !ttg.memdesc<SLOTSx64x64xbf16, #shared, #smem, mutable> loc(#loc)
    %out:3 = scf.for %i = %c0_i32 to %n step %c1_i32 iter_args(%a = %acc, %put = %c0_i32, %get = %c-1_i32) {
      %0 = arith.addi %get, %c1_i32 : i32 loc(#loc)
      %1 = arith.cmpi sge, %0, %c2_i32 : i32 loc(#loc)
      %2 = arith.select %1, %c0_i32, %0 : i32 loc(#loc)
      %read = ttg.memdesc_index %buffer[%2] : !ttg.memdesc<SLOTSx64x64xbf16, #shared> -> TILE loc(#loc)
      %turned = ttg.memdesc_trans %read {order = array<i32: 1, 0>} : TILE -> TILE loc(#loc)
BODY
      %3 = arith.addi %put, %c1_i32 : i32 loc(#loc)
      %4 = arith.cmpi sge, %3, %c2_i32 : i32 loc(#loc)
      %5 = arith.select %4, %c0_i32, %3 : i32 loc(#loc)
      %filled = ttg.memdesc_index %buffer[%5] : !ttg.memdesc<SLOTSx64x64xbf16, #shared> -> TILE loc(#loc)
WRITE
      scf.yield %product, %5, %2 : tensor<64x64xf32>, i32, i32 loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
PRODUCT = "%product = ttng.warp_group_dot %x, %turned, %a {isAsync = true} : tensor<64x64xbf16> * TILE -> x loc(#loc)"
WAIT_0 = "%w = ttng.warp_group_dot_wait %product {pendings = 0 : i32} : tensor<64x64xf32> loc(#loc)"
WAIT_1 = "%w = ttng.warp_group_dot_wait %product {pendings = 1 : i32} : tensor<64x64xf32> loc(#loc)"
OTHER = "%other = ttng.warp_group_dot %x, %y, %a {isAsync = true} : tensor<64x64xbf16> * TILE -> x loc(#loc)"
IF, ELSE, END = "scf.if %flag {", "} else {", "} loc(#loc)"
COPY = "%c = ttg.async_copy_global_to_local %p, %filled mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#loc)"
TMA = "ttng.async_tma_copy_global_to_local %d[%i, %i] %filled, %bar, %on : !tt.tensordesc<x>, x -> TILE loc(#loc)"
STORE = "ttg.local_store %x, %filled : tensor<64x64xbf16> -> TILE loc(#loc)"


def written(slots, body, write=COPY):
    lines = {"BODY": "\n".join(body), "WRITE": write, "SLOTS": str(slots), "TILE": TILE}
    return re.sub("BODY|WRITE|SLOTS|TILE", lambda found: lines[found[0]].replace("TILE", TILE), TEXT)


@pytest.mark.parametrize(
    ("slots", "body", "racy"),
    [
        (1, [PRODUCT, WAIT_0], False),
        (1, [PRODUCT, WAIT_1], True),
        (1, [PRODUCT], True),
        (2, [PRODUCT, WAIT_0], False),
        (2, [PRODUCT, WAIT_1], False),
        (2, [PRODUCT], True),  # nothing ever retires that of the round before
        (2, [PRODUCT, OTHER, WAIT_1], False),
        (1, [PRODUCT, OTHER, WAIT_1], False),  # the one left in flight is another
        (1, [OTHER, PRODUCT, WAIT_1], True),
        (1, [PRODUCT.replace("isAsync = true", "isAsync = false")], False),
        (1, [PRODUCT.replace("{isAsync = true}", "")], False),
        (1, [PRODUCT, IF, WAIT_0, END], True),  # where the condition does not hold, nobody waits
        (1, [PRODUCT, IF, WAIT_0, ELSE, WAIT_0, END], False),
        (1, [PRODUCT, IF, WAIT_0, ELSE, OTHER, WAIT_1, END], False),
        (1, [PRODUCT, IF, OTHER, END, WAIT_1], True),
        (1, [PRODUCT, IF.replace("%flag", "%false"), WAIT_0, ELSE, WAIT_1, END], True),
        (1, [PRODUCT, IF.replace("%flag", "%false"), WAIT_1, ELSE, WAIT_0, END], False),
    ],
)  # fmt: skip
def test_what_waits_retire(slots, body, racy):
    races = pipeline_races(written(slots, body))
    assert bool(races) == racy, races
    assert all("of %buffer (" in race and "that %product, in" in race for race in races)


@pytest.mark.parametrize(
    ("write", "racy"),
    [
        (COPY, True),
        (COPY.replace("%m", "%false"), True),  # zeros
        (TMA, True),
        (TMA.replace("%on", "%false"), False),
        (STORE, True),
        (STORE.replace("%filled", "%elsewhere"), False),
    ],
)  # fmt: skip
def test_what_writes(write, racy):
    assert bool(pipeline_races(written(1, [PRODUCT, WAIT_1], write))) == racy
    assert pipeline_races(written(1, [PRODUCT, WAIT_0], write)) == ()


def test_products_that_read_one_slot_share_a_reason():
    others = [PRODUCT.replace("%product", f"%second{i}") for i in range(2)]
    (race,) = pipeline_races(written(1, [PRODUCT, *others, WAIT_1.replace("1 :", "2 :")]))
    assert "that %second0 and 1 more, in flight," in race


def test_views_that_go_through_waits_and_rounds():
    # the product reads in this round what was indexed in the last one: that is the slot which the copy fills
    late = PRODUCT.replace("%turned", "%late")
    text = written(2, [late, WAIT_1]).replace("%get = %c-1_i32)", "%get = %c-1_i32, %late = %none)")
    text = text.replace("scf.yield %product, %5, %2", "scf.yield %product, %5, %2, %w#1")
    text = text.replace("%w = ttng.warp_group_dot_wait %product", "%w:2 = ttng.warp_group_dot_wait %product, %turned")
    assert len(pipeline_races(text)) == 1
    assert pipeline_races(written(2, [PRODUCT, WAIT_1])) == ()


def test_a_loop_runs_as_often_as_its_bounds_say():
    text = written(2, [PRODUCT])  # racy from the second round on
    assert pipeline_races(text.replace("to %n step", "to %c1_i32 step")) == ()
    assert pipeline_races(text.replace("to %n step", "to %c2_i32 step")) != ()
    assert pipeline_races(text.replace("to %n step", "to %c0_i32 step")) == ()


def test_a_slot_of_unknown_number_is_not_judged():
    text = written(1, [PRODUCT, WAIT_1]).replace("%buffer[%5]", "%buffer[%n]")
    assert pipeline_races(text) == ()
    assert pipeline_races(text.replace("%buffer[%2]", "%buffer[%m]")) == ()


def test_a_buffer_filled_from_registers_in_every_round():
    fill = "%read2 = ttg.local_alloc %x : (tensor<64x64xbf16>) -> !ttg.memdesc<64x64xbf16, #shared, #smem> loc(#loc)"
    body = [fill, PRODUCT.replace("%turned", "%read2")]
    assert pipeline_races(written(1, [*body, WAIT_0])) == ()
    (race,) = pipeline_races(written(1, [*body, WAIT_1]))
    assert race.startswith("ttg.local_alloc overwrites a slot of %read2 (64x64xbf16) that %product,")


def test_texts_without_anything():
    assert pipeline_races("") == ()
    assert pipeline_races("module {\n}\n") == ()
    assert pipeline_races('"ttng.warp_group_dot "\n}\n}\n') == ()
