"""Many samples into a folder: only what is missing is made, whoever makes it, and never another way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import two_process_flags
from tiny import all_files, command_environment

from maskdit_jax import UserError, load, write_samples
from maskdit_jax.data.images import read_png
from maskdit_jax.seeds import as_ranges, choose_labels, parse_integers

OPTIONS = {"num_steps": 2, "solver": "euler", "batch_size": 4}


@pytest.fixture(scope="module")
def model(finished):
    return load(finished[0])


def test_a_folder_is_gone_on_with(model, tmp_path, messages, caplog):
    """Lost images are made again, the same, more seeds too, and nothing else is touched."""
    about = write_samples(model, tmp_path, range(998, 1004), formats=["png"], **OPTIONS)
    assert (about["seeds"], about["labels"], about["nfe"], about["finished"]) == (
        "998-1003",
        "balanced",
        4,
        True,
    )
    assert json.loads((tmp_path / "samples.json").read_text()) == about
    before = all_files(tmp_path)
    lost = [tmp_path / "001000/001002.png", tmp_path / "000000/000998.png"]
    for path in lost:
        path.unlink()
    write_samples(model, tmp_path, range(998, 1006), formats=["png", "npz"], **OPTIONS)
    assert "4 of 8 samples are there already" in caplog.text
    after = all_files(tmp_path)
    for path, (written, content) in before.items():
        if path.suffix == ".png":
            assert after[path][1] == content
            assert (after[path][0] != written) == (path in lost)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (8, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"][4], read_png(lost[0]))
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(998, 1006) % 10)
        np.testing.assert_array_equal(arrays["seeds"], np.arange(998, 1006))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_steps": 3}, ["sampler.num_steps=2 there, 3 now", "nfe=4 there, 6 now"]),
        ({"cfg_scale": 1.0}, ["sampler.cfg_scale=1.5 there, 1.0 now"]),
        ({"labels": "random"}, ["labels=balanced there, random now"]),
        ({"seeds": [5]}, ["seeds 5-6, more than those asked for"]),
        ({"seeds": [5, 5]}, ["one stands there twice"]),
    ],
    ids=str,
)
def test_samples_made_in_another_way_do_not_mix(model, tmp_path, change, named):
    call = {"seeds": [5, 6]} | OPTIONS
    write_samples(model, tmp_path, **call)
    before = all_files(tmp_path)
    with pytest.raises(UserError) as refused:
        write_samples(model, tmp_path, **(call | change))
    assert all(part in str(refused.value) for part in named), refused.value
    assert all_files(tmp_path) == before


def test_images_of_unknown_origin_are_not_gone_on_with(model, tmp_path):
    write_samples(model, tmp_path, [5, 6], **OPTIONS)
    (tmp_path / "samples.json").unlink()
    with pytest.raises(UserError, match=r"holds images, and no samples.json that says how they were made"):
        write_samples(model, tmp_path, [5, 6, 7], **OPTIONS)


def test_labels_of_another_model_s_samples_are_compared_too(model, tmp_path):
    write_samples(model, tmp_path, [5, 6], [1, 2], **OPTIONS)
    with pytest.raises(UserError, match="given_labels="):
        write_samples(model, tmp_path, [5, 6], [2, 1], **OPTIONS)


def test_random_labels_are_of_the_seed_alone_and_use_every_class(model):
    seeds = np.arange(400)
    rule, labels = choose_labels(model, seeds, "random")
    assert rule == "random"
    np.testing.assert_array_equal(choose_labels(model, seeds[::-1], "random")[1], labels[::-1])
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 15 and counts.max() < 70 and len(counts) == 10
    assert choose_labels(model, seeds[:3], 7) == ("class 7", pytest.approx([7, 7, 7]))
    assert choose_labels(model, seeds[:3], [1, 2, -1])[0] == "given"


@pytest.mark.parametrize("text", ["0-49999", "3,5,7-9", "7", "0-1,4294967295"])
def test_ranges_are_written_as_they_are_read(text):
    assert as_ranges(parse_integers("seeds", text)[::-1]) == text


def test_arrays_alone_are_gone_on_with_too(model, tmp_path, messages, caplog):
    """Nothing else stays, and what they hold is not made twice, whatever is asked for next."""
    for _ in range(2):
        write_samples(model, tmp_path, range(5), formats=["npz"], **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.json", "samples.npz"]
    assert "5 of 5 samples are there already" in caplog.text
    with np.load(tmp_path / "samples.npz") as arrays:
        images = arrays["arr_0"]
    write_samples(model, tmp_path, range(9), formats=["npz", "png"], **OPTIONS)
    assert "5 of 9 samples are there already" in caplog.text
    with np.load(tmp_path / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"][:5], images)
    np.testing.assert_array_equal(read_png(tmp_path / "000000/000003.png"), images[3])


def test_damaged_arrays_are_made_anew(model, tmp_path, messages, caplog):
    write_samples(model, tmp_path, range(5), formats=["npz"], **OPTIONS)
    sound = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(sound[:-40])
    write_samples(model, tmp_path, range(5), formats=["npz"], **OPTIONS)
    assert "samples.npz is damaged" in caplog.text
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1)


def sample_command(workdir: Path, out: Path, *flags: str) -> subprocess.Popen:
    fixed = [f"--workdir={workdir}", f"--out={out}", "--seeds=0-1999", "--format=png,npz", "--batch_size=32"]
    command = [sys.executable, "-m", "maskdit_jax.sample", *fixed, *flags]
    return subprocess.Popen(command, env=command_environment(), stdout=subprocess.DEVNULL)


@pytest.mark.processes
def test_two_thousand_samples_of_one_process_of_two_and_of_a_killed_one(run, tmp_path):
    """The same bytes; what a killed command has left is not made again."""
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    first = sample_command(run, killed)
    while len(list(killed.glob("*/*.png"))) < 300:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = {path: os.stat(path).st_mtime_ns for path in killed.glob("*/*.png")}
    assert 300 <= len(left) < 2000
    assert sample_command(run, killed).wait() == 0
    assert {path: os.stat(path).st_mtime_ns for path in left} == left

    assert sample_command(run, one).wait() == 0
    flags = two_process_flags()
    both = [sample_command(run, two, *flags, f"--process_id={i}") for i in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    expected = contents(one)
    assert len(expected) == 2001
    for folder in (two, killed):
        assert contents(folder) == expected


def contents(folder: Path) -> dict[str, bytes]:
    """Of the pictures, and of the arrays without the times that an archive notes."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/*.png")}
    with np.load(folder / "samples.npz") as arrays:
        return files | {"arrays": b"".join(arrays[name].tobytes() for name in ("arr_0", "arr_1", "seeds"))}
