"""The configs that come with the project: they load, are explained, and their steps fit together at full size."""

import ast

import pytest

import tiny
from memo_jax.config import load_config
from memo_jax.models import parameter_count
from memo_jax.training.recipe import build_recipe
from memo_jax.training.state import student_params
from traced import traced_step

CONFIGS = sorted((tiny.ROOT / "configs").glob("*.py"))
ECAPA, RESNET = 6_390_720, 1_988_656  # backbones at embedding 256
# PyTorch counts 22,098,176 parameters per head: 65,536 are the gains of the prototypes, which are fixed at 1.
HEAD = 22_098_176 - 65_536
FULL_SIZE = {
    "memo_voxceleb2": {"ecapa": ECAPA + 2 * HEAD, "resnet": RESNET + 2 * HEAD},
    "memo_voxceleb2_tpu": {"ecapa": ECAPA + 2 * HEAD, "resnet": RESNET + 2 * HEAD},
    "dino_voxceleb2": {"ecapa": ECAPA + HEAD},
    # Fewer prototypes and a wider embedding; an ECAPA-TDNN of 1,024 channels.
    "sdpn_voxceleb2": {"ecapa": 22_733_952 + HEAD - 256 * (65_536 - 1024) + (512 - 256) * 2048},
    "study_full": {"ecapa": ECAPA + 2 * HEAD, "resnet": RESNET + 2 * HEAD},
}


def test_the_promised_configs_are_there():
    assert {path.stem for path in CONFIGS} >= {"base", "memo_voxceleb2", "dino_voxceleb2", "demo", "small", "medium"}


RUN_ELSEWHERE = {"base", "demo", "study", "medium"}  # by test_demo and test_study; medium.py has the step of small.py


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in RUN_ELSEWHERE], ids=lambda path: path.stem)
def test_a_full_size_step_fits_together(path):
    """The step of each config that no other test runs, augmentation banks and front end included, traced at full size
    without computing: the state it returns has the shapes of the state it takes, and the networks have the published
    numbers of parameters."""
    config = load_config(path)
    state, metrics = traced_step(config)
    assert metrics["loss"].shape == () and all(value.size == 1 for value in metrics.values())
    for heads in state.center.values():
        assert {center.shape for center in heads.values()} == {(config.model.prototypes,)}
    counts = {name: parameter_count(params) for name, params in student_params(state).items()}
    if path.stem in FULL_SIZE:
        assert counts == FULL_SIZE[path.stem]
    else:
        assert sum(counts.values()) < 5e6, "for machines without an accelerator"


def test_medium_is_small_for_longer():
    small, medium = (load_config(tiny.ROOT / "configs" / f"{name}.py") for name in ("small", "medium"))
    assert medium.total_steps > small.total_steps
    medium.total_steps = small.total_steps
    assert medium == small


def test_the_dino_config_is_memo_without_its_parts():
    memo, dino = (load_config(tiny.ROOT / "configs" / f"{name}_voxceleb2.py") for name in ("memo", "dino"))
    recipes = [build_recipe(config, 1000) for config in (memo, dino)]
    assert [tuple(recipe.branches) for recipe in recipes] == [("ecapa", "resnet"), ("ecapa",)]
    assert recipes[1].branches["ecapa"].head_names == ("self",) and recipes[1].gate_rule.name == "never"
    for name in ("data", "optimizer", "teacher", "augment"):
        assert memo[name] == dino[name]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "base"], ids=lambda path: path.stem)
def test_a_config_has_no_key_that_base_lacks(path):
    """`config.x = …` on an unlocked config would silently add a misspelt key."""

    def keys(config, prefix=""):
        found = set()
        for name, value in config.items():
            found |= keys(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name}
        return found

    assert keys(load_config(path)) == keys(load_config(CONFIGS[0].parent / "base.py"))


def test_every_key_of_base_is_explained_and_set_once():
    """By a comment on its line, or on separate lines above it; `X_steps` shares that of `X_epochs` above it."""
    source = (tiny.ROOT / "configs" / "base.py").read_text()
    lines = source.splitlines()
    seen, explained_above = set(), ""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        target = ast.unparse(node.targets[-1])
        if not isinstance(node.targets[-1], ast.Attribute) or "ConfigDict()" in ast.unparse(node.value):
            continue
        assert target not in seen, f"{target} is set twice"
        seen.add(target)
        explained = "#" in lines[node.end_lineno - 1] or lines[node.lineno - 2].strip().startswith("#")
        shares = target.endswith("_steps") and target.removesuffix("_steps") == explained_above.removesuffix("_epochs")
        assert explained or shares, f"{target} has no comment"
        explained_above = target
    assert len(seen) > 60
