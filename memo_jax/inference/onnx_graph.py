"""The backbones and front ends as ONNX graphs, in evaluation mode, for runtimes that know nothing of JAX.

Each function mirrors one module of `memo_jax.models` or one front end of `memo_jax.features` and takes its variables.
Sequences are [B, C, T] here and planes [B, C, T, F], ONNX's layouts.

The graph is built with spox: operators are typed Python functions, and spox infers types and shapes while the graph is
built, so that a wrong axis is an error here and not on somebody's phone. Opset 17, of 2022, is the one that runtimes on
phones support; a file states the lowest opset that its operators need. (onnxscript would do as well; jax2onnx
converts JAX programs but cannot be installed beside orbax-checkpoint.)
"""

import functools

import flax.linen as nn
import numpy as np
import spox.opset.ai.onnx.v17 as op
from numpy.typing import ArrayLike, DTypeLike
from spox import Tensor, Var, argument

from memo_jax import features
from memo_jax.inference.model_file import NoGraphError
from memo_jax.models import Variables
from memo_jax.models.campplus import SEGMENT, CAMPPlus
from memo_jax.models.ecapa import ECAPATDNN, padding_of
from memo_jax.models.ensemble import Ensemble
from memo_jax.models.resnet import ResNet34


def constant(value: ArrayLike, dtype: DTypeLike = np.float32) -> Var:
    """Returns a constant of the graph."""
    return op.const(np.asarray(value, dtype))


def inside(variables: Variables, name: str) -> Variables:
    """Returns the variables of a module's submodule."""
    return {kind: tree.get(name, {}) for kind, tree in variables.items()}


def conv(x: Var, variables: Variables, *, stride: int = 1, dilation: int = 1, padding: str = "zeros") -> Var:
    """Mirrors `layers.TimeConv` and, with a kernel of one frame, a linear map: [B, C, T] → [B, features, T']."""
    kernel = np.asarray(variables["params"]["kernel"])  # [K, C, features]
    bias = variables["params"].get("bias")
    pad = dilation * (kernel.shape[0] - 1) // 2
    if pad and padding == "reflect":
        x, pad = op.pad(x, constant([0, 0, pad, 0, 0, pad], np.int64), mode="reflect"), 0
    return op.conv(
        x,
        constant(kernel.transpose(2, 1, 0)),
        None if bias is None else constant(bias),
        kernel_shape=(kernel.shape[0],),
        strides=(stride,),
        dilations=(dilation,),
        pads=(pad, pad),
    )


def plane_conv(x: Var, variables: Variables, strides: tuple[int, int] = (1, 1)) -> Var:
    """Mirrors `layers.PlaneConv`: [B, C, T, F] → [B, features, T', F']."""
    kernel = np.asarray(variables["params"]["kernel"])  # [K, K, C, features]
    pad = kernel.shape[0] // 2
    weights = constant(kernel.transpose(3, 2, 0, 1))
    return op.conv(x, weights, kernel_shape=kernel.shape[:2], strides=strides, pads=(pad,) * 4)


def norm(x: Var, variables: Variables) -> Var:
    """Mirrors `layers.BatchNorm` with its running statistics, over axis 1, as scale and offset, which runtimes fuse."""
    statistics, params = variables["batch_stats"], variables["params"]
    gain = np.asarray(params.get("scale", 1.0)) / np.sqrt(np.asarray(statistics["var"]) + 1e-5)
    offset = params.get("bias", 0.0) - statistics["mean"] * gain
    shape = (-1,) + (1,) * (len(x.unwrap_tensor().shape) - 2)
    return op.add(op.mul(x, constant(gain.reshape(shape))), constant(offset.reshape(shape)))


def linear(x: Var, variables: Variables) -> Var:
    """Mirrors `layers.Linear`: [B, C] → [B, features]."""
    params = variables["params"]
    return op.add(op.matmul(x, constant(params["kernel"])), constant(params["bias"]))


def size(x: Var, axis: int, dtype: DTypeLike = np.float32) -> Var:
    """Returns the size of an axis, a scalar."""
    return op.cast(op.gather(op.shape(x), constant(axis, np.int64)), to=dtype)


def mean(x: Var, axis: int) -> Var:
    """Returns the mean over an axis, which stays."""
    return op.reduce_mean(x, axes=(axis,), keepdims=1)


def mean_and_unbiased_variance(x: Var, axis: int) -> tuple[Var, Var]:
    """Mirrors `layers.mean_and_variance_time`; the axis stays."""
    average = mean(x, axis)
    centered = op.sub(x, average)
    count = size(x, axis)
    others = op.max([op.sub(count, constant(1)), constant(1)])
    return average, op.mul(mean(op.mul(centered, centered), axis), op.div(count, others))


def last_axis_removed(x: Var) -> Var:
    """Returns x [..., 1] without its last axis."""
    return op.squeeze(x, constant([-1], np.int64))


# ECAPA-TDNN


def conv_relu_norm(x: Var, variables: Variables, dilation: int = 1, padding: str = "reflect", stride: int = 1) -> Var:
    """Mirrors `ecapa.ConvReluNorm`."""
    x = conv(x, inside(variables, "conv"), stride=stride, dilation=dilation, padding=padding)
    return norm(op.relu(x), inside(variables, "norm"))


def res2_block(x: Var, variables: Variables, network: ECAPATDNN, dilation: int) -> Var:
    """Mirrors `ecapa.Res2Block`."""
    first_passes = network.form == "speechbrain"
    chunks = list(op.split(x, outputs_count=network.scale, axis=1))
    passed = chunks.pop(0 if first_passes else -1)
    outputs = []
    for i, chunk in enumerate(chunks):
        chunk = op.add(chunk, outputs[-1]) if outputs else chunk
        outputs.append(conv_relu_norm(chunk, inside(variables, f"chunk_{i}"), dilation, padding_of(network.form)))
    outputs.insert(0 if first_passes else len(outputs), passed)
    return op.concat(outputs, axis=1)


def se_res2_block(x: Var, variables: Variables, network: ECAPATDNN, dilation: int) -> Var:
    """Mirrors `ecapa.SERes2Block`."""
    shortcut = conv(x, inside(variables, "shortcut")) if "shortcut" in variables["params"] else x
    x = conv_relu_norm(x, inside(variables, "reduce"))
    x = res2_block(x, inside(variables, "res2"), network, dilation)
    x = conv_relu_norm(x, inside(variables, "expand"))
    excitation = inside(variables, "se")
    gate = conv(op.relu(conv(mean(x, 2), inside(excitation, "squeeze"))), inside(excitation, "excite"))
    return op.add(op.mul(x, op.sigmoid(gate)), shortcut)


def attentive_statistics(x: Var, variables: Variables, network: ECAPATDNN) -> Var:
    """Mirrors `ecapa.AttentiveStatistics`: [B, C, T] → [B, 2C, 1]."""
    hidden_variables = inside(variables, "hidden")
    if network.global_context:
        if network.form == "speechbrain":
            average = mean(x, 2)
            centered = op.sub(x, average)
            variance = op.max([mean(op.mul(centered, centered), 2), constant(1e-12)])
        else:
            average, variance = mean_and_unbiased_variance(x, 2)
            variance = op.add(variance, constant(1e-7))
        # The context is constant over time, so its part of the convolution is computed once.
        kernel = np.asarray(hidden_variables["params"]["kernel"])
        channels = kernel.shape[1] // 3
        of_context = {"params": {"kernel": kernel[:, channels:], "bias": hidden_variables["params"]["bias"]}}
        context = conv(op.concat([average, op.sqrt(variance)], axis=1), of_context)
        hidden = op.add(conv(x, {"params": {"kernel": kernel[:, :channels]}}), context)
    else:
        hidden = conv(x, hidden_variables)
    if network.form == "speechbrain":
        hidden = norm(op.relu(hidden), inside(variables, "norm"))
    weights = op.softmax(conv(op.tanh(hidden), inside(variables, "attention")), axis=2)
    total = op.reduce_sum(op.mul(weights, x), constant([2], np.int64))
    centered = op.sub(x, total)
    variance = op.reduce_sum(op.mul(weights, op.mul(centered, centered)), constant([2], np.int64))
    floor = constant(1e-12 if network.form == "speechbrain" else 1e-7)
    return op.concat([total, op.sqrt(op.max([variance, floor]))], axis=1)


def ecapa(network: ECAPATDNN, variables: Variables, x: Var) -> Var:
    """Mirrors `ecapa.ECAPATDNN`: [B, T, F] → [B, D]."""
    x = op.transpose(x, perm=(0, 2, 1))
    x = conv_relu_norm(x, inside(variables, "stem"), network.dilations[0], padding_of(network.form), network.stride)
    outputs = []
    for i, dilation in enumerate(network.dilations[1:]):
        x = se_res2_block(x, inside(variables, f"block_{i}"), network, dilation)
        outputs.append(x)
    x = op.concat(outputs, axis=1)
    if network.form == "speechbrain":
        x = conv_relu_norm(x, inside(variables, "aggregate"))
    else:
        x = op.relu(conv(x, inside(variables, "aggregate")))
    x = norm(attentive_statistics(x, inside(variables, "pool"), network), inside(variables, "pool_norm"))
    embedding = last_axis_removed(conv(x, inside(variables, "embedding")))
    return norm(embedding, inside(variables, "embedding_norm")) if network.embedding_norm else embedding


# ResNet34


def basic_block(x: Var, variables: Variables, strides: tuple[int, int]) -> Var:
    """Mirrors `resnet.BasicBlock`."""
    shortcut = x
    if "shortcut" in variables["params"]:
        shortcut = norm(plane_conv(x, inside(variables, "shortcut"), strides), inside(variables, "shortcut_norm"))
    x = op.relu(norm(plane_conv(x, inside(variables, "conv_0"), strides), inside(variables, "norm_0")))
    x = norm(plane_conv(x, inside(variables, "conv_1")), inside(variables, "norm_1"))
    return op.relu(op.add(x, shortcut))


def plane_stem(x: Var, variables: Variables, stride: int = 1) -> Var:
    """Mirrors the first convolution of a network of planes: [B, T, F] → [B, C, T / stride, F / stride]."""
    x = op.unsqueeze(x, constant([1], np.int64))
    return op.relu(norm(plane_conv(x, inside(variables, "stem"), (stride, stride)), inside(variables, "stem_norm")))


def resnet(network: ResNet34, variables: Variables, x: Var) -> Var:
    """Mirrors `resnet.ResNet34`: [B, T, F] → [B, D]."""
    x = plane_stem(x, variables, network.stride)
    for stage, count in enumerate(network.blocks):
        for i in range(count):
            stride = 2 if stage and i == 0 else 1
            x = basic_block(x, inside(variables, f"stage_{stage}_block_{i}"), (stride, stride))
    average, variance = mean_and_unbiased_variance(x, 2)
    deviation = op.sqrt(op.add(variance, constant(network.pool_epsilon)))
    pooled = op.concat([op.flatten(average), op.flatten(deviation)], axis=1)
    embedding = linear(pooled, inside(variables, "embedding"))
    if network.second_embedding:
        embedding = norm(op.relu(embedding), inside(variables, "embedding_norm"))
        embedding = linear(embedding, inside(variables, "embedding_1"))
    return embedding


# CAM++


def norm_relu_conv(x: Var, variables: Variables) -> Var:
    """Mirrors `campplus.NormReluConv`."""
    return conv(op.relu(norm(x, inside(variables, "norm"))), inside(variables, "conv"))


def context_aware_masking(x: Var, variables: Variables, dilation: int) -> Var:
    """Mirrors `campplus.ContextAwareMasking`."""
    local = conv(x, inside(variables, "local"), dilation=dilation)
    segments = op.average_pool(x, kernel_shape=(SEGMENT,), strides=(SEGMENT,), ceil_mode=1)
    context = op.relu(conv(op.add(segments, mean(x, 2)), inside(variables, "squeeze")))
    gate = op.sigmoid(conv(context, inside(variables, "excite")))  # [B, features, S]
    repeated = op.expand(op.unsqueeze(gate, constant([3], np.int64)), constant([1, 1, 1, SEGMENT], np.int64))
    repeated = op.reshape(repeated, constant([0, 0, -1], np.int64))
    frames = op.unsqueeze(size(x, 2, np.int64), constant([0], np.int64))
    repeated = op.slice(repeated, constant([0], np.int64), frames, constant([2], np.int64))
    return op.mul(local, repeated)


def dense_layer(x: Var, variables: Variables, dilation: int) -> Var:
    """Mirrors `campplus.DenseLayer`."""
    hidden = norm_relu_conv(x, inside(variables, "reduce"))
    hidden = op.relu(norm(hidden, inside(variables, "norm")))
    return context_aware_masking(hidden, inside(variables, "masking"), dilation)


def campplus_planes(network: CAMPPlus, variables: Variables, x: Var) -> Var:
    """Mirrors `campplus.FrontEndConvolution`: [B, T, F] → [B, 4·F, T]."""
    x = plane_stem(x, variables)
    for stage, count in enumerate(network.plane_blocks):
        for i in range(count):
            x = basic_block(x, inside(variables, f"stage_{stage}_block_{i}"), (1, 2 if i == 0 else 1))
    x = op.relu(norm(plane_conv(x, inside(variables, "reduce"), (1, 2)), inside(variables, "reduce_norm")))
    channels = network.plane_channels * (features.MEL_BINS // 8)
    return op.reshape(op.transpose(x, perm=(0, 1, 3, 2)), constant([0, channels, -1], np.int64))


def campplus(network: CAMPPlus, variables: Variables, x: Var) -> Var:
    """Mirrors `campplus.CAMPPlus`: [B, T, F] → [B, D]."""
    x = campplus_planes(network, inside(variables, "front_end"), x)
    x = op.relu(norm(conv(x, inside(variables, "stem"), stride=2), inside(variables, "stem_norm")))
    for block, (count, dilation) in enumerate(zip(network.layers, network.dilations, strict=True)):
        for i in range(count):
            layer = dense_layer(x, inside(variables, f"block_{block}_layer_{i}"), dilation)
            x = op.concat([x, layer], axis=1)
        x = norm_relu_conv(x, inside(variables, f"transit_{block}"))
    x = op.relu(norm(x, inside(variables, "norm")))
    average, variance = mean_and_unbiased_variance(x, 2)
    embedding = conv(op.concat([average, op.sqrt(variance)], axis=1), inside(variables, "embedding"))
    return norm(last_axis_removed(embedding), inside(variables, "embedding_norm"))


# Several networks as one


def ensemble(network: Ensemble, variables: Variables, x: Var) -> Var:
    """Mirrors `ensemble.Ensemble`: [B, T, F] → [B, D]."""
    parts = [
        _embedding(member, inside(variables, f"members_{name}"), x) for name, member in sorted(network.members.items())
    ]
    lengths = [op.sqrt(op.reduce_sum(op.mul(part, part), constant([1], np.int64))) for part in parts]
    unit = [op.div(part, op.max([length, constant(1e-12)])) for part, length in zip(parts, lengths, strict=True)]
    return op.concat(unit, axis=1)


# Front ends, in two parts: waves [B, L] in [-1, 1] → spectrum [B, T, 80], and spectrum → what the network takes


def mel_spectrum(waves: Var, basis: np.ndarray, mel: np.ndarray) -> Var:
    """Returns the mel power spectrum of windows of 400 samples every 160: [B, L] → [B, T, 80]."""
    kernel = np.ascontiguousarray(basis.T[:, None, :])  # [2 · bins, 1, 400]
    spectrum = op.conv(
        op.unsqueeze(waves, constant([1], np.int64)),
        constant(kernel),
        kernel_shape=(features.WINDOW,),
        strides=(features.HOP,),
    )
    squares = op.transpose(op.mul(spectrum, spectrum), perm=(0, 2, 1))
    return op.matmul(squares, constant(np.concatenate([mel, mel])))  # cosines and sines have the same filters


def without_mean(x: Var) -> Var:
    """Returns x [B, T, 80] minus its mean over time."""
    return op.sub(x, mean(x, 1))


def log_mel(waves: Var) -> Var:
    """Returns the logarithm of `features.mel_power`."""
    reach = features.WINDOW // 2
    padded = op.pad(waves, constant([0, reach, 0, reach], np.int64), mode="reflect")
    power = mel_spectrum(padded, features._fourier_basis(), features._mel_basis())
    return op.log(op.add(power, constant(features.LOG_FLOOR)))


def normalized(x: Var) -> Var:
    """Returns x with mean 0 and variance 1 over time, as in `features.normalized_log_mel`."""
    centered = without_mean(x)
    variance = op.add(mean(op.mul(centered, centered), 1), constant(features.NORM_EPSILON))
    return op.div(centered, op.sqrt(variance))


def kaldi_fbank(waves: Var, window: str, scale: float = 1.0, high: float = 8000.0, snip_edges: bool = True) -> Var:
    """Mirrors `features.kaldi_fbank_input` before its mean is subtracted."""
    if snip_edges:
        missing = op.sub(constant(features.WINDOW, np.int64), size(waves, 1, np.int64))
        missing = op.unsqueeze(op.max([missing, constant(0, np.int64)]), constant([0], np.int64))
        padded = op.pad(waves, op.concat([constant([0, 0, 0], np.int64), missing], axis=0))
    else:
        head = backwards(waves, first=(features.WINDOW - features.HOP) // 2 - 1, end=np.iinfo(np.int64).min)
        padded = op.concat([head, waves, backwards(waves, first=-1, end=-features.WINDOW // 2 - 1)], axis=1)
    basis = features._kaldi_basis(window) * np.float32(scale)
    mel = mel_spectrum(padded, basis, features._kaldi_mel_basis(high))
    return op.log(op.max([mel, constant(np.finfo(np.float32).eps)]))


def backwards(x: Var, first: int, end: int) -> Var:
    """Returns x[:, first:end:-1]."""
    return op.slice(x, *(constant([value], np.int64) for value in (first, end, 1, -1)))


def speechbrain_fbank(waves: Var) -> Var:
    """Returns the decibels of `features.speechbrain_fbank_input`."""
    reach = features.WINDOW // 2
    padded = op.pad(waves, constant([0, reach, 0, reach], np.int64))
    mel = mel_spectrum(padded, features._speechbrain_basis(), features._speechbrain_mel_basis())
    return op.mul(op.log(op.max([mel, constant(1e-10)])), constant(10 / np.log(10)))


def within_80_decibels(x: Var) -> Var:
    """Limits decibels to 80 below the loudest bin, and subtracts their mean over time."""
    loudest = op.reduce_max(x, axes=(1, 2), keepdims=1)
    return without_mean(op.max([x, op.sub(loudest, constant(80))]))


SPECTRA = {
    "log_mel": log_mel,
    "kaldi_fbank": functools.partial(kaldi_fbank, window="povey"),
    "wespeaker_fbank": functools.partial(kaldi_fbank, window="hamming", scale=32768.0),
    "sherpa_fbank": functools.partial(kaldi_fbank, window="povey", high=7600.0, snip_edges=False),
    "speechbrain_fbank": speechbrain_fbank,
}
NORMALIZATIONS = dict.fromkeys(SPECTRA, without_mean) | {"log_mel": normalized, "speechbrain_fbank": within_80_decibels}


def of_features(network: nn.Module, front_end: str, variables: Variables) -> tuple[Var, Var]:
    """Returns (features float32 [B, T, 80], embeddings [B, D]): the front end's normalisation and the network.

    Raises:
      NoGraphError: (a ValueError) the backbone has no graph here.
    """
    x = argument(Tensor(np.float32, ("B", "T", features.MEL_BINS)))
    return x, _embedding(network, variables, NORMALIZATIONS[front_end](x))


def of_waveforms(network: nn.Module, front_end: str, variables: Variables) -> tuple[Var, Var]:
    """Returns (waves float32 [B, L] in [-1, 1] at 16 kHz, embeddings [B, D]): the front end and the network.

    Raises:
      NoGraphError: (a ValueError) the backbone has no graph here.
    """
    waves = argument(Tensor(np.float32, ("B", "L")))
    return waves, _embedding(network, variables, NORMALIZATIONS[front_end](SPECTRA[front_end](waves)))


BACKBONES = {ECAPATDNN: ecapa, ResNet34: resnet, CAMPPlus: campplus, Ensemble: ensemble}


def _embedding(network, variables, x):
    if type(network) not in BACKBONES:
        raise NoGraphError(
            f"the backbone {type(network).__name__} has no ONNX graph yet (inference/onnx_graph.py): use --runtime "
            "jax, or push with --no-onnx"
        )
    return BACKBONES[type(network)](network, variables, x)
