"""Profiles of a run, and the names that make them follow the method."""

import contextlib
import importlib.util
import re

import jax
import numpy as np
import pytest

import tiny
import tiny_processes
from memo_jax.log import read_metrics
from memo_jax.training import program, recipe, step
from memo_jax.training.profile import profiled_steps
from memo_jax.xla import sharding

SCOPES = ["augment", "mel"] + [
    f"{branch}/{part}"
    for branch in ("ecapa", "resnet")
    for part in (
        "teacher/backbone",
        "teacher/head",
        "teacher/distributions",
        r"student/jvp\(backbone\)",
        r"student/transpose\(jvp\(backbone\)\)",
        r"student/jvp\(head\)",
        r"student/jvp\(distillation\)",
        r"student/jvp\(supervised\)",
        r"student/transpose\(jvp\(supervised\)\)",
        "student/cond/.*contrastive",
        "student/update",
    )
]


def without_scopes():
    """Returns the module of the step as it would be without named scopes."""
    spec = importlib.util.spec_from_file_location("step_without_scopes", step.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_are_named_by_their_part_of_the_method_and_compiled_as_without_names(monkeypatch):
    monkeypatch.setattr(recipe, "build_backbone", tiny_processes.layer)
    settings = ("model.branches=ecapa,resnet", "data.local_crops=0", "gate.rule=always", "supervised.weight=1")
    config = tiny.tiny_config(*settings)

    def lowered():
        mesh = sharding.data_mesh(jax.devices()[:1])
        return program.lowered_step(config, recipe.build_recipe(config, 5, speakers=3), mesh, {})

    named = lowered()
    text = named.as_text(debug_info=True)
    assert not [scope for scope in SCOPES if not re.search(rf"jit\(train_step\)/{scope}", text)]

    monkeypatch.setattr(jax, "named_scope", contextlib.contextmanager(lambda name: (yield)))
    monkeypatch.setattr(program, "train_step", without_scopes().train_step)
    plain = lowered()
    assert not [scope for scope in SCOPES if re.search(rf"jit\(train_step\)/{scope}", plain.as_text(debug_info=True))]
    assert plain.as_text() == named.as_text(), "names are no part of what is compiled"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a one-layer network for four steps; returns the workdir and what was printed."""
    tiny_processes.patch_for_tests(monkeypatch.setattr)
    # A program from the cache has the names of the version that compiled it.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)

    def run(name, *more):
        status, text = tiny.here(*tiny_processes.command(tmp_path / name), "--stop-at-step=4", *more)
        assert status == 0, text
        return tmp_path / name, text

    yield run
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def test_a_run_profiles_the_steps_asked_for_and_learns_the_same(train):
    profiled, text = train("profiled", "--profile=2:3")
    assert f"steps 2 to 3 are profiled in {profiled / 'profile'}" in text
    (trace,) = (profiled / "profile").rglob("*.xplane.pb")
    assert b"resnet/student" in trace.read_bytes()
    assert (profiled / "profile" / "memory.prof").stat().st_size > 0
    plain, _ = train("plain")
    assert not (plain / "profile").exists()
    one, other = ([row["loss"] for row in read_metrics(workdir)] for workdir in (profiled, plain))
    np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("compiled_once")
def test_steps_are_counted_from_where_the_command_begins(train):
    train("run")
    workdir, text = train("run", "--stop-at-step=6", "--profile=1:2")
    assert "steps 5 to 6 are profiled" in text


def test_a_number_of_steps_leaves_the_first_ten_out():
    assert profiled_steps("5") == (11, 15) and profiled_steps("20:25") == (20, 25) and profiled_steps("3:3") == (3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:2", "--profile 5:2: give FIRST:LAST"),
        ("0", "--profile 0: give FIRST:LAST"),
        ("0:3", "--profile 0:3: give FIRST:LAST"),
        ("x", "--profile x: give FIRST:LAST"),
        ("5", "step 15 of this command is to be profiled, but it takes 12 steps"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(text, message, tmp_path):
    status, said = tiny.here(*tiny_processes.command(tmp_path / "run"), f"--profile={text}")
    assert status == 2 and message in said and not (tmp_path / "run" / "config.json").exists()
