"""The demo: learn to tell speakers apart without labels, on speech made here or on your own.

    make demo                                    # or: python experiments/demo.py
    make demo SPEECH=/path/to/recordings         # one folder per speaker, any depth below it

Makes a corpus, prepares two datasets, trains configs/demo.py on the first (which never sees a speaker label), and
compares on the speakers of the second: the trained network, the same network untrained, and plain statistics of the
log-mel features. Takes less than ten minutes on 2 cores. Run again, it continues where it stopped. --output holds:

    speech/ (corpus, or links to your recordings)   train/ test/ (datasets)   trials.txt
    run/ (training: metrics, checkpoints)   untrained/ trained/ (evaluations)   learning_curve.png   det.png
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import demo_speech
from memo_jax.xla.flags import default_xla_flags

CONFIG = Path(__file__).parents[1] / "configs" / "demo.py"
BRANCH = "ecapa"  # whose rates the table has
CONFIG_MINUTES = 5  # what training with CONFIG takes on 2 cores, compilation included
CLEARLY = 0.8  # trained EER / the best of the others: below it, the demo counts as a success
MIN_SPEAKERS, MAX_TRAIN, MAX_TEST = 10, 3000, 400  # of one's own recordings; the rest would not fit into ten minutes


def main():
    """The command."""
    arguments = parse_arguments()
    try:
        run(arguments.speech, arguments.output, arguments.minutes, arguments.seed)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"demo: error: {error}")


def parse_arguments():
    """The command line's arguments, checked."""
    parser = argparse.ArgumentParser(description="Train a small MeMo system and show what it learned.")
    parser.add_argument("--speech", type=Path, help="your own recordings, one folder per speaker (default: synthetic)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--minutes", type=float, help=f"about how long to train (default: {CONFIG_MINUTES} on 2 cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the training")
    arguments = parser.parse_args()
    if arguments.minutes is not None and not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes is {arguments.minutes}: it must be above 0")
    return arguments


def run(speech, output, minutes, seed):
    """The whole demo; returns True when the trained network is clearly better than what it is compared with."""
    start = time.perf_counter()
    speech = speech.expanduser().resolve() if speech else None
    output = output.expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    claim_output(output, {"speech": str(speech) if speech else "synthetic", "minutes": minutes, "seed": seed})

    recordings = own_speech(speech, output / "speech", seed) if speech else synthetic_speech(output / "speech", seed)
    datasets = {split: prepared(recordings / split, output / split) for split in ("train", "test")}
    trials = output / "trials.txt"
    write_trials(datasets["test"], trials, seed)
    trained_for = train_run(demo_config(datasets, trials, recordings, minutes, seed), output / "run")
    results = evaluate_both(output, datasets["test"], trials)
    draw(output, trials, results)
    say(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes, {trained_for / 60:.1f} of them training.")
    return print_table(results, output)


def say(text):
    """Prints at once, even into a pipe."""
    print(text, flush=True)


def claim_output(output, arguments):
    """Refuses to mix two demos in one folder; one that failed before it had any speech does not count."""
    record = output / "demo.json"
    before = json.loads(record.read_text()) if record.exists() and (output / "speech").exists() else arguments
    changed = [f"{key} was {before.get(key)}, is {new}" for key, new in arguments.items() if before.get(key) != new]
    if changed:
        raise ValueError(
            f"{output} holds a demo with other arguments ({'; '.join(changed)}): name another folder "
            "(make demo OUTPUT=…, or --output), or remove it"
        )
    record.write_text(json.dumps(arguments) + "\n")


# Speech


def synthetic_speech(folder, seed):
    """The folder with train/, test/, noise/ and rirs/, made unless it is there."""
    if (folder / "corpus.json").exists():
        say(f"1. Synthetic speech: already in {folder}.")
    else:
        say(f"1. Making synthetic speech in {folder}: half a minute to a minute.")
    corpus = demo_speech.make_corpus(folder, seed=seed)
    say(
        f"   {corpus['train_minutes']:.0f} minutes of {corpus['arguments']['speakers']} voices to train on, "
        f"{corpus['test_minutes']:.0f} minutes of {corpus['arguments']['test_speakers']} others to test on."
    )
    return folder


def own_speech(speech, folder, seed):
    """The same for recordings of one's own: links to them in train/ and test/, with synthetic noise and rooms."""
    if (folder / "split.json").exists():
        say(f"1. Your recordings: already divided in {folder}.")
        return folder
    from memo_jax.data.recordings import find_recordings

    recordings, _ = find_recordings([speech])
    splits = split_by_speaker(recordings, seed)
    shutil.rmtree(folder, ignore_errors=True)  # links of a demo that was interrupted
    for split, chosen in splits.items():
        for recording in chosen:
            link = folder / split / recording.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(recording.source).resolve())
    demo_speech.make_banks(folder, seed=seed)
    counts = {split: [len(chosen), len({item.speaker for item in chosen})] for split, chosen in splits.items()}
    (folder / "split.json").write_text(json.dumps(counts) + "\n")
    left = len(recordings) - sum(count for count, _ in counts.values())
    say(
        f"1. Your recordings: {counts['train'][0]} of {counts['train'][1]} speakers to train on, "
        f"{counts['test'][0]} of {counts['test'][1]} others to test on"
        f"{f'; {left} more are not needed for a demo' if left else ''}."
    )
    return folder


def split_by_speaker(recordings, seed):
    """{"train": […], "test": […]} of recordings (.name, .speaker): a fifth of the speakers, at most 40, go to the test.

    Raises ValueError, saying what the folder should look like, where the speakers are not known or too few.
    """
    by_speaker = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    layout = "the demo needs SPEECH/speaker/…/recording.wav, so that it can test on speakers it did not train on"
    if "" in by_speaker:
        raise ValueError(
            f"{by_speaker[''][0].name} (and {len(by_speaker['']) - 1} more) is in no speaker's folder: "
            f"{layout}. To train without any labels, use `memo-jax prepare` and `memo-jax train`"
        )
    import numpy as np

    several = [speaker for speaker, items in sorted(by_speaker.items()) if len(items) > 1]
    if len(several) < MIN_SPEAKERS:
        raise ValueError(f"found {len(several)} speakers with two or more recordings, need {MIN_SPEAKERS}: {layout}")
    rng = np.random.default_rng([seed, 6])
    rng.shuffle(several)
    test_speakers = several[: min(max(len(several) // 5, 2), 40)]
    each = MAX_TEST // len(test_speakers)
    test = [item for speaker in test_speakers for item in by_speaker[speaker][:each]]
    train = [item for speaker, items in by_speaker.items() if speaker not in test_speakers for item in items]
    rng.shuffle(train)
    return {"train": train[:MAX_TRAIN], "test": test}


def prepared(recordings, dataset):
    """Path of the dataset of these recordings, prepared unless it is there."""
    from memo_jax.data.prepare import preparation_text, prepare

    if (dataset / "dataset_info.json").exists():
        say(f"2. Dataset {dataset}: already prepared.")
    else:
        say(f"2. Preparing the dataset {dataset}.")
        say(f"   {preparation_text(prepare([recordings], dataset))}")
    return dataset


def write_trials(dataset, path, seed):
    """A trial list of what `prepare` kept; the only use of speaker labels."""
    from memo_jax.data.batches import Utterances

    utterances = Utterances(dataset)
    names_by_speaker = {}
    for name, speaker in zip(utterances.names, utterances.speakers):
        names_by_speaker.setdefault(speaker, []).append(name)
    lines = demo_speech.make_trials(names_by_speaker, seed=seed)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"   {path}: {len(lines)} trials among {len(names_by_speaker)} speakers.")


# Training and evaluation


def demo_config(datasets, trials, banks, minutes, seed):
    """configs/demo.py with the data; the run, and with it the gate's step, in proportion to `minutes`."""
    from memo_jax.config import load_config

    values = {
        "seed": seed,
        "data.train": datasets["train"],
        "augment.noise": banks / "noise",
        "augment.rirs": banks / "rirs",
        "evaluation.data": datasets["test"],
        "evaluation.trials": trials,
    }
    config = load_config(CONFIG, [f"--config.{key}={value}" for key, value in values.items()])
    if minutes is not None:
        for group, key in ((config, "total_steps"), (config.gate, "stop_steps"), (config.evaluation, "every_steps")):
            group[key] = max(1, round(group[key] * minutes / CONFIG_MINUTES))
    return config


def train_run(config, workdir):
    """Trains, or continues training; returns the seconds it took."""
    # Without unrolled loops, XLA compiles in a fifth less time. This small step runs as fast, a large one 5 % slower.
    default_xla_flags("--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true")
    from memo_jax.inference.evaluate import training_evaluation
    from memo_jax.training.train import train
    from memo_jax.xla.program_cache import keep_compiled_programs

    keep_compiled_programs()
    say(f"3. Training without speaker labels; all numbers go to {workdir / 'metrics.jsonl'}.")
    start = time.perf_counter()
    train(config, workdir, evaluation=training_evaluation(config))
    return time.perf_counter() - start


def evaluate_both(output, test, trials):
    """{"untrained": results, "trained": results} of the first and the last step of the run."""
    from memo_jax.inference.evaluate import evaluate

    results = {}
    for name, step in (("untrained", 0), ("trained", None)):
        say(f"4. Evaluating the {name} network.")
        results[name] = evaluate(output / "run", test, trials, output / name, branch=BRANCH, step=step, quiet=True)
    return results


def draw(output, trials, results):
    """The two pictures: learning_curve.png, and det.png of all three systems, from what the evaluations wrote."""
    from memo_jax.report.learning_curves import plot_learning_curve
    from memo_jax.scoring.figures import plot_det
    from memo_jax.scoring.score import read_scores
    from memo_jax.scoring.trials import read_trials

    listed = read_trials(trials)
    files = {
        "trained without labels": output / "trained" / "scores.txt",
        "untrained": output / "untrained" / "scores.txt",
        "log-mel statistics": output / "trained" / "log_mel_statistics.txt",
    }
    plot_det(
        {name: (read_scores(file, listed), listed.target) for name, file in files.items()},
        output / "det.png",
        title="Speakers never heard in training",
    )
    plot_learning_curve(
        output / "run" / "metrics.jsonl",
        output / "learning_curve.png",
        title="The demo's training",
        references={"log-mel statistics": results["trained"]["log_mel_statistics"]["eer"]},
    )


def print_table(results, output):
    """Prints the comparison and a plain verdict; returns whether training was clearly worth it."""
    rows = {
        "log-mel mean and deviation": results["trained"]["log_mel_statistics"],
        "network, untrained": results["untrained"],
        "network, trained without labels": results["trained"],
    }
    best_other, trained = min(row["eer"] for row in list(rows.values())[:2]), results["trained"]["eer"]
    trials, targets = results["trained"]["trials"], results["trained"]["targets"]
    say(f"\nSpeakers never heard in training ({trials:,} trials, {targets:,} of them target):\n")
    say(f"    {'':<34}{'EER':>8}{'minDCF(0.01)':>15}{'minDCF(0.05)':>15}")
    for name, row in rows.items():
        say(f"    {name:<34}{row['eer']:6.2f} %{row['min_dcf_0.01']:15.3f}{row['min_dcf_0.05']:15.3f}")
    say(f"\n    learning curve    {output / 'learning_curve.png'}\n    DET curves        {output / 'det.png'}\n")
    success = trained < CLEARLY * best_other
    if success:
        say(
            f"Training without labels brought the error down to {trained:.2f} %, from {best_other:.2f} % for the "
            "better of the others."
        )
    else:
        say(
            f"NOT A SUCCESS: {trained:.2f} % is not clearly below {best_other:.2f} %, the better of the others. "
            "More recordings, more speakers or more --minutes may help."
        )
    return success


if __name__ == "__main__":
    main()
