"""When a record still holds: the reason is told when it does not."""

import dataclasses

import pytest

from sse_tune.database.keys import fits, sources_of, study_key, toolchain_of
from sse_tune.device import Device, toolchain
from sse_tune.templates.registry import code_text, default_plan


def test_fresh_answer_fits(make_answer, cpu, h200, training):
    assert fits(make_answer(), cpu, toolchain()) is None
    assert fits(make_answer(5.0, h200, training), h200, toolchain()) is None


def test_another_device(make_answer, h200, training):
    answer = make_answer(5.0, h200, training)
    b200 = Device("cuda", "NVIDIA B200", "sm_100", 148, 227 * 1024)
    assert fits(answer, b200, toolchain()) == "measured on nvidia-h200 (sm_90), and this is nvidia-b200 (sm_100)"


def test_another_triton(make_answer, h200, training):
    answer = make_answer(5.0, h200, training)
    assert "triton 9.9.9" in fits(answer, h200, {**toolchain(), "triton": "9.9.9"})
    assert "triton none" in fits(answer, h200, {**toolchain(), "triton": None})
    # triton kernels do not change with torch
    assert fits(answer, h200, {**toolchain(), "torch": "9.9.9"}) is None


def test_torch_counts_by_minor_version(make_answer, cpu):
    answer = make_answer()
    major, minor = toolchain()["torch"].split(".")[:2]
    assert fits(answer, cpu, {"torch": f"{major}.{minor}.99"}) is None
    assert "torch" in fits(answer, cpu, {"torch": f"{major}.{int(minor) + 1}.0"})


def test_another_source(make_answer, h200, training):
    answer = make_answer(5.0, h200, training)
    name = next(iter(answer.sources))
    stale = dataclasses.replace(answer, sources={**answer.sources, name: "0" * 16})
    assert fits(stale, h200, toolchain()) == f"measured with another source of {name}"


def test_template_that_is_gone(make_answer, cpu):
    answer = make_answer()
    choice = dataclasses.replace(answer.plan.stages["whole"], template="gone")
    stale = dataclasses.replace(answer, plan=answer.plan.replace_stage("whole", choice))
    assert "'gone'" in fits(stale, cpu, toolchain())


def test_toolchain_and_sources_name_what_a_plan_uses(training, h200, demo, cpu):
    staged, whole = default_plan(training, h200), default_plan(demo, cpu)
    assert toolchain_of(staged, {"triton": "3.6.0", "torch": "2.13.0"}) == {"triton": "3.6.0"}
    assert toolchain_of(whole, {"triton": "3.6.0", "torch": "2.13.0"}) == {"torch": "2.13"}
    assert set(sources_of(staged)) == {f"triton:{choice.template}" for choice in staged.stages.values()}


@pytest.mark.parametrize("changed", ["problem", "device", "backends"])
def test_study_key(demo, cpu, h200, changed):
    arguments = {"problem": demo, "device": cpu, "backends": ("torch",)}
    other = {"problem": demo.replace(seq_len=1000), "device": h200, "backends": ("torch", "triton")}[changed]
    assert study_key(**arguments) == study_key(**arguments)
    assert study_key(**{**arguments, changed: other}) != study_key(**arguments)
    assert study_key(demo, cpu, ("triton", "torch")) == study_key(demo, cpu, ("torch", "triton"))


def test_source_text_is_that_of_the_code_alone():
    plain = "def f(x):\n    return x + 1\n"
    dressed = '"""A module."""\n\n\ndef f(x):\n    """Adds one."""\n    # one more\n    return x + 1\n'
    assert code_text(plain) == code_text(dressed)
    assert code_text(plain) != code_text(plain.replace("1", "1.0"))
    assert code_text(plain) != code_text(plain.replace("+", "-"))


def test_source_text_is_the_same_under_every_python():
    """Written out, so that a version whose syntax trees have other fields turns this red."""
    assert code_text("def f(x: int = 1, *, y):\n    return g(x[0], y=f'{y}')\n") == (
        "Module(body=[FunctionDef(args=arguments(args=[arg(annotation=Name(id='int'),arg='x')],"
        "defaults=[Constant(value=1)],kw_defaults=[None],kwonlyargs=[arg(arg='y')]),"
        "body=[Return(value=Call(args=[Subscript(slice=Constant(value=0),value=Name(id='x'))],func=Name(id='g'),"
        "keywords=[keyword(arg='y',value=JoinedStr(values=[FormattedValue(conversion=-1,value=Name(id='y'))]))]))],"
        "name='f')])"
    )
