"""The engine: what is compiled runs, whatever was asked for before it."""

import concurrent.futures
import threading
import types

from sse_tune.database.store import TuningDatabase
from sse_tune.tuning.ahead import Compiled
from sse_tune.tuning.candidates import Settings
from sse_tune.tuning.engine import Engine
from sse_tune.tuning.evaluate import Evaluator
from sse_tune.tuning.landscape import Templates
from sse_tune.tuning.lanes import Lanes
from sse_tune.tuning.recorder import Recorder
from sse_tune.tuning.strategy import WholePlans
from sse_tune.tuning.worker import Worker


class SlowFirst(Engine):
    """Its compilers take a tenth of a second, and for the first candidate until another one has ended."""

    def compile(self, candidate):
        future = concurrent.futures.Future()
        seconds = 0.1
        if not hasattr(self, "first"):
            self.first, self.ended, seconds = future, [], 20.0
        compiler = threading.Timer(seconds, lambda: future.done() or future.set_result(Compiled("ok", None, {})))
        compiler.daemon = True
        compiler.start()
        return [future]

    def _end(self, strategy, candidate, result, resources):
        super()._end(strategy, candidate, result, resources)
        self.ended.append(candidate)
        if not self.first.done():
            self.first.set_result(Compiled("ok", None, {}))


def test_a_candidate_that_takes_long_to_compile_holds_up_no_other(small, cpu, tmp_path):
    with TuningDatabase(tmp_path / "tuning.db") as database, Worker(threads=1) as worker:
        lanes = Lanes([worker])
        recorder = Recorder(database, database.open_study("key", small, cpu, {}), small, resume=False, budget_s=600)
        engine = SlowFirst(Evaluator(small, cpu, recorder), types.SimpleNamespace(size=1), lanes)
        landscape = Templates(small, cpu, ("torch",))
        strategy = WholePlans(landscape, Settings(sampler="exhaustive"))
        engine.run(strategy, 1.0)
        recorder.close()
        lanes.close()
    assert landscape.base(None) in [candidate.plan for candidate in engine.ended[1:]], "the first asked, not first run"
    assert len(engine.ended) == len(database.trials()) > 2
    assert 0.0 < engine.compile_wait_s < 10.0


def test_what_is_withdrawn_leaves_the_compilers_unless_others_need_it():
    shared, own = concurrent.futures.Future(), concurrent.futures.Future()
    engine, taken_back = Engine.__new__(Engine), []
    engine.ahead = types.SimpleNamespace(withdraw=taken_back.extend)
    engine._queue = [("dropped", [shared, own]), ("kept", [shared])]
    engine._withdraw(types.SimpleNamespace(withdraw=lambda candidate: candidate == "dropped"))
    assert engine._queue == [("kept", [shared])]
    assert taken_back == [own]
