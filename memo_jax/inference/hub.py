"""Networks on the Hugging Face Hub: `hf:org/name@revision` is read as a model file, and `memo-jax push` uploads one.

Needs the extra `hub`. Of a repository only `model.safetensors` is read, which runs no code; huggingface_hub puts a
file into its cache once it is downloaded completely. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as in every
program that uses it.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memo_jax.files import one_line
from memo_jax.inference.model_file import Model, header_text, read_model, write_model
from memo_jax.version import __version__

HUB_PREFIX = "hf:"
MODEL, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def is_hub_name(path: str | os.PathLike) -> bool:
    """Returns whether a path names a repository on the Hub."""
    return os.fspath(path).startswith(HUB_PREFIX)


def parse_hub_name(name: str | os.PathLike) -> tuple[str, str | None]:
    """Returns ("org/name", revision or None) of "hf:org/name@revision"; raises ValueError for other text."""
    match = HUB_NAME.fullmatch(os.fspath(name).removeprefix(HUB_PREFIX))
    if match is None:
        raise ValueError(f"{os.fspath(name)}: give a repository as hf:org/name or hf:org/name@revision")
    return match["repository"], match["revision"]


def read_hub_model(name: str | os.PathLike, is_known: Callable[[str], bool] | None = None) -> Model:
    """Returns the model of a repository; it is downloaded unless this revision is in the cache.

    Args:
      name: "hf:org/name", or "hf:org/name@revision" with a branch, a tag or a commit.
      is_known: as for `read_model`.

    Raises:
      ImportError: the extra `hub` is not installed.
      ValueError: not such a name, or a damaged model file.
      OSError: no such repository, revision or file, or the Hub cannot be reached.
    """
    repository, revision = parse_hub_name(name)
    hub = _huggingface_hub()
    try:
        path = hub.hf_hub_download(
            repository, MODEL, revision=revision, library_name="memo_jax", library_version=__version__
        )
    except Exception as error:  # its own, or one of its HTTP library, which differs between its versions
        raise OSError(f"{os.fspath(name)}: cannot be downloaded: {one_line(error)}") from error
    return read_model(path, is_known)


def push(
    model: Model,
    repository: str,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    license: str = "apache-2.0",
    datasets: Sequence[str] = (),
    private: bool = False,
    onnx: bool = True,
) -> str:
    """Uploads a model with its config, its model card and an ONNX file, in a single commit; returns the commit's URL.

    Args:
      model: network, weights and front end.
      repository: "org/name"; created where it is missing.
      results: what `memo-jax eval` wrote as results.json, one per trial list.
      license: as the Hub names licences.
      datasets: what the model was trained on, as the Hub names datasets.
      private: make a new repository private.
      onnx: upload `model.onnx`, which takes waveforms; needs the extra `onnx`.

    Raises:
      ImportError: an extra is not installed.
      ValueError: not such a name, or results without error rates.
      OSError: the Hub refuses, or cannot be reached.
    """
    repository, revision = parse_hub_name(repository)
    if revision is not None:
        raise ValueError(f"{repository}@{revision}: a push goes to the main branch: leave out @{revision}")
    hub = _huggingface_hub()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(folder / MODEL, model)
        (folder / CONFIG).write_text(header_text(model) + "\n", "utf-8")
        card = model_card(model, repository, results=results, license=license, datasets=datasets, onnx=onnx)
        (folder / CARD).write_text(card, "utf-8")
        if onnx:
            from memo_jax.inference.onnx_file import write_onnx

            write_onnx(folder / ONNX, model)
        api = hub.HfApi(library_name="memo_jax", library_version=__version__)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                delete_patterns=None if onnx else ONNX,  # that of the weights before
                commit_message=f"Upload {model.backbone} {model.fingerprint[:8]} by memo_jax {__version__}",
            )
        except Exception as error:
            raise OSError(f"{repository}: cannot be uploaded: {one_line(error)}") from error
    return str(commit.commit_url)


def model_card(
    model: Model,
    repository: str,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    license: str = "apache-2.0",
    datasets: Sequence[str] = (),
    onnx: bool = True,
) -> str:
    """Returns the text of a model card: metadata for the Hub's search, use, results; arguments as for `push`.

    Raises:
      ValueError: results without an EER, or of another network. ImportError: the extra `hub` is not installed.
    """
    hub = _huggingface_hub()
    metrics = []
    for result in results:
        if "eer" not in result:
            raise ValueError("these results have no EER: give the results.json that `memo-jax eval` writes")
        if result.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise ValueError(
                f"these results belong to another network ({result['fingerprint']}, not {model.fingerprint}): evaluate "
                "this one"
            )
        trials = Path(str(result.get("trial_list", "trials"))).name
        for key, kind, name in [("eer", "eer", "Equal error rate (%)")] + [
            (key, "min_dcf", f"Minimum detection cost, p(target) = {key.removeprefix('min_dcf_')}")
            for key in sorted(result)
            if key.startswith("min_dcf_") and not key.endswith("_interval")
        ]:
            metrics.append(
                hub.EvalResult(
                    task_type="audio-classification",
                    task_name="Speaker verification",
                    dataset_type=trials,
                    dataset_name=trials,
                    metric_type=kind,
                    metric_name=name,
                    metric_value=result[key],
                )
            )
    name = repository.split("/")[-1]
    data = hub.ModelCardData(
        library_name="memo_jax",
        license=license,
        tags=["speaker-verification", "speaker-embedding", "self-supervised", "jax", *(["onnx"] if onnx else [])],
        datasets=list(datasets) or None,
        model_name=name,
        eval_results=metrics or None,
    )
    threshold = "none tuned" if model.decision is None else f"{model.decision.threshold:.4f}; {model.decision.source}"
    rows = [f"| {m.dataset_name} | {m.metric_name} | {m.metric_value} |" for m in metrics]
    table = ["| trial list | measure | value |", "|---|---|---|", *rows] if rows else ["No results were given."]
    lines = [
        f"# {name}",
        "",
        f"{model.dimension}-dimensional speaker embeddings by {' and '.join(model.member_arguments)}; input: 16-kHz "
        f"speech, front end {model.front_end}. The cosine of two embeddings tells whether one person speaks in both.",
        "",
        "```python",
        "from memo_jax import Embedder",
        "",
        f'embedder = Embedder.load("hf:{repository}")',
        'score, decision, threshold = embedder.verify("a.wav", "b.wav")',
        "```",
        "",
        f"Decision threshold (cosine): {threshold}.",
        "",
        "## Results",
        "",
        *table,
        "",
        "## Files",
        "",
        f"`{MODEL}`: weights, architecture, front end and threshold. `{CONFIG}`: the same without the weights."
        + (f" `{ONNX}`: waveforms [B, L] to embeddings, for ONNX runtimes." if onnx else ""),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _huggingface_hub():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"models on the Hub need the extra `hub`: pip install 'memo-jax[hub]' ({error})") from error
    return huggingface_hub
