"""A staged backend made of the reference: fulfils the contract of `buffers.py` for one thing, that the wiring is right.

`scan` computes o and the final state, `gradients` everything by autograd; the stages around them pass rows on as real
ones do. Every template checks that what its stage reads is there and that nothing else is needed.
"""

import concurrent.futures

import torch

from sse_tune.plan import Plan, StageChoice
from sse_tune.reference.recurrent import recurrent
from sse_tune.space import Config, Space
from sse_tune.templates.registry import Template
from sse_tune.templates.stages import stages_of

STREAMS = (
    "q", "k", "v", "g", "beta", "shared_q", "shared_k", "shared_g", "shared_beta", "router_logits", "initial_state"
)  # fmt: skip
ROWS = {"q": "dq_rows", "k": "dk_rows", "g": "dg_rows", "beta": "dbeta_rows"}


def plan_of(problem, chunk_size=16):
    config, outer = Config(), Config(chunk_size=chunk_size, state_dtype="io", states="recompute", split=0)
    stages = {stage.name: StageChoice("fake", stage.name, config) for stage in stages_of(problem, outer)}
    return Plan("staged", outer, stages)


class Fakes:
    """Finds a fake template for every stage, and remembers which buffers were alive when each ran."""

    def __init__(self):
        self.alive = {}

    def find(self, backend, name):
        assert backend == "fake"

        def run(call, tensors):
            self.run(name, call, tensors)

        return Template("fake", name, name, ("gla", "gdn"), Space(), run, ())

    def run(self, name, call, tensors):
        problem = call.sizes.problem
        stage = next(stage for stage in stages_of(problem, call.config) if stage.name == name)
        self.alive[name] = set(tensors)
        optional = {"initial_state", "final_state", "d_final_state", "d_initial_state"}
        optional |= {"router_logits"} if problem.num_partitions == 0 else set()
        missing = (set(stage.reads) | set(stage.writes)) - set(tensors) - optional
        assert not missing, f"{name} lacks {missing}"
        getattr(self, f"_{name}", lambda call, tensors: None)(call, tensors)

    def _routing(self, call, tensors):
        for name in stages_of(call.sizes.problem, call.config)[0].writes:
            tensors[name].zero_()

    def _scan(self, call, tensors):
        o, final_state = _compute(call, tensors, {n: tensors[n] for n in STREAMS if n in tensors})
        tensors["o_rows"][: len(o)] = o
        if "final_state" in tensors:
            tensors["final_state"].copy_(final_state)

    def _combine(self, call, tensors):
        tensors["o"].copy_(tensors["o_rows"][: len(tensors["o"])])

    def _gradients(self, call, tensors):
        problem = call.sizes.problem
        # an operator turns autograd off for its thread; the reference needs it
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            self.found = thread.submit(_reference_gradients, call, tensors).result()
        plain = problem.num_partitions == 0
        for name in ("q", "k", "g", "beta"):
            if f"d_shared_{name}" in tensors:
                tensors[f"d_shared_{name}"].copy_(self.found[name if plain else f"shared_{name}"])
        if plain:
            tensors["d_v"].copy_(self.found["v"])
        if "d_initial_state" in tensors:
            tensors["d_initial_state"].copy_(self.found["initial_state"])

    def _combine_gradients(self, call, tensors):
        for name in ("v", "q", "k", "g", "beta", "router_logits"):
            if name in self.found:
                tensors[f"d_{name}"].copy_(self.found[name])


def _reference_gradients(call, tensors):
    leaves = {name: tensors[name].detach().requires_grad_() for name in STREAMS if name in tensors}
    o, final_state = _compute(call, tensors, leaves)
    results, grads = [o], [tensors["do"]]
    if "d_final_state" in tensors:
        results, grads = [o, final_state], [tensors["do"], tensors["d_final_state"]]
    found = torch.autograd.grad(results, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def _compute(call, tensors, inputs):
    problem = call.sizes.problem
    given = {name: inputs[name][None].float() for name in STREAMS if name in inputs and name != "initial_state"}
    if problem.num_partitions == 0 or not problem.shared:
        given = {name: tensor for name, tensor in given.items() if not name.startswith("shared_")}
    logits = given.pop("router_logits", None)
    o, final_state = recurrent(
        **given, router_logits=logits, top_k=problem.top_k or 1, read_k=problem.readers or 1,
        qk_l2norm=problem.norm != "none", gate_before_norm=problem.norm == "before", scale=call.scale,
        initial_state=inputs.get("initial_state"), output_final_state=True, cu_seqlens=tensors["cu_seqlens"],
    )
    return o[0], final_state
