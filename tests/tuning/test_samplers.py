"""Parameters as Optuna sees them, and samplers that are there or say why not."""

import importlib.util

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from sse_tune.errors import SearchError
from sse_tune.tuning import samplers
from sse_tune.tuning.samplers import Axis, check_sampler


@pytest.mark.parametrize(
    ("values", "distribution"),
    [
        ((16, 32, 64, 128), IntDistribution(4, 7)),
        ((1, 4, 16), IntDistribution(0, 4, step=2)),
        ((1, 2, 3), IntDistribution(1, 3)),
        ((1, 2, 8), IntDistribution(0, 2)),  # exponents 0, 1, 3: not even, so by their places
        (("rows", "blocks"), CategoricalDistribution(("rows", "blocks"))),
        ((False, True), CategoricalDistribution(("False", "True"))),
    ],
    ids=str,
)
def test_axis(values, distribution):
    axis = Axis.of("x", values)
    assert axis.distribution == distribution
    assert [axis.value(axis.code(value)) for value in values] == list(values)


def test_unknown_sampler():
    with pytest.raises(SearchError, match=r"the sampler must be known, but got 'cmaes'; choose of auto, tpe"):
        check_sampler("cmaes")


def test_gp_without_its_packages_says_so(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    with pytest.raises(SearchError, match=r"gp needs the packages torch and scipy, but got no scipy here; pip install"):
        check_sampler("gp")
    check_sampler("tpe")
