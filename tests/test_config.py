"""Configs: what the command line may change, and the errors when it may not."""

import sys

import pytest
from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

import tiny
from memo_jax.config import (
    config_differences,
    config_from_json,
    config_to_json,
    duration_in_steps,
    load_config,
    packaged_configs,
    read_config,
    save_config,
)

BASE = """
from ml_collections import config_dict

def get_config():
    config = config_dict.ConfigDict()
    config.seed = 0
    config.name = "base"
    config.total_epochs = config_dict.placeholder(float)
    config.total_steps = 100
    config.data = config_dict.ConfigDict({"batch_size": 8, "seconds": (4.0, 2.0), "shards": (1, 2), "folders": ["a"]})
    config.optim = config_dict.ConfigDict({"lr": 0.2, "nesterov": False, "clip": config_dict.placeholder(float)})
    config.branches = ("ecapa", "resnet34")
    return config
"""
DERIVED = """
import base

def get_config():
    config = base.get_config()
    config.name = "derived"
    config.optim.lr = 1
    return config
"""


@pytest.fixture
def configs(tmp_path):
    """A folder with base.py and derived.py."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text(BASE)
    (tmp_path / "configs" / "derived.py").write_text(DERIVED)
    return tmp_path / "configs"


def load(configs, *overrides):
    return load_config(configs / "derived.py", [f"--config.{text}" for text in overrides])


def test_config_of_a_file_that_imports_its_neighbour(configs, monkeypatch):
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.chdir(configs.parent)
    config = load_config("configs/derived.py")
    assert (config.name, config.optim.lr, config.seed) == ("derived", 1.0, 0)
    assert type(config.optim.lr) is float
    assert sys.path == path and "base" not in sys.modules and not {"base", "derived"} & (set(sys.modules) - modules)
    assert sorted(file.name for file in configs.iterdir()) == ["base.py", "derived.py"]


def test_each_folder_has_its_own_base(configs, tmp_path, monkeypatch):
    """Two folders each with a base.py, read in turn, and again after an edit: no module cache may mix them up."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "base.py").write_text(BASE.replace("seed = 0", "seed = 5"))
    (other / "derived.py").write_text(DERIVED)
    already = type(sys)("base")
    monkeypatch.setitem(sys.modules, "base", already)
    assert [load(folder).seed for folder in (configs, other, configs)] == [0, 5, 0]
    (configs / "base.py").write_text(BASE.replace("seed = 0", "seed = 7"))
    assert load(configs).seed == 7
    assert sys.modules["base"] is already


def test_argument_after_a_colon(configs):
    (configs / "sized.py").write_text(
        "import base\ndef get_config(size='8'):\n    c = base.get_config()\n"
        "    c.data.batch_size = int(size)\n    return c\n"
    )
    assert load_config(f"{configs}/sized.py").data.batch_size == 8
    assert load_config(f"{configs}/sized.py:32").data.batch_size == 32


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("seed=-3", "seed", -3),
        ("optim.lr=0.05", "optim.lr", 0.05),
        ("optim.lr=1e-3", "optim.lr", 0.001),
        ("optim.lr=2", "optim.lr", 2.0),
        ("optim.nesterov=true", "optim.nesterov", True),
        ("optim.nesterov=False", "optim.nesterov", False),
        ("name=a=b, c", "name", "a=b, c"),
        ("name=", "name", ""),
        ("name=12", "name", "12"),
        ("data.seconds=3,1.5", "data.seconds", (3.0, 1.5)),
        ("data.seconds=(5.0,)", "data.seconds", (5.0,)),
        ("data.shards=7", "data.shards", (7,)),
        ("data.shards=", "data.shards", ()),
        ("data.folders=/x y,b", "data.folders", ["/x y", "b"]),
        ("branches=ecapa", "branches", ("ecapa",)),
        ("branches=('ecapa', 'ecapa')", "branches", ("ecapa", "ecapa")),
        ("optim.clip=3", "optim.clip", 3.0),
        ("optim.clip=None", "optim.clip", None),
        ("total_epochs=0.5", "total_epochs", 0.5),
    ],
)
def test_override_takes_the_type_of_what_it_replaces(configs, override, key, value):
    config = load(configs, override)
    for part in key.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


def test_last_override_wins_and_the_config_is_locked(configs):
    config = load(configs, "seed=1", "optim.clip=3.0", "seed=2", "optim.clip=None")
    assert config.seed == 2 and config.optim.clip is None
    with pytest.raises(AttributeError, match="locked"):
        config.optim.lrr = 1.0


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("sead", "seed"),
        ("optim.lrr", "optim.lr"),
        ("data.batchsize", "data.batch_size"),
        ("batch_size", "data.batch_size"),
        ("bach_size", "data.batch_size"),
        ("optim.lr.x", "optim.lr"),
        ("optimizer.nesterov", "optim.nesterov"),
        ("zzzz", "seed"),
    ],
)
def test_unknown_key_names_the_nearest(configs, key, nearest):
    with pytest.raises(ValueError) as raised:
        load(configs, f"{key}=1")
    assert f"config.{key} " in str(raised.value) and nearest in str(raised.value).split("nearest:")[1]


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed=1.5", "an int"),
        ("seed=x", "an int"),
        ("seed=None", "an int"),
        ("seed=", "an int"),
        ("seed=True", "an int"),
        ("optim.lr=fast", "a float"),
        ("optim.lr=nan", "a float"),
        ("optim.nesterov=2", "true or false"),
        ("optim.nesterov=maybe", "true or false"),
        ("optim.clip=x", "a float or None"),
        ("data.shards=1.5,2", "a tuple of int"),
        ("data.shards=a", "a tuple of int"),
        ("data.seconds=a,b", "a tuple of float"),
    ],
)
def test_wrong_type_names_key_type_and_value(configs, override, expected):
    key, value = override.split("=")
    with pytest.raises(ValueError) as raised:
        load(configs, override)
    assert f"config.{key} takes {expected}" in str(raised.value) and repr(value) in str(raised.value)


@pytest.mark.parametrize("text", ["--config.seed", "--seed=1", "config.seed=1", "--config.=1", "--config", ""])
def test_malformed_override_is_refused(configs, text):
    with pytest.raises(ValueError, match="not of the form --config.key=value"):
        load_config(configs / "base.py", [text])


def test_group_cannot_be_set(configs):
    with pytest.raises(ValueError, match="it is a group; its keys are optim.clip, optim.lr, optim.nesterov"):
        load(configs, "optim=3")


@pytest.mark.parametrize(
    "code, message",
    [
        ("def get_config(:\n", "SyntaxError"),
        ("\nimport no_such_module\n", "line 2.*no_such_module"),
        ("x = 1\n", "no function get_config"),
        ("def get_config():\n    return {}\n", "returns dict"),
        ("import base\ndef get_config():\n    c = base.get_config()\n    c.seed = 'x'\n    return c\n", "line 4.*seed"),
    ],
)
def test_bad_file_is_named(configs, code, message):
    (configs / "bad.py").write_text(code)
    with pytest.raises(ValueError, match=f"(?s)bad.py.*{message}"):
        load_config(configs / "bad.py")
    assert str(configs) not in sys.path


def test_missing_file_names_a_near_one(configs):
    with pytest.raises(FileNotFoundError, match="dervied.py: no such config file; nearest: .*derived.py"):
        load_config(configs / "dervied.py")


def test_required_value_must_be_given(configs):
    (configs / "needs.py").write_text(
        "from ml_collections import config_dict\ndef get_config():\n"
        "    return config_dict.create(data=config_dict.required_placeholder(str))\n"
    )
    with pytest.raises(ValueError, match="--config.data="):
        load_config(configs / "needs.py")
    assert load_config(configs / "needs.py", ["--config.data=/x"]).data == "/x"


def test_json_and_back_is_exact(configs):
    config = load(configs, "optim.lr=0.1", "name=ä ✓")
    config.unlock()
    config.nested = ConfigDict(
        {"pairs": ((1, "a"), [2.0, (None, True)]), "tiny": 1e-300, "third": 1 / 3, "empty": (), "none": None}
    )
    again = config_from_json(config_to_json(config))
    assert config_differences(config, again) == []
    assert again.to_dict() == config.to_dict()
    assert type(again.nested.pairs[1][1]) is tuple and type(again.data.folders) is list
    assert again.is_locked and again.optim.get_type("clip") is float
    assert config_to_json(again) == config_to_json(config)


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="config.a.f has type set"):
        config_to_json(ConfigDict({"a": {"f": {1}}}))
    for text in ("", "[1]", '{"a": {"__placeholder__": "array"}}'):
        with pytest.raises(ValueError, match="not the JSON of a config"):
            config_from_json(text)


def test_config_of_a_workdir(configs, tmp_path):
    assert read_config(tmp_path) is None
    save_config(tmp_path / "new", load(configs))
    assert config_differences(read_config(tmp_path / "new"), load(configs)) == []
    (tmp_path / "new" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="new/config.json"):
        read_config(tmp_path / "new")


def test_differences_name_key_and_both_values(configs):
    a, b = load(configs), load(configs, "optim.lr=0.1", "optim.clip=3", "name=x").unlock()
    b.extra = ConfigDict({"n": 1})
    del b["seed"]
    assert sorted(config_differences(a, b)) == [
        "extra.n: absent → 1",
        "name: 'derived' → 'x'",
        "optim.clip: None → 3.0",
        "optim.lr: 1.0 → 0.1",
        "seed: 0 → absent",
    ]
    assert config_differences(ConfigDict({"t": (1, 2), "n": 1}), ConfigDict({"t": [1, 2], "n": 1.0})) == [
        "n: 1 → 1.0",
        "t: (1, 2) → [1, 2]",
    ]


@pytest.mark.parametrize(
    "keys, steps",
    [
        ({"total_epochs": 3.0, "total_steps": None}, 75),
        ({"total_epochs": 0.5, "total_steps": -1}, 12),
        ({"total_epochs": 1e-6}, 1),
        ({"total_epochs": 0.0, "total_steps": -1}, 0),
        ({"total_epochs": -1.0, "total_steps": 7}, 7),
        ({"total_steps": 0}, 0),
    ],
)
def test_duration(keys, steps):
    result = duration_in_steps(ConfigDict(keys), "total", 25)
    assert result == steps and type(result) is int


def test_duration_from_placeholders():
    config = ConfigDict({"warmup_epochs": config_dict.placeholder(float), "warmup_steps": config_dict.placeholder(int)})
    config = ConfigDict({"optimizer": config})
    wanted = "exactly one of optimizer.warmup_epochs, optimizer.warmup_steps .* none of them"
    with pytest.raises(ValueError, match=wanted):
        duration_in_steps(config, "optimizer.warmup", 10)
    config.optimizer.warmup_epochs = 2
    assert duration_in_steps(config, "optimizer.warmup", 10) == 20
    config.optimizer.warmup_steps = 3
    with pytest.raises(ValueError, match="optimizer.warmup_epochs=2.0, optimizer.warmup_steps=3"):
        duration_in_steps(config, "optimizer.warmup", 10)


def test_duration_without_a_length_is_refused():
    with pytest.raises(ValueError, match="fewer utterances than a batch"):
        duration_in_steps(ConfigDict({"total_epochs": 5.0}), "total", 0)
    with pytest.raises(ValueError, match="total_epochs=inf"):
        duration_in_steps(ConfigDict({"total_epochs": float("inf")}), "total", 10)


@pytest.mark.parametrize("name", packaged_configs())
def test_a_commented_config_has_every_key_with_the_values_of_the_packaged_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = tiny.here("init-config", name, "-o", "new/my.py")
    assert status == 0 and text == "new/my.py\n"
    assert config_differences(load_config(name), load_config("new/my.py")) == []
    written, base = (tmp_path / "new" / "my.py").read_text(), packaged_configs()["base"].read_text()
    assert f"`{name}`" in written and all(len(line) <= 120 for line in written.splitlines())
    comments = [line.partition("  # ")[2] for line in base.splitlines() if "  # " in line]
    assert len(comments) > 50 and [line for line in comments if line not in written] == []


def test_a_bare_name_is_a_packaged_config_unless_there_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("small", ["--config.seed=3"]).seed == 3
    (tmp_path / "small").write_text("from ml_collections import ConfigDict\n\nget_config = ConfigDict\n")
    assert dict(load_config("small")) == {}
    with pytest.raises(FileNotFoundError, match="no packaged config is called tiny; choose one of base, "):
        load_config("tiny")
    (tmp_path / "base.py").write_text("from ml_collections import ConfigDict\n\nget_config = ConfigDict\n")
    (tmp_path / "mine.py").write_text("import base\nfrom base import get_config\n")
    assert dict(load_config("mine.py")) == {}  # the one beside it, not the packaged one


def test_a_config_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "my.py").write_text("mine")
    for arguments, message in (
        (("small", "-o", tmp_path / "my.py"), "my.py exists already"),
        (("small", "-o", tmp_path / "my.txt"), "ends in .py"),
        (("smal", "-o", tmp_path / "new.py"), "no packaged config is called 'smal': did you mean small?"),
    ):
        status, text = tiny.here("init-config", *arguments)
        assert status == 2 and message in text
    assert (tmp_path / "my.py").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
