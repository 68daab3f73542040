"""The rows of the study: each is a config that works, and differs from the row it is compared with as it says."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import ablation  # noqa: E402
from memo_jax import models  # noqa: E402
from memo_jax.config import config_differences, load_config  # noqa: E402
from memo_jax.training.recipe import build_recipe, load_augmentation_banks  # noqa: E402
from traced import traced_step  # noqa: E402

STUDY, MANY_EPOCHS = (tiny.ROOT / "configs" / f"{name}.py" for name in ("study", "study_epochs"))


def config_of(row, study=STUDY):
    overrides = ablation.ROWS[row].overrides
    overrides += tuple(ablation.gate_overrides(row, load_config(study, [f"--config.{text}" for text in overrides])))
    return load_config(study, [f"--config.{text}" for text in overrides])


class Plain(nn.Module):
    """A backbone that is quick to trace, in place of the real ones."""

    embedding_dim: int

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        return nn.BatchNorm(not train)(nn.Dense(self.embedding_dim)(x.mean(axis=1)))


@pytest.mark.parametrize("row", ablation.ROWS)
def test_a_step_of_every_row_fits_together(row, monkeypatch):
    """Traced without computing: the state it returns has the shapes of the state it takes; its losses fit its idea.

    With plain backbones; the real ones are tested below, and the study's config as a whole in test_configs.py.
    """
    monkeypatch.setattr(
        models, "BACKBONES", dict.fromkeys(models.BACKBONES, lambda embedding_dim, **_: Plain(embedding_dim))
    )
    config = config_of(row)
    _, metrics = traced_step(config)
    recipe = build_recipe(config, 185, utterances=185 * config.data.batch_size)
    kinds = {name.split("/")[1] for name in metrics if name.startswith("loss/")} - set(recipe.branches)
    assert kinds == {
        **dict.fromkeys([name for name in ablation.ROWS if name.startswith("contrastive-")], {"contrastive"}),
        **dict.fromkeys(("pseudo-labels", "pseudo-labels-gate", "pseudo-labels-again", "supervised"), {"supervised"}),
        "dino-regularized": {"self", "variance", "covariance"},
        "dino-centered": {"self"},
        "sdpn": {"self", "mean_entropy", "koleo"},
        "dino-ecapa": {"self"},
        "dino-resnet": {"self"},
        "two-branches": {"self"},
        "shared-head": {"self", "cross"},
        "multi-head": {"self", "cross"},
        "multi-head-quick-teacher": {"self", "cross"},
    }.get(row, {"self", "cross", "contrastive"})
    heads = ("self", "cross") if "cross" in kinds and row != "shared-head" else ("self",)
    assert {branch.head_names for branch in recipe.branches.values()} == {heads}
    assert load_augmentation_banks(config) == {}, "rows name no folder of their own"


def test_the_second_backbones_of_the_rows_are_alike_in_size():
    branches = {row: build_recipe(config_of(row), 185).branches for row in ("memo-plateau", "memo-campplus")}
    counts = []
    for row, name in (("memo-plateau", "resnet"), ("memo-campplus", "campplus")):
        backbone = branches[row][name].backbone
        shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0), jnp.zeros((2, 60, 80))))  # noqa: B023
        counts.append(models.parameter_count(shapes["params"]))
    assert 0.5 < counts[0] / counts[1] < 2, counts


def test_rows_are_compared_with_rows_of_the_table_that_differ_from_them():
    configs = {name: config_of(name) for name in ablation.ROWS}
    for name, row in ablation.ROWS.items():
        for other in row.against:
            study = MANY_EPOCHS if row.many_epochs and ablation.ROWS[other].many_epochs else STUDY
            differ = config_differences(config_of(name, study), config_of(other, study))
            assert differ or row.start != ablation.ROWS[other].start, name
        assert not row.start or list(ablation.ROWS).index(row.start) < list(ablation.ROWS).index(name), "run before it"
    (heads,) = config_differences(configs["shared-head"], configs["multi-head"])
    assert heads.startswith("loss.cross_head")
    for name in ("step", "plateau", "conflict"):
        (rule,) = config_differences(configs["memo-always"], configs[f"memo-{name}"])
        assert rule == f"gate.rule: 'always' → '{name}'"
    # Two rows separate the momentum from the contrastive loss, which change together from Multi-Head to MeMo.
    for name, other in (("multi-head-quick-teacher", "multi-head"), ("memo-slow-teacher", ablation.REFERENCE)):
        (momentum,) = config_differences(configs[name], configs[other])
        assert momentum.startswith("teacher.momentum")
    assert configs[ablation.REFERENCE] == load_config(STUDY), "the study's config is its MeMo"
    steps = {name: configs[f"memo-step{name}"].gate.stop_steps for name in ("", "-early", "-late")}
    assert steps == {"": 150, "-early": 75, "-late": 225}
    titles = [row.title for row in ablation.ROWS.values()]
    assert len(set(titles)) == len(titles)


def test_rows_are_chosen_by_name_in_the_tables_order():
    assert ablation.chosen_rows("multi-head,dino-ecapa") == ["dino-ecapa", "multi-head"]
    assert ablation.chosen_rows("all") == list(ablation.ROWS)
    assert {"dino-ecapa", ablation.REFERENCE} < set(ablation.chosen_rows("main")) < set(ablation.ROWS)
    assert {"dino-ecapa", "sdpn"} < set(ablation.chosen_rows("many-epochs")) < set(ablation.ROWS)
    for wrong in ("memo", ""):
        with pytest.raises(ValueError, match="choose from dino-ecapa, "):
            ablation.chosen_rows(wrong)
