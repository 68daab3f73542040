"""The actual PyTorch networks that ours are compared with, each from its own package."""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def speechbrain_ecapa(**arguments) -> torch.nn.Module:
    """speechbrain's ECAPA-TDNN, which takes lists; speechbrain imports torchaudio when it is imported."""
    stub_torchaudio()
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(80, **{name: list(x) if isinstance(x, tuple) else x for name, x in arguments.items()})


def stub_torchaudio() -> None:
    """Replaces torchaudio by an empty module: no build of it loads with this PyTorch, and we use none of it."""
    if "torchaudio" not in sys.modules:
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        stub.__version__ = "2.9.0"
        stub.list_audio_backends = list
        sys.modules["torchaudio"] = stub


def wespeaker(module: str) -> types.ModuleType:
    """One of wespeaker's model files; the package's __init__ would import far more than is installed."""
    if "wespeaker" not in sys.modules:
        folder = package_folder("wespeaker")
        for name, path in (("wespeaker", folder), ("wespeaker.models", folder / "models")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    return importlib.import_module(f"wespeaker.models.{module}")


def wespeaker_ecapa(**arguments) -> torch.nn.Module:
    """wespeaker's ECAPA-TDNN."""
    return wespeaker("ecapa_tdnn").ECAPA_TDNN(feat_dim=80, **arguments)


def wespeaker_resnet(**arguments) -> torch.nn.Module:
    """wespeaker's ResNet with basic blocks."""
    module = wespeaker("resnet")
    return module.ResNet(module.BasicBlock, feat_dim=80, **arguments)


def speakerlab_ecapa(**arguments) -> torch.nn.Module:
    from speakerlab.models.ecapa_tdnn.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(80, **arguments)


def speakerlab_resnet(**arguments) -> torch.nn.Module:
    from speakerlab.models.resnet.ResNet import ResNet

    return ResNet(feat_dim=80, **arguments)


def speakerlab_campplus(layers: tuple[int, ...] | None = None, **arguments) -> torch.nn.Module:
    """3D-Speaker's CAM++; `layers` makes it shallower than its constructor can, from its own layers."""
    from speakerlab.models.campplus.DTDNN import CAMPPlus
    from speakerlab.models.campplus.layers import CAMDenseTDNNBlock, DenseLayer, TransitLayer, get_nonlinear

    network = CAMPPlus(**arguments)
    if layers is not None:
        channels, growth = arguments["init_channels"], arguments["growth_rate"]
        for i, (count, dilation) in enumerate(zip(layers, (1, 2, 2)), 1):
            block = CAMDenseTDNNBlock(
                count, channels, growth, network_bottleneck(arguments), 3, dilation=dilation, memory_efficient=True
            )
            channels += count * growth
            setattr(network.xvector, f"block{i}", block)
            setattr(network.xvector, f"transit{i}", TransitLayer(channels, channels // 2, bias=False))
            channels //= 2
        network.xvector.out_nonlinear = get_nonlinear("batchnorm-relu", channels)
        network.xvector.dense = DenseLayer(2 * channels, arguments["embedding_size"], config_str="batchnorm_")
    return network


def network_bottleneck(arguments) -> int:
    return arguments.get("bn_size", 4) * arguments["growth_rate"]


def scramble(network: torch.nn.Module, seed: int = 0) -> None:
    """Randomises every number of a network, including statistics and affine parts of batch norms."""
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if tensor.ndim > 1:
                drawn = random.normal(0, (2 / np.prod(tensor.shape[1:])) ** 0.5, tensor.shape)
            elif name.endswith(("running_var", "weight")):
                drawn = random.uniform(0.5, 1.5, tensor.shape)
            else:
                drawn = random.normal(0, 0.3, tensor.shape)
            tensor.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))


def tensors_of(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """A network's parameters and statistics as NumPy arrays that later training does not change."""
    return {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}


def embedding_of(output) -> torch.Tensor:
    """The embeddings [N, D] in what a network returned; wespeaker's return a tuple, speechbrain's an extra axis."""
    output = output[-1] if isinstance(output, tuple) else output
    return output.reshape(output.shape[0], -1)


class Case(NamedTuple):
    """A reference's constructor, its arguments for a small network and for the published size."""

    kind: str
    backbone: str
    build: Callable[..., torch.nn.Module]
    small: dict[str, Any]
    full: dict[str, Any] | None = None
    parameters: int = 0


NARROW = {"channels": (32, 32, 32, 32, 96), "lin_neurons": 24}
CASES = {
    "speechbrain-ecapa": Case(
        "speechbrain",
        "ecapa",
        speechbrain_ecapa,
        NARROW,
        {"channels": (512, 512, 512, 512, 1536), "lin_neurons": 256},
        6_390_720,
    ),
    "3dspeaker-ecapa": Case("3dspeaker", "ecapa", speakerlab_ecapa, NARROW),
    "wespeaker-ecapa": Case(
        "wespeaker",
        "ecapa",
        wespeaker_ecapa,
        {"channels": 32, "embed_dim": 24, "global_context_att": True, "emb_bn": True},
        {"channels": 512, "embed_dim": 192, "global_context_att": True},
        6_190_720,
    ),
    "wespeaker-ecapa-without-context": Case("wespeaker", "ecapa", wespeaker_ecapa, {"channels": 32, "embed_dim": 24}),
    "wespeaker-resnet": Case(
        "wespeaker",
        "resnet",
        wespeaker_resnet,
        {"num_blocks": [1, 2, 1, 1], "m_channels": 4, "embed_dim": 24},
        {"num_blocks": [3, 4, 6, 3], "m_channels": 32, "embed_dim": 256},
        6_634_336,
    ),
    "3dspeaker-resnet": Case(
        "3dspeaker",
        "resnet",
        speakerlab_resnet,
        {"num_blocks": [1, 1, 1, 1], "m_channels": 4, "embedding_size": 24, "two_emb_layer": True},
    ),
    "3dspeaker-campplus": Case(
        "3dspeaker",
        "campplus",
        speakerlab_campplus,
        {"layers": (2, 1, 2), "growth_rate": 8, "init_channels": 16, "embedding_size": 24},
        {"embedding_size": 512},
        7_176_224,
    ),
}
