"""Backbones and heads: sizes, masks, batch statistics, numbers against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from memo_jax import features
from memo_jax.models import Branch, build_backbone, parameter_count
from memo_jax.models.campplus import CAMPPlus
from memo_jax.models.ecapa import ECAPATDNN
from memo_jax.models.heads import DINOHead
from memo_jax.models.layers import BatchNorm
from memo_jax.models.resnet import ResNet34
from memo_jax.xla.compiler import compiler_options

TINY = {
    "ecapa": {"channels": (24, 24, 24, 24, 48), "scale": 3, "embedding_dim": 16},
    "resnet": {"base_channels": 4, "blocks": (1, 1, 1, 1), "embedding_dim": 16},
    "campplus": {
        "layers": (2, 1, 1),
        "growth": 4,
        "stem_channels": 8,
        "plane_channels": 2,
        "plane_blocks": (1, 1),
        "embedding_dim": 16,
    },
}
WESPEAKER = {"form": "wespeaker", "embedding_norm": True}


def count(module: nn.Module, *shape) -> int:
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=True))
    return parameter_count(variables["params"])


def scrambled_variables(module: nn.Module, *shape, seed=0):
    """Variables away from their initial values: non-zero shifts of batch norms reveal a missing mask."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(random.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    "backbone, parameters",
    [
        (ECAPATDNN(embedding_dim=256), 6_390_720),
        (ECAPATDNN(embedding_dim=192), 6_194_048),
        (ECAPATDNN(embedding_dim=192, form="wespeaker"), 6_190_720),
        (ECAPATDNN(embedding_dim=192, **WESPEAKER), 6_190_720 + 384),
        (ECAPATDNN((1024,) * 4 + (1536,), 192, form="wespeaker"), 14_657_088),
        (CAMPPlus(), 7_176_224),
        (CAMPPlus(embedding_dim=192), 6_848_544),
        (ResNet34(base_channels=16), 1_988_656),
        (ResNet34(base_channels=32), 6_634_336),
    ],
)
def test_backbones_have_exactly_the_published_number_of_parameters(backbone, parameters):
    assert count(backbone, 2, 32, 80) == parameters


def test_head_stores_all_published_parameters_but_the_fixed_gains():
    stored = count(DINOHead(), 2, 256)
    assert stored == 22_032_640
    assert stored + DINOHead().prototypes == 22_098_176


def test_branch_is_one_backbone_and_a_head_for_every_name():
    head = DINOHead(prototypes=24, hidden=16, bottleneck=8)
    one, two = (Branch(ResNet34(4, 16), head, names) for names in (("self",), ("self", "cross")))
    assert count(two, 2, 32, 80) - count(one, 2, 32, 80) == count(head, 2, 16)


@pytest.mark.parametrize(
    ("name", "levers"),
    [
        ("resnet", {"packed": True, "scan": True, "remat": "norms"}),
        ("strided resnet", {"packed": True, "remat": "norms"}),
        ("ecapa", {"remat": "blocks"}),
    ],
)
def test_settings_for_speed_and_memory_change_no_number(name, levers):
    """Same parameters; same embeddings, batch statistics and gradients within float32 rounding."""
    changes = {"resnet": {"blocks": (1, 3, 1, 1)}, "strided resnet": {"stride": 2}, "ecapa": {"scale": 2}}[name]
    name = name.removeprefix("strided ")
    sizes = TINY[name] | changes
    plain, pulled = build_backbone(name, **sizes), build_backbone(name, **sizes, **levers)
    variables = scrambled_variables(plain, 2, 32, 80)
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), jnp.zeros((2, 32, 80)), train=True))
        for m in (plain, pulled)
    ]
    assert shapes[0] == shapes[1]
    x = np.random.default_rng(0).standard_normal((3, 25, 80)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(backbone, params, x):
        def loss(params, x):
            embedding, updated = backbone.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.sin(embedding).sum(), (embedding, updated)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    expected, ours = (everything(backbone, variables["params"], x) for backbone in (plain, pulled))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1e-2))


def test_recomputed_values_are_not_kept_on_a_cpu_either():
    """XLA's CPU compiler merges recomputed values with the original ones, unless the barriers are kept."""
    temporary = {}
    for remat in ("none", "norms", "blocks"):
        backbone = build_backbone("resnet", **TINY["resnet"] | {"blocks": (3, 1, 1, 1), "remat": remat})
        variables = scrambled_variables(backbone, 2, 32, 80)

        def loss(params, x, backbone=backbone, statistics=variables["batch_stats"]):
            variables = {"params": params, "batch_stats": statistics}
            return backbone.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

        gradients = jax.jit(jax.grad(loss)).lower(variables["params"], jnp.zeros((8, 100, 80)))
        temporary[remat] = gradients.compile(compiler_options("cpu")).memory_analysis().temp_size_in_bytes
    assert temporary["blocks"] < 0.7 * temporary["none"] and temporary["norms"] < 0.82 * temporary["none"]


def test_parameters_of_another_size_are_refused_by_name():
    narrow, wide = (build_backbone("resnet", **TINY["resnet"] | {"base_channels": width}) for width in (4, 8))
    variables = scrambled_variables(narrow, 2, 32, 80)
    with pytest.raises(
        ValueError, match=r"parameter stem/kernel has shape \(3, 3, 1, 4\) where \(3, 3, 1, 8\) is needed"
    ):
        wide.apply(variables, jnp.zeros((2, 32, 80)))


def test_unknown_backbone_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'ecappa'.*ecapa, resnet, campplus"):
        build_backbone("ecappa")


def test_unknown_form_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'kaldi'.*speechbrain, wespeaker"):
        count(ECAPATDNN(form="kaldi"), 2, 32, 80)


@jax.jit
def log_mel(waves, lengths):
    frames = None if lengths is None else features.frame_count(lengths)
    return features.normalized_log_mel(features.mel_power(waves, lengths), frames)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ecapa", {}),
        ("ecapa", WESPEAKER),
        ("ecapa", {"stride": 2}),
        ("resnet", {}),
        ("resnet", {"stride": 2}),
        ("campplus", {}),
    ],
    ids=["ecapa", "ecapa-wespeaker", "ecapa-strided", "resnet", "resnet-strided", "campplus"],
)
def test_utterance_padded_in_a_batch_embeds_as_alone(name, changes):
    """An embedding is a function of its own utterance.

    In a batch, anything may follow the end of an utterance, here loud noise. If one sample of it reached the
    embedding, through a frame, a mean, a mirrored end or a stride, rows would differ from those computed without it.
    """
    backbone = build_backbone(name, **TINY[name] | changes)
    variables = scrambled_variables(backbone, 2, 32, 80)
    lengths = np.array([4_801, 32_000])  # 31 and 201 frames: CAM++ has 1 in a segment of the last
    waves = np.random.default_rng(1).normal(0, 0.3, (len(lengths), 48_077)).astype(np.float32)

    embed = jax.jit(backbone.apply)
    together = np.asarray(embed(variables, log_mel(waves, lengths), features.frame_count(lengths)))
    assert np.ptp(together, axis=0).mean() > 1e-3  # a hundred times the tolerance
    for row, wave, length in zip(together, waves, lengths, strict=True):
        alone = embed(variables, log_mel(wave[None, :length], None))[0]
        np.testing.assert_allclose(row, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ecapa", "resnet"])
def test_a_stride_skips_outputs_of_the_first_convolution(name):
    """Every other frame (and in a ResNet every other frequency) is what it is without a stride."""
    plain, strided = (build_backbone(name, **TINY[name] | {"stride": stride}) for stride in (1, 2))
    variables, of_strided = (scrambled_variables(network, 2, 32, 80) for network in (plain, strided))
    x = jnp.float32(np.random.default_rng(2).normal(size=(1, 41, 80)))
    if name == "ecapa":  # a ResNet also pools fewer frequencies
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, of_strided)
    of_strided["params"]["stem"] = variables["params"]["stem"]

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(backbone, variables):
        _, seen = backbone.apply(variables, x, capture_intermediates=lambda module, _: module.name == "stem")
        return seen["intermediates"]["stem"]["__call__"][0]

    kept = (slice(None), slice(None, None, 2), slice(None, None, 2) if name == "resnet" else slice(None))
    np.testing.assert_allclose(outputs(strided, of_strided), outputs(plain, variables)[kept], atol=1e-5)


def test_too_few_frames_for_a_mirrored_end_are_refused():
    backbone = build_backbone("ecapa", **TINY["ecapa"])
    variables = scrambled_variables(backbone, 2, 32, 80)
    with pytest.raises(ValueError, match="4 frames are too few"):
        jax.eval_shape(backbone.apply, variables, jnp.zeros((1, 4, 80)))


def test_batch_norm_divides_by_biased_and_remembers_unbiased_variance():
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 5)).astype(np.float32)  # 6 rows of 5 channels
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    out, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    rows = x.reshape(-1, 5).astype(np.float64)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(out.reshape(-1, 5), expected, atol=1e-5)
    statistics = updated["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)
    # The biased variance of six rows is a sixth smaller: the tolerance above distinguishes the two.
    assert np.all(np.abs(statistics["var"] - (0.9 + 0.1 * rows.var(0))) > 1e-3)

    evaluated = norm.apply({**variables, "batch_stats": statistics}, x, train=False).reshape(-1, 5)
    by_hand = (rows - np.asarray(statistics["mean"])) / np.sqrt(np.asarray(statistics["var"]) + 1e-5)
    np.testing.assert_allclose(evaluated, by_hand, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_gradient_of_batch_norm_is_that_of_its_formula(shape):
    """The gradient is written out by hand; here the formula is differentiated, including mean and variance."""
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.normal(2, 3, shape), jnp.float32) for _ in range(2))
    params = {"scale": jnp.asarray(rng.normal(1, 0.3, 5), jnp.float32), "bias": jnp.asarray(rng.normal(0, 1, 5))}
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def ours(x, params):
        variables = {"params": params, "batch_stats": stats}
        return (weights * BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])[0]).sum()

    def formula(x, params):
        axes = tuple(range(x.ndim - 1))
        normalized = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)
        return (weights * (normalized * params["scale"] + params["bias"])).sum()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.jit(jax.grad(ours, (0, 1)))(x, params),
        jax.jit(jax.grad(formula, (0, 1)))(x, params),
    )


def test_initialisation_leaves_statistics_at_their_start():
    variables = BatchNorm().init(jax.random.key(0), jnp.full((4, 3), 7.0), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_head_is_mlp_with_exact_gelu_and_cosines_to_prototypes():
    head = DINOHead(prototypes=24, hidden=16, bottleneck=8)
    variables = scrambled_variables(head, 2, 12)
    x = np.random.default_rng(2).normal(0, 1, (5, 12))
    params, stats = (jax.tree.map(lambda a: np.asarray(a, np.float64), variables[k]) for k in ("params", "batch_stats"))
    hidden = x
    for i in range(2):
        linear, norm, stat = params[f"linear_{i}"], params[f"norm_{i}"], stats[f"norm_{i}"]
        hidden = hidden @ linear["kernel"] + linear["bias"]
        hidden = (hidden - stat["mean"]) / np.sqrt(stat["var"] + 1e-5) * norm["scale"] + norm["bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    hidden = hidden @ params["linear_2"]["kernel"] + params["linear_2"]["bias"]
    cosines = hidden @ params["prototypes"]
    cosines /= np.linalg.norm(hidden, axis=1, keepdims=True) * np.linalg.norm(params["prototypes"], axis=0)
    np.testing.assert_allclose(jax.jit(head.apply)(variables, x.astype(np.float32)), cosines, atol=2e-6)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_computes_coarsely_and_keeps_everything_in_float32(name):
    x = np.random.default_rng(0).normal(0, 1, (3, 32, 80)).astype(np.float32)
    exact, coarse = (build_backbone(name, dtype=dtype, **TINY[name]) for dtype in (jnp.float32, jnp.bfloat16))
    variables = scrambled_variables(exact, 2, 32, 80)
    expected = np.asarray(jax.jit(exact.apply)(variables, x))
    embedding, updated = jax.eval_shape(
        lambda v, x: coarse.apply(v, x, train=True, mutable=["batch_stats"]), variables, x
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((embedding, updated))} == {jnp.dtype("float32")}
    error = np.linalg.norm(jax.jit(coarse.apply)(variables, x) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 5e-2
