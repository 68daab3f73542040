"""Planning for absent TPUs and GPUs: the command compiles the train step for them and says what it needs."""

import importlib.metadata
import importlib.util
import json
import sys

import jax
import pytest

import tiny
import tiny_processes
from memo_jax.planning import chips
from memo_jax.planning import plan as training_plan
from memo_jax.training import program
from memo_jax.training.front_end import Views
from memo_jax.xla import sharding

has_cuda = any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins"))
needs_cuda = pytest.mark.skipif(not has_cuda, reason="needs JAX's part for CUDA: .[cuda13]")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: .[tpu-plan]")


def arguments(*settings):
    settings = ("model.branches=resnet", "data.local_crops=0", *settings)
    return ["plan", f"--config={tiny.material().config}", *(f"--config.{text}" for text in settings)]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x4", 16), ("v5e:4x4", 16), ("v5p:2x2x4", 16), ("v6e:4x4", 16), ("v5e:2x4", 8), ("v5p:2x2", 4)]
    + [(f"{kind}:1x1", 1) for kind in ("v4", "v5e", "v5p", "v6e")],
)
def test_a_chip_is_one_device(topology, count):
    assert len(chips.compile_only_devices(topology)[1]) == count


@needs_libtpu
def test_the_train_step_is_compiled_for_a_topology(monkeypatch):
    """Without NT-Xent's comparison of all with all, which it quadruples, twice the batch nearly doubles what a chip
    computes; a bank is replicated in the memory of every chip."""

    def with_bank(key, batch, banks):
        ((views,), _) = tiny_processes.front_end(key, batch, banks)
        return Views((views + (banks["noise"][0, 0] / 32768 if banks else 0),))

    tiny_processes.patch_for_tests(monkeypatch.setattr)
    monkeypatch.setattr(program, "build_front_end", lambda config: with_bank)
    plans = []
    bank = ("augment.noise=musan", "augment.bank_megabytes=50")
    for settings in (("data.batch_size=64",), ("data.batch_size=128", *bank)):
        command = arguments("gate.rule=never", *settings)
        status, text = tiny.here(*command, "--topology=v5e:4x4", "--utterances=1280", "--json")
        plans.append(json.loads(text[text.index("{") :]))
        assert status == 0
    one, two = plans
    for key in (
        "hbm_bytes",
        "flops",
        "collective_bytes",
        "seconds_per_step",
        "utilisation",
        "utterances_per_second",
        "compile_seconds",
    ):
        assert one[key] > 0, key
    assert one["fits"] is True and one["chips"] == 16 and one["steps"] == 12
    assert one["utterances_per_second"] == pytest.approx(64 / one["seconds_per_step"])
    assert one["utilisation"] == pytest.approx(one["flops"] / 197e12 / one["seconds_per_step"])
    assert 1.5 < two["flops"] / one["flops"] < 2.1
    assert 50e6 < two["argument_bytes"] - one["argument_bytes"] < 55e6
    assert one["argument_bytes"] + one["temporary_bytes"] <= one["hbm_bytes"] < one["hbm_limit_bytes"]
    assert training_plan.plan_text(one).startswith("v5e:4x4: 16 chips, 64 utterances a step (4 a chip), float32\n")


def test_kmeans_of_positives_is_planned(monkeypatch, capsys):
    """Twice the embeddings take about twice the time; on the devices here, which have no estimates of their own, only
    the memory is planned."""
    mesh, chip = sharding.data_mesh(), chips.CHIPS["h100"]
    config = tiny.tiny_config("positives.clusters=64")
    monkeypatch.setattr(type(chip), "compiler_options", {}, raising=False)
    one, two = (training_plan.kmeans_plan(config, mesh, chip, count) for count in (20_000, 40_000))
    assert one["clusters"] == 64 and one["utterances"] == 20_000
    # The embeddings, their copies in blocks, and their clusters.
    assert 20_000 * 16 * 4 < two["hbm_bytes"] - one["hbm_bytes"] < 5 * 20_000 * 16 * 4
    assert 1.5 < two["seconds"] / one["seconds"] < 2.5


@needs_libtpu
def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
    tiny_processes.patch_for_tests(monkeypatch.setattr)
    monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v5e"]._replace(memory=2e6))
    status, text = tiny.here(*arguments("data.batch_size=64"), "--topology=v5e:2x2")
    assert status == 1 and "DOES NOT FIT" in text and "try --config.data.batch_size=" in text


def test_a_program_that_the_compiler_refuses_for_its_memory_is_a_plan_too(monkeypatch):
    class Refused:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
                "23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G."
            )

    monkeypatch.setattr(training_plan, "compile_only_devices", lambda topology: (chips.CHIPS["v5e"], jax.devices()))
    monkeypatch.setattr(training_plan, "lowered_step", lambda *_: Refused())
    status, text = tiny.here(*arguments("data.batch_size=30"), "--topology=v5e:1x1", "--json")
    result = json.loads(text[text.index("{") :])
    assert status == 1 and result["fits"] is False and result["hbm_bytes"] == int(23.5 * 2**30)
    assert result["flops"] is None and "try --config.data.batch_size=20 (20 utterances a chip)" in result["advice"][0]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2", "4x4", "h100", "h100:2x2x2", "h900:8"])
def test_an_invalid_topology_is_refused(topology):
    status, text = tiny.here(*arguments(), f"--topology={topology}")
    assert status == 2 and "memo-jax: error: topology" in text and "v5e:4x4" in text and "h100:8" in text


@needs_libtpu
def test_a_topology_that_no_pod_has_and_a_batch_that_its_chips_cannot_share_are_refused():
    status, text = tiny.here(*arguments("data.batch_size=6"), "--topology=v5e:2x2")
    assert status == 2 and "data.batch_size 6 is not a multiple of the 4 chips of v5e:2x2" in text
    status, text = tiny.here(*arguments(), "--topology=v5e:3x5")
    assert status == 2 and "memo-jax: error: topology 'v5e:3x5': " in text


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu-plan"), ("h100:8", "cuda13")])
def test_without_the_compiler_its_extra_is_named(monkeypatch, topology, extra):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(chips.importlib.metadata, "entry_points", lambda group: [])
    status, text = tiny.here(*arguments(), f"--topology={topology}")
    assert status == 2 and f"pip install 'memo-jax[{extra}]'" in text


def test_a_jax_without_topologies_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.topologies", None)
    status, text = tiny.here(*arguments(), "--topology=h100:8")
    assert status == 2 and f"planning needs jax.experimental.topologies, which jax {jax.__version__} does not" in text


def test_a_jax_whose_cache_cannot_be_reset_plans_all_the_same_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(training_plan, "reset_cache", None)
    for _ in range(2):
        with training_plan._without_compilation_cache():
            assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache
    assert capsys.readouterr().err.count("this JAX has no reset_cache") == 1


@needs_cuda
def test_machines_of_few_gpus_have_a_slow_network():
    for topology, count, links in (("h100:8", 8, 450e9), ("h100:4x8", 32, 400e9), ("h100:4x2", 8, 100e9)):
        gpu, devices = chips.compile_only_devices(topology)
        assert (len(devices), gpu.links) == (count, links)


@needs_cuda
@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
def test_the_train_step_of_both_networks_is_compiled_for_gpus(gpu):
    """For an A100, too, for which XLA has no cost model."""
    command = [
        "plan",
        f"--config={tiny.material().config}",
        f"--topology={gpu}:2",
        "--config.data.batch_size=32",
        "--utterances=320",
        "--json",
    ]
    status, text = tiny.here(*command)
    result = json.loads(text[text.index("{") :])
    assert status == 0 and result["fits"] and result["chips"] == 2 and result["collectives"]["all-reduce"][0] > 0
    assert 0 < result["collective_seconds"] < result["seconds_per_step"] < 1
    assert 0 < result["utilisation"] < 1
