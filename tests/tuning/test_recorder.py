"""The recorder: what it takes from a study that other versions have written to."""

from sse_tune.database.records import Trial
from sse_tune.database.store import TuningDatabase
from sse_tune.device import ARCHS
from sse_tune.problem import Problem
from sse_tune.templates.registry import default_plan
from sse_tune.tuning.candidates import Candidate
from sse_tune.tuning.recorder import Recorder

DEVICE = ARCHS["sm_90"]
PROBLEM = Problem.preset("sse-gla-128")


def test_a_resumed_search_passes_over_trials_with_other_outer_choices(tmp_path):
    plan = default_plan(PROBLEM, DEVICE)
    older = plan.to_dict()
    del older["outer"]["states"]

    with TuningDatabase(tmp_path / "tuning.db") as database:
        study = database.open_study("0" * 32, PROBLEM, DEVICE, {})
        for written in (older, plan.to_dict()):
            database.add_trial(
                Trial(study=study, kind="stage", stage="states", plan=written, outcome="ok", time_us=1.0,
                      timings_us=(1.0,), created="2026-11-25T00:00:00+00:00")
            )  # fmt: skip
        recorder = Recorder(database, study, PROBLEM, resume=True, budget_s=60)
        assert list(recorder.known) == [Candidate("stage", plan, stage="states").key(PROBLEM)]
        recorder.close()
