"""`memo-jax convert`: weights with PyTorch's names to model files and back, as a user runs it; nothing needs torch.

That the networks compute what PyTorch's do is tested by `make parity`.
"""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from memo_jax.inference import convert, interop
from memo_jax.inference.model_file import model_of_backbone, read_model, write_model
from memo_jax.models import Branch, build_backbone
from memo_jax.models.heads import DINOHead
from memo_jax.training.checkpoint import load_state

ECAPA = {"channels": (16, 16, 16, 16, 48), "embedding_dim": 16}
WESPEAKER = ECAPA | {"form": "wespeaker", "embedding_norm": True, "global_context": False}
RESNET = {"base_channels": 2, "blocks": (2, 1, 1, 1), "embedding_dim": 16}
CAMPPLUS = {
    "layers": (2, 1, 1),
    "growth": 4,
    "stem_channels": 8,
    "plane_channels": 2,
    "plane_blocks": (2, 1),
    "embedding_dim": 16,
}
NETWORKS = [  # kind, backbone, arguments, whether the names alone identify the kind, one of the names
    ("speechbrain", "ecapa", ECAPA, True, "blocks.1.res2net_block.blocks.6.conv.conv.weight"),
    ("3dspeaker", "ecapa", ECAPA, False, "asp.tdnn.norm.norm.running_var"),
    ("wespeaker", "ecapa", WESPEAKER, True, "layer4.se_res2block.1.bns.6.running_mean"),
    ("wespeaker", "resnet", RESNET, True, "layer1.1.conv2.weight"),
    ("3dspeaker", "resnet", RESNET | {"second_embedding": True, "pool_epsilon": 1e-8}, False, "seg_2.weight"),
    ("3dspeaker", "campplus", CAMPPLUS, True, "xvector.block1.tdnnd2.cam_layer.linear_local.weight"),
    ("speaker-net", "ecapa", ECAPA, True, "backbone.fc.conv.bias"),
    ("speaker-net", "resnet", RESNET, True, "backbone.seg_1.weight"),
]
IDS = [f"{kind}-{backbone}" for kind, backbone, *_ in NETWORKS]


def variables_of(module, seed=0):
    """Variables with a network's shapes, every number different; variances are positive."""
    random = np.random.default_rng(seed)

    def value(path, leaf):
        numbers = random.normal(0, 1, leaf.shape).astype(np.float32)
        return np.abs(numbers) if path[-1].key == "var" else numbers

    return jax.tree_util.tree_map_with_path(value, interop.shapes_of(module))


def torch_tensors(kind, backbone, arguments):
    """{PyTorch name: array} of a network, including batch norms' counters as PyTorch keeps them."""
    variables = variables_of(build_backbone(backbone, **arguments))
    tensors = interop.backbone_to_torch(variables, kind, backbone, arguments.get("form", "speechbrain"))
    counters = [name.replace("running_var", interop.COUNTER) for name in tensors if name.endswith("running_var")]
    return tensors | {name: np.array(i, np.int64) for i, name in enumerate(counters)}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert tensors[name].dtype == x.dtype
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)


@pytest.mark.parametrize(("kind", "backbone", "arguments", "known", "some_name"), NETWORKS, ids=IDS)
def test_there_and_back_is_exact(kind, backbone, arguments, known, some_name, tmp_path):
    """PyTorch's file → model file → PyTorch's file: the same names, types and bits; sizes and form are found."""
    tensors = torch_tensors(kind, backbone, arguments)
    assert some_name in tensors
    save_file(tensors, tmp_path / "theirs.safetensors")
    model, back = tmp_path / "model.safetensors", tmp_path / "back.safetensors"
    said = [] if known else ["--kind", kind]
    status, printed = tiny.here("convert", tmp_path / "theirs.safetensors", "--output", model, *said)
    assert status == 0 and f"{kind} {backbone}" in printed
    written = read_model(model)
    assert written.front_end == interop.FRONT_END_OF_KIND[kind]
    assert {name: written.arguments[name] for name in arguments} == arguments
    status, printed = tiny.here("convert", model, "--to", kind, "--output", back)
    assert status == 0, printed
    assert_same(load_file(back), tensors)
    again = tmp_path / "again.safetensors"
    status, printed = tiny.here("convert", back, "--output", again, *said)  # what we wrote, we read
    assert status == 0, printed
    assert read_model(again).fingerprint == written.fingerprint


def test_the_front_end_travels_along_or_is_given(tmp_path):
    """A log-mel network, to wespeaker's names and back: safetensors records it, --front-end takes precedence."""
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    status, printed = tiny.here("convert", tiny.model_file(), "--to", "wespeaker", "--output", theirs)
    assert status == 0 and "its input is log_mel" in printed and "wespeaker itself computes wespeaker_fbank" in printed
    assert "--front-end" not in printed
    status, printed = tiny.here("convert", theirs, "--output", back)
    assert status == 0 and "front end log_mel" in printed
    assert read_model(back).fingerprint == tiny.untrained_model().fingerprint
    status, printed = tiny.here("convert", theirs, "--output", back, "--front-end", "kaldi_fbank")
    assert status == 0 and read_model(back).front_end == "kaldi_fbank"
    save_file(load_file(theirs), theirs)  # as any other program would write it
    assert tiny.here("convert", theirs, "--output", back)[0] == 0
    assert read_model(back).front_end == "wespeaker_fbank"
    assert tiny.here("convert", theirs, "--output", back, "--front-end", "log_mel")[0] == 0
    assert read_model(back).fingerprint == tiny.untrained_model().fingerprint


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "resnet.", "model._orig_mod.module.", "a.b.c."])
def test_prefixes_are_ignored(prefix, tmp_path):
    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    given = {f"{prefix}{name}": x for name, x in tensors.items()}
    beside = {
        "n_averaged": np.array(7),
        "criterion.weight": np.zeros((3, 16), np.float32),
        "optimizer.0.step": np.ones(1),
    }
    save_file(given | beside, tmp_path / "theirs.safetensors")
    model = convert.torch_to_model(tmp_path / "theirs.safetensors")
    assert_same(convert.model_to_torch(model, "wespeaker"), tensors)


def test_networks_of_a_checkpoint_are_told_apart_by_their_prefixes(tmp_path):
    """As from a user's own trainer: two networks in one state_dict, and no way to guess which one is wanted."""
    networks = {name: torch_tensors("wespeaker", "resnet", RESNET) for name in ("online", "target")}
    networks["target"]["seg_1.bias"] = networks["target"]["seg_1.bias"] + 1
    given = {f"state_dict.model.{part}.{name}": x for part, tensors in networks.items() for name, x in tensors.items()}
    save_file(given, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="several networks: choose a part of online, target"):
        convert.torch_to_model(tmp_path / "theirs.safetensors")
    model = convert.torch_to_model(tmp_path / "theirs.safetensors", part="target")
    assert_same(convert.model_to_torch(model, "wespeaker"), networks["target"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    tensors["conv1.weight"].flat[3] = value
    save_file(tensors, tmp_path / "theirs.safetensors")
    status, printed = tiny.here("convert", tmp_path / "theirs.safetensors", "--output", tmp_path / "model.safetensors")
    assert status == 2 and "tensor 'conv1.weight' has 1 of 18 values that are NaN or infinite" in printed
    assert not (tmp_path / "model.safetensors").exists()


def test_a_counter_of_batches_that_is_no_number_is_no_obstacle(tmp_path):
    """Nothing is computed from it."""
    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    save_file(tensors | {"bn1.num_batches_tracked": np.array(np.inf)}, tmp_path / "theirs.safetensors")
    assert tiny.here("convert", tmp_path / "theirs.safetensors", "--output", tmp_path / "model.safetensors")[0] == 0


def test_half_precision_is_read(tmp_path):
    import ml_dtypes

    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    for name, kind in (("conv1.weight", np.float16), ("seg_1.weight", ml_dtypes.bfloat16), ("bn1.weight", np.float64)):
        tensors[name] = tensors[name].astype(kind)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = convert.model_to_torch(convert.torch_to_model(tmp_path / "theirs.safetensors"), "wespeaker")
    assert_same(found, {name: x if x.dtype == np.int64 else x.astype(np.float32) for name, x in tensors.items()})


@pytest.mark.parametrize("start", [b"\x80", b"PK"], ids=["pickle", "zip"])
def test_a_header_whose_length_begins_as_another_kind_of_file_is_read(start, tmp_path):
    """One length in 32 begins like a pickle: headers are padded to multiples of eight bytes."""
    tensors, path = torch_tensors("wespeaker", "resnet", RESNET), tmp_path / "theirs.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = next(n for n in range(length, length + 2**17) if n.to_bytes(8, "little").startswith(start))
    path.write_bytes(longer.to_bytes(8, "little") + content[8 : 8 + length].ljust(longer) + content[8 + length :])
    assert_same(convert.model_to_torch(convert.torch_to_model(path), "wespeaker"), tensors)


def test_names_of_two_toolkits_are_pointed_out(tmp_path):
    """The front end depends on the toolkit, so a user has to know which one was chosen."""
    save_file(torch_tensors("speechbrain", "ecapa", ECAPA), tmp_path / "theirs.safetensors")
    status, printed = tiny.here("convert", tmp_path / "theirs.safetensors", "--output", tmp_path / "model.safetensors")
    assert status == 0 and "speechbrain_fbank" in printed and "3dspeaker" in printed and "--kind" in printed


def without(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: without(t, "seg_1.bias"), "1 missing: seg_1.bias"),
        (lambda t: t.update({"layer1.9.extra": np.zeros(3)}), "1 unmatched: layer1.9.extra"),
        (lambda t: t.update({"bn1.weight": np.zeros(5, np.float32)}), r"'bn1.weight' has shape [5], expected [2]"),
        (
            lambda t: t.update({"conv1.weight": np.zeros((2, 1, 5, 5), np.float32)}),
            "[2, 1, 5, 5], expected [2, 1, 3, 3]",
        ),
        (
            lambda t: t.update({"conv1.weight": np.ones((2, 1, 3, 3), np.int8)}),
            "'conv1.weight' holds int8, weights are",
        ),
        (lambda t: t.update({"conv1.weight": t["conv1.weight"] > 0}), "'conv1.weight' holds bool, weights are floats"),
        (lambda t: t.update({"conv1.weight": np.zeros((0, 1, 3, 3), np.float32)}), "'conv1.weight' is empty"),
        (lambda t: t.update({"bn1.running_var": np.float32([1, -1])}), "'bn1.running_var' has negative values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, said, tmp_path):
    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    change(tensors)
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path)
    status, printed = tiny.here("convert", path, "--output", tmp_path / "model.safetensors")
    assert status == 2 and str(path) in printed and said in printed
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, [], "no such file"),
        (b"plain text", [], "neither safetensors nor a PyTorch checkpoint"),
        ({"a.weight": np.zeros(2, np.float32)}, [], "they begin with a.weight"),
        ("resnet", ["--kind", "speechbrain"], "not those of speechbrain"),
        ("resnet", ["--part", "teacher_resnet"], "no part 'teacher_resnet'"),
        ("resnet", ["--branch", "resnet"], "--branch is for conversion to PyTorch"),
        ("resnet", ["--to", "wespeaker", "--front-end", "log_mel"], "--front-end is for conversion from PyTorch"),
        ("resnet", ["--front-end", "mfcc"], "invalid choice: 'mfcc'"),
        ("resnet", ["--to", "wespeaker"], "memo-jax convert"),
    ],
)
def test_what_cannot_be_converted_is_refused(content, arguments, said, tmp_path):
    path = tmp_path / "theirs.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(torch_tensors("wespeaker", "resnet", RESNET) if content == "resnet" else content, path)
    status, printed = tiny.here("convert", path, "--output", tmp_path / "out.safetensors", *arguments)
    assert status == 2 and said in printed
    assert not (tmp_path / "out.safetensors").exists()


def test_a_network_that_a_toolkit_lacks_and_a_wrong_ending_are_refused(tmp_path):
    for name, arguments in (("wespeaker", WESPEAKER), ("strided", ECAPA | {"stride": 2})):
        module = build_backbone("ecapa", **arguments)
        write_model(tmp_path / f"{name}.safetensors", model_of_backbone(module, variables_of(module)))
    for model, to, output, said in (
        ("wespeaker", "speechbrain", "out.safetensors", "no ecapa in wespeaker's form"),
        ("wespeaker", "wespeaker", "out.txt", "must end in"),
        ("strided", "speechbrain", "out.safetensors", "no ecapa whose first convolution has a stride"),
    ):
        given = tmp_path / f"{model}.safetensors"
        status, printed = tiny.here("convert", given, "--to", to, "--output", tmp_path / output)
        assert status == 2 and said in printed
        assert not (tmp_path / output).exists()


def test_classifier_is_left_out_and_prefix_of_parallel_training_is_taken_off(tmp_path):
    """wespeaker's checkpoints have a classifier for training, and DistributedDataParallel puts "module." in front."""
    tensors = torch_tensors("wespeaker", "resnet", RESNET)
    given = tensors | {"projection.weight": np.zeros((9, 16), np.float32)}
    save_file({f"module.{name}": x for name, x in given.items()}, tmp_path / "theirs.safetensors")
    model = convert.torch_to_model(tmp_path / "theirs.safetensors")
    assert model.provenance["left_out"] == 1
    assert_same(convert.model_to_torch(model, "wespeaker"), tensors)


def speaker_net_variables():
    """{role: {backbone: variables of a branch with two heads}}."""
    head = DINOHead(24, 16, 8)
    branches = {
        "ecapa": Branch(build_backbone("ecapa", **ECAPA), head),
        "resnet": Branch(build_backbone("resnet", **RESNET), head),
    }
    return {
        role: {name: variables_of(branch, seed=10 * i + len(name)) for name, branch in branches.items()}
        for i, role in enumerate(("student", "teacher"))
    }


def test_a_run_with_a_stride_is_no_checkpoint_of_the_authors(tmp_path):
    """It would be read there as a network without a stride, and embed wrongly."""
    run = shutil.copytree(tiny.trained_run()[0], tmp_path / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"resnet_stride": 1', '"resnet_stride": 2'))
    status, printed = tiny.here("convert", run, "--to", "speaker-net", "--output", tmp_path / "out.safetensors")
    assert status == 2 and "speaker-net has no resnet whose first convolution has a stride" in printed, printed
    assert printed.count(str(run)) == 1
    (run / "config.json").write_text(text.replace('"front_end": "log_mel"', '"front_end": "kaldi_fbank"'))
    status, printed = tiny.here("convert", run, "--to", "speaker-net", "--output", tmp_path / "out.safetensors")
    assert status == 0 and "speaker-net itself computes log_mel: embeddings there need kaldi_fbank" in printed, printed
    status, printed = tiny.here(
        "convert", run, "--to", "speaker-net", "--step", "0", "--output", tmp_path / "untrained.pt"
    )
    assert status == 2 and "add --branch" in printed


def test_heads_for_known_speakers_are_left_out():
    variables = speaker_net_variables()
    wanted = convert.speaker_net_of_branches(variables)
    for branch in variables["student"].values():
        branch["params"] |= {"speaker_head": {"directions": np.ones((16, 3), np.float32)}}
    found = convert.speaker_net_of_branches(variables)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_branches(path, variables):
    """The checkpoint in the authors' format at `path` holds exactly {role: {backbone: variables}}, bit for bit."""
    networks = convert.networks_of(load_file(path))
    assert networks.keys() == {f"{role}_{name}" for role, branches in variables.items() for name in branches}
    for role, branches in variables.items():
        for name, expected in branches.items():
            found = interop.branch_from_torch(networks[f"{role}_{name}"], expected, name)
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_checkpoint_of_the_authors_gives_students_teachers_and_heads(tmp_path):
    """Every number of four networks with two heads each, there and back; the command takes the ECAPA-TDNN's teacher."""
    variables = speaker_net_variables()
    path = convert.write_tensors(tmp_path / "checkpoint0084.safetensors", convert.speaker_net_of_branches(variables))
    assert_branches(path, variables)
    for part, role, name in ((None, "teacher", "ecapa"), ("student_resnet", "student", "resnet")):
        output = tmp_path / "model.safetensors"
        said = ["--part", part] if part else []
        status, printed = tiny.here("convert", path, "--output", output, *said)
        assert status == 0 and f"speaker-net {name}" in printed, printed
        expected = {kind: tree["backbone"] for kind, tree in variables[role][name].items()}
        jax.tree.map(np.testing.assert_array_equal, read_model(output).variables, expected)


def test_network_of_a_workdir_by_pytorchs_names():
    """A trained network for other programs: the teacher's ResNet of a run, as wespeaker would name it."""
    workdir, _ = tiny.trained_run()
    output = tiny.temporary_folder() / "resnet.safetensors"
    status, printed = tiny.here("convert", workdir, "--to", "wespeaker", "--branch", "resnet", "--output", output)
    assert status == 0 and "its input is log_mel" in printed, printed
    assert load_file(output)["seg_1.weight"].shape == (16, 2 * 8 * 2 * 10)


def test_workdir_becomes_a_checkpoint_of_the_authors():
    """All that distillation trained, heads included, as the authors' program saves it, and back."""
    workdir, _ = tiny.trained_run()
    output = tiny.temporary_folder() / "checkpoint.safetensors"
    status, printed = tiny.here("convert", workdir, "--to", "speaker-net", "--output", output)
    assert status == 0 and "student_ecapa" in printed and "teacher_resnet" in printed, printed
    state = load_state(workdir)
    assert_branches(output, {role: state[role] for role in ("student", "teacher")})
