"""The recipes that carry state: they learn, and what they claim of resets, streams and processes holds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples import common, language_model, reinforcement, speech_ctc, streaming

from . import two_trainings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plot(tmp_path):
    """A path for a plot, which must be one when the test ends."""
    path = tmp_path / "plot.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# language_model


def test_language_model_learns(plot, capsys):
    small = {"limit": 60000, "hidden": 96, "layers": 2, "streams": 8, "window": 50, "epochs": 2}
    history = language_model.main(**small, every=150, plot=plot)
    unigram, bigram = language_model.Text.read(None, 60000).counted()
    assert history["validation"][-1] < bigram - 0.2 < unigram
    assert history["validated at"] == [150, 268]
    assert f"from step 0 of {len(history['training'])}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        # losses of about 5 bits, products rounded to 8 or 11 bits; the state is carried in fp32
        ({"precision": "bf16"}, 0.1),
        ({"precision": "fp16"}, 0.1),  # also: the scaler finds its scale
        ({"backend": "torch"}, 1e-3),  # the sums of fp32 in another order
    ],
)
def test_language_model_otherwise(options, atol, plot):
    small = two_trainings.SMALL | {"epochs": 1, "plot": plot}
    found, expected = language_model.main(**small, **options), language_model.main(**small)
    torch.testing.assert_close(found["training"], expected["training"], rtol=0, atol=atol)


def test_language_model_takes_a_file(plot, tmp_path):
    (tmp_path / "text").write_text("abcd" * 2000 + "\N{SNOWMAN}" * 9)  # one too few to be a character
    text = language_model.Text.read(tmp_path / "text")
    assert text.characters == [language_model.RARE, *"abcd"]
    small = {"hidden": 16, "layers": 2, "streams": 4, "window": 20, "epochs": 1, "dropout": 0.0}
    history = language_model.main(**small, data=tmp_path / "text", plot=plot)
    assert history["training"][-1] < 1.5 < history["training"][0]  # 2 bits by frequencies; the order is known


def test_language_model_goes_on_with_the_same_dropout(plot, tmp_path):
    small = two_trainings.SMALL | {"dropout": 0.5, "checkpoint": tmp_path / "checkpoint", "plot": plot}
    expected = language_model.main(**small)
    shutil.rmtree(tmp_path / "checkpoint" / "step-00000100")
    torch.manual_seed(1)
    assert language_model.main(**small, resume=True) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What trainings by one process and by two left behind, each in a folder: see two_trainings.py."""
    folder = tmp_path_factory.mktemp("trainings")
    two_trainings.train(folder, "one")
    for step in ("step-00000075", "step-00000100"):  # as if it had been killed after step 75
        shutil.copytree(folder / "one" / step, folder / "one cut short" / step)
    (folder / "one cut short" / "step-00000100" / ".metadata").unlink()
    for way in ("DDP", "FSDP2"):
        shutil.copytree(folder / "one cut short", folder / f"one, then {way}")
    with ExitStack() as held:
        free = [held.enter_context(socket.create_server(("localhost", 0))) for _ in two_trainings.WAYS]
        ports = [found.getsockname()[1] for found in free]
    torch.multiprocessing.spawn(two_trainings.work, (folder, ports), nprocs=2)
    return folder


@pytest.mark.parametrize("way", two_trainings.WAYS)
def test_two_processes_train_as_one(way, trained):
    """Also where one began and two, sharded or not, went on from its checkpoint."""
    expected, found = two_trainings.history(trained / "one"), two_trainings.history(trained / way)
    assert len(found["training"]) == 100
    two_trainings.assert_close(found, expected)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_one_process_goes_on_from_two(way, trained, tmp_path):
    shutil.copytree(trained / way, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "step-00000100")
    found = language_model.main(
        **two_trainings.SMALL, checkpoint=tmp_path / "checkpoint", resume=True, plot=tmp_path / "plot.png"
    )
    assert [p.name for p in language_model.finished(tmp_path / "checkpoint")] == [
        "step-00000075",
        "step-00000100",
    ]
    two_trainings.assert_close(found, two_trainings.history(trained / "one"))


def test_a_killed_process_loses_no_more_than_an_interval(trained, tmp_path):
    """torchrun starts both again when one is killed; all losses are those of a run that was left alone."""
    options = [f"--{name}={value}" for name, value in two_trainings.SMALL.items()]
    options += [
        "--fsdp",
        "--resume",
        f"--checkpoint={tmp_path / 'checkpoint'}",
        f"--plot={tmp_path / 'plot.png'}",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "examples.language_model", *options],
            cwd=ROOT,
            # Else workers may get the addresses of those before them: pytorch's issue 135712
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 300
        while not (done := language_model.finished(tmp_path / "checkpoint")):
            assert run.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        assert run.wait(timeout=300) == 0, (tmp_path / "output").read_text()
    finally:
        run.terminate()  # and with it the workers, if anything above has failed
    started = [int(step) for step in re.findall(r"from step (\d+) of 100", (tmp_path / "output").read_text())]
    assert started[0] == 0
    assert len(started) == 2
    assert 25 <= started[1] < 100
    assert started[1] % 25 == 0
    assert done[0].name == "step-00000025"
    assert two_trainings.history(tmp_path / "checkpoint") == two_trainings.history(trained / "FSDP2")


# streaming


def test_streams_get_what_whole_sequences_get(plot, capsys):
    results = streaming.main(epochs=3, hidden=32, slots=[1, 8], calls=12, plot=plot)
    printed = capsys.readouterr().out
    error, persistence = map(float, re.search(r"error ([\d.]+); .* ([\d.]+)\n", printed).groups())
    assert error < persistence
    for slots, served in results.items():
        assert all(20 <= len(answers) <= 100 for answers in served.answers)
        assert served.values == sum(map(len, served.answers)) <= slots * len(served.seconds)
        percentiles = [served.seconds.quantile(p / 100) for p in streaming.PERCENTILES]
        assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2] <= served.seconds.max()
    differences = [float(d) for d in re.findall(r"differs from whole sequences by (\S+)", printed)]
    assert len(differences) == 2
    # fp32 sums in another order, over a hundred steps of values of about 1
    assert max(differences) < 1e-5
    for one, many in zip(results[1].answers, results[8].answers, strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-5)


# reinforcement


def test_agents_remember(plot):
    learners = reinforcement.main(iterations=20, compare=False, plot=plot)
    right = learners["reset="].curve
    assert len(right) == 20
    assert sum(right[:2]) / 2 < reinforcement.BEST_WITHOUT_MEMORY + 0.1
    assert sum(right[-3:]) / 3 > 0.8 > reinforcement.BEST_WITHOUT_MEMORY


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_resets_learn_what_the_loop_learns(backend, plot, capsys):
    """The same rollouts, and the same weights after the updates."""
    small = {"iterations": 2, "environments": 8, "steps": 32, "hidden": 16}
    learners = reinforcement.main(**small, backend=backend, plot=plot)
    ours, loop = learners["reset="], learners["loop over steps"]
    assert ours.curve == loop.curve
    assert len(ours.curve) == 2
    for (name, a), b in zip(ours.agent.named_parameters(), loop.agent.parameters(), strict=True):
        # 16 steps of Adam, of 3e-3 each, on fp32 gradients that differ by rounding
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert re.search(r"an update with reset= is [\d.]+ times as fast", capsys.readouterr().out)


def test_reinforcement_goes_on_from_a_checkpoint(plot, tmp_path):
    small = {"environments": 8, "steps": 16, "hidden": 8, "compare": False, "plot": plot}
    expected = reinforcement.main(iterations=3, **small)["reset="]
    reinforcement.main(iterations=2, checkpoint=tmp_path / "agent.pt", **small)
    found = reinforcement.main(iterations=3, checkpoint=tmp_path / "agent.pt", resume=True, **small)["reset="]
    assert found.curve == expected.curve
    for a, b in zip(found.agent.parameters(), expected.agent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_episodes_end_with_the_question():
    world = reinforcement.Recall(200, torch.device("cpu"))
    cue, steps = world.cue, 0
    assert world.observe()[:, : reinforcement.CUES].sum() == 200  # all begin with a cue
    ended = torch.zeros(200, dtype=torch.bool)
    while not ended.all():
        asked = world.observe()[:, reinforcement.ASK].bool()
        reward, ends = world.step(cue)
        assert torch.equal(asked, ends)
        assert reward[ends & ~ended].eq(1).all()
        assert reward[~ends].eq(0).all()
        ended, steps = ended | ends, steps + 1
    assert steps == reinforcement.DELAY[1] + 1


# speech_ctc


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_speech_is_recognised(cell, plot):
    error, baseline = speech_ctc.main(epochs=6, utterances=250, hidden=64, cell=cell, plot=plot)
    assert error < 0.2 < baseline


def test_speech_from_files(plot, tmp_path):
    for i, text in enumerate(("aeio", "uj", "wya", "oo", "ej", "iw")):
        sound = speech_ctc.speak(text, noise=0.1)
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(speech_ctc.RATE)
            file.writeframes((sound * 4096).to(torch.int16).numpy().tobytes())
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    read = speech_ctc.read(tmp_path)
    assert [u.text for u in read] == ["aeio", "uj", "wya", "oo", "ej", "iw"]
    assert all(u.features.shape[1] == speech_ctc.BANDS for u in read)
    error, baseline = speech_ctc.main(epochs=1, hidden=8, data=tmp_path, plot=plot)
    assert baseline == 1
    assert error >= 0


@pytest.mark.parametrize(
    ("a", "b", "expected"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_distance(a, b, expected):
    assert speech_ctc.distance(a, b) == speech_ctc.distance(b, a) == expected


def test_collapse():
    assert speech_ctc.collapse([0, 1, 1, 0, 1, 2, 2, 0], "xy") == "xxy"


# all


@pytest.mark.parametrize("recipe", [language_model, streaming, reinforcement, speech_ctc])
def test_help(recipe):
    found = CliRunner().invoke(common.application(recipe.main), ["--help"])
    assert found.exit_code == 0
    assert recipe.main.__doc__ in " ".join(found.output.split())
    for option in ("--backend", "--seed", "--checkpoint", "--resume", "--plot", "--device"):
        assert option in found.output


@pytest.mark.parametrize("recipe", [language_model, reinforcement])
def test_resume_needs_a_checkpoint(recipe):
    refused = CliRunner().invoke(common.application(recipe.main), ["--resume"])
    assert refused.exit_code == 2
    assert "needs a --checkpoint" in refused.output
