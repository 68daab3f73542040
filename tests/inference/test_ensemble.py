"""Several networks as one: its score is the mean of theirs, wherever a single network can be used."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny
from memo_jax import Embedder
from memo_jax.inference.embedder import load_model
from memo_jax.inference.model_file import (
    Decision,
    ModelFileError,
    ensemble_of,
    flattened,
    header_text,
    members_of,
    read_model,
    write_model,
)
from memo_jax.inference.workdir import save_decision, starting_parts, workdir_model
from memo_jax.training.program import create_state
from memo_jax.training.recipe import build_recipe
from memo_jax.training.state import backbone_variables
from memo_jax.xla import sharding


@pytest.fixture(scope="module")
def networks():
    """Both networks of a run, and the two as one."""
    workdir, _ = tiny.trained_run()
    return [workdir_model(workdir, branch) for branch in ("ecapa", "resnet", "ecapa,resnet")]


def recordings():
    return [tiny.material().corpus / f"s{i}" / f"{j}.wav" for i in range(3) for j in range(2)]


def cosines(embeddings):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit @ unit.T


def test_the_score_of_an_ensemble_is_the_mean_of_its_members(networks):
    ecapa, resnet, both = (Embedder(model, runtime="jax").embed(recordings()) for model in networks)
    assert both.shape[1] == networks[2].dimension == networks[0].dimension + networks[1].dimension
    np.testing.assert_allclose(cosines(both), (cosines(ecapa) + cosines(resnet)) / 2, atol=1e-6)


def test_the_order_of_the_members_changes_nothing(networks, tmp_path):
    """They have one fingerprint, thus they must give the same embeddings, number by number."""
    ecapa, resnet, both = networks
    other = ensemble_of([resnet, ecapa], {})
    assert other.fingerprint == both.fingerprint
    first, second = (Embedder(model, runtime="jax").embed(recordings()[:1]) for model in (both, other))
    np.testing.assert_array_equal(first, second)
    assert workdir_model(tiny.trained_run()[0], "resnet,ecapa").fingerprint == both.fingerprint


def test_an_ensemble_is_exported_evaluated_and_verified_as_any_network(networks, tmp_path):
    """The file has the networks of the run; the error rates are those of the mean of the scores."""
    workdir, material = tiny.trained_run()[0], tiny.material()
    path = tmp_path / "both.safetensors"
    status, text = tiny.here("export", "--model", workdir, "--branch", "ecapa,resnet", "--output", path)
    assert status == 0, text
    read = read_model(path)
    for field in ("backbone", "arguments", "front_end", "fingerprint", "module", "dimension"):
        assert getattr(read, field) == getattr(networks[2], field), field
    for member, model in zip(members_of(read), networks[:2], strict=True):
        assert member.fingerprint == model.fingerprint
    single = []
    for branch in ("ecapa", "resnet"):
        single += ["--embeddings", tmp_path / f"{branch}.npz"]
        options = ["--model", workdir, "--branch", branch, "--output", single[-1]]
        status, text = tiny.here("embed", material.dataset, *options)
        assert status == 0, text
    on_trials = ["--trials", material.trials, "--replicates", "0"]
    status, of_scores = tiny.here("score", *single, *on_trials)
    assert status == 0, of_scores
    options = ["--model", path, "--data", material.dataset, "--save-threshold", "eer", "--output", tmp_path / "results"]
    status, text = tiny.here("eval", *options, *on_trials)
    assert status == 0 and "ecapa,resnet teacher, step 6" in text, text
    rates = text[text.index("EER") :].splitlines()[0]
    assert rates in of_scores, (rates, of_scores)
    status, text = tiny.here("verify", *recordings()[:2], "--model", path, "--runtime", "jax")
    assert status in (0, 1) and "score" in text, text
    before = path.read_bytes()
    status, text = tiny.here("eval", *options, *on_trials, "--branch", "ecapa")
    assert status == 2 and "keeps one threshold, that of all its networks together: leave out --branch" in text
    with pytest.raises(ValueError, match="keeps one threshold"):
        save_decision(path, load_model(path, branch="ecapa"), Decision(0.1, 1.0, 0.0, "a list"))
    assert path.read_bytes() == before


def test_a_member_of_an_ensembles_file_can_be_taken(networks, tmp_path):
    path = write_model(tmp_path / "both.safetensors", networks[2])
    for network in networks[:2]:
        taken = load_model(path, branch=network.backbone)
        assert taken.fingerprint == network.fingerprint and taken.name == network.name
    assert load_model(path, branch="resnet,ecapa").fingerprint == networks[2].fingerprint
    for options, said in (
        ({"branch": "campplus"}, "both.safetensors holds ecapa and resnet: choose one of them with --branch"),
        ({"step": 4}, "both.safetensors is a file of ecapa and resnet: --step is for workdirs"),
        (
            {"branch": "ecapa", "role": "student"},
            "both.safetensors is a file of ecapa and resnet: --role is for workdirs",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            load_model(path, **options)


def test_what_is_no_ensemble_is_refused(networks, tmp_path):
    ecapa, resnet, both = networks
    for models, said in (
        ([ecapa, ecapa], "an ensemble needs different backbones: these are ecapa, ecapa"),
        ([both, ecapa], "these are ensemble, ecapa"),
        (
            [ecapa, dataclasses.replace(resnet, front_end="kaldi_fbank")],
            "the same input: these take kaldi_fbank and log_mel",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            ensemble_of(models, {})
    workdir = tiny.trained_run()[0]
    for branch, said in (
        ("ecapa,xvector", "has no branch 'xvector': choose one of ecapa, resnet"),
        ("ecapa,", "has no branch ''"),
        ("resnet,resnet", "different backbones: these are resnet, resnet"),
    ):
        status, text = tiny.here("export", "--model", workdir, "--branch", branch, "--output", tmp_path / "a.onnx")
        assert status == 2 and said in text and text.count("\n") == 1, text
    status, text = tiny.here(
        "convert", workdir, "--to", "wespeaker", "--branch", "ecapa,resnet", "--output", tmp_path / "a.safetensors"
    )
    assert status == 2 and "wespeaker has no ensembles: convert each of ecapa, resnet on its own" in text, text
    assert not list(tmp_path.iterdir())


def test_a_description_that_no_program_of_ours_wrote_is_refused(networks, tmp_path):
    path, both = tmp_path / "both.safetensors", networks[2]
    for arguments, said in (
        ({}, "has no empty ensemble with log_mel"),
        ({"ecapa": dict(both.arguments["ecapa"]), "xvector": {}}, "has no ecapa, xvector with"),
        ({"ensemble": {"ecapa": {}}}, "has no ensemble with"),
        (dict(both.arguments) | {"resnet": {"base_channels": 1 << 40}}, "a resnet cannot have base_channels"),
        (dict(both.arguments) | {"resnet": 7}, "damaged"),
    ):
        header = header_text(dataclasses.replace(both, arguments=arguments))
        save_file(flattened(both.variables), path, {"memo_jax": header})
        with pytest.raises(ModelFileError, match=f"{path}: .*{said}"):
            read_model(path)


def test_a_run_starts_from_the_networks_of_an_ensemble(networks, tmp_path):
    """From each that is a branch of the config; where none is, that is said as for a single network."""
    path = write_model(tmp_path / "both.safetensors", networks[2])
    mesh = sharding.data_mesh()
    for branches in ("ecapa,resnet", "resnet,"):
        config = tiny.tiny_config(f"init={path}", f"model.branches={branches}")
        state = create_state(config, build_recipe(config, tiny.STEPS_PER_EPOCH), mesh, starting_parts(config))
        for model in networks[:2]:
            for variables in (state.student, state.teacher):
                if model.backbone in config.model.branches:
                    found = backbone_variables(variables[model.backbone])
                    jax.tree.map(np.testing.assert_array_equal, found, dict(model.variables))
    status, text = tiny.train_here(tmp_path / "run", f"init={path}", "model.branches=campplus,")
    assert status == 2 and f"init: {path} holds ecapa" in text, text
