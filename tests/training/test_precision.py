"""Training in bfloat16 goes where training in float32 goes."""

import numpy as np

import tiny
from memo_jax.data.prepare import prepare
from memo_jax.log import read_metrics

STEPS = 200
SPEAKERS, RECORDINGS = 4, 5


def test_bfloat16_tracks_float32_on_real_speech(shared, tmp_path):
    """Losses step by step while rounding has not been amplified, then on average; and the equal error rate.

    Where this was tried out, bfloat16 was off by 0.9 % (distillation) and 0.2 % (contrastive) in the first ten steps and
    by 0.0 % and 0.5 % over the last fifty; the rates at the end were 19.3 % in float32 and 16.7 % in bfloat16, from 22.7 %
    untrained. With 100 recordings, another seed was off by 13 % and 6 %, and its rate at the end by 6.
    """
    recordings = shared / "speech" / "librispeech" / "test"
    folders = sorted(path for path in recordings.iterdir() if path.is_dir())[:SPEAKERS]
    paths = [path for folder in folders for path in sorted(folder.iterdir())[:RECORDINGS]]
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    for name, path in zip(names, paths):
        (tmp_path / "recordings" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "recordings" / name).symlink_to(path)
    prepare(tmp_path / "recordings", tmp_path / "data", workers=1)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    (tmp_path / "trials").write_text("".join(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs))

    losses, rates = {}, {}
    for dtype in ("float32", "bfloat16"):
        status, text = tiny.train_here(
            tmp_path / dtype,
            f"data.train={tmp_path / 'data'}",
            f"model.dtype={dtype}",
            f"total_steps={STEPS}",
            "data.global_seconds=0.5",
            "data.local_crops=0",
            "optimizer.name=adamw",
            "optimizer.learning_rate=0.3",
            "optimizer.warmup_steps=20",
            "optimizer.freeze_prototypes_steps=0",
            "teacher.momentum=0.95",
            "gate.rule=always",
            f"checkpoint.every_steps={STEPS}",
            f"evaluation.data={tmp_path / 'data'}",
            f"evaluation.trials={tmp_path / 'trials'}",
            "evaluation.every_epochs=-1.0",
            f"evaluation.every_steps={STEPS}",
        )
        assert status == 0, text
        rows = read_metrics(tmp_path / dtype)
        names = ("loss/self/resnet", "loss/contrastive/resnet")
        losses[dtype] = np.array([[row[name] for name in names] for row in rows if "loss" in row])
        rates[dtype] = np.array([rows[0]["eer/resnet"], rows[-1]["eer/resnet"]])
    exact, coarse = losses["float32"], losses["bfloat16"]
    assert (exact != coarse).all(axis=1).mean() > 0.9, "bfloat16 has computed otherwise"
    np.testing.assert_array_less(np.abs(coarse / exact - 1)[:10].mean(axis=0), 0.02)
    np.testing.assert_allclose(coarse[-50:].mean(axis=0), exact[-50:].mean(axis=0), rtol=0.1)
    apart = np.abs(rates["bfloat16"] - rates["float32"])
    np.testing.assert_array_less(apart, [2, 6], err_msg=f"untrained, end: {rates}")
