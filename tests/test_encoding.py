"""Images → shards → training: resumable after any kill, indifferent to corrupt images, the real commands."""

import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdit_jax import Autoencoder, load_autoencoder
from maskdit_jax.data.encoding import Encoding, encode_images
from maskdit_jax.data.image_sets import open_image_set
from maskdit_jax.data.images import centre_square, to_float
from maskdit_jax.data.shards import open_shards
from maskdit_jax.errors import UserError
from maskdit_jax.log import log

ROOT = Path(__file__).parent.parent
RESOLUTION = 32


def jpeg(rng: np.random.Generator, height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """58 images of two classes and two that cannot be read."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("ant", 31), ("bee", 29)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i:02d}.jpg").write_bytes(jpeg(rng))
    (root / "ant/07.jpg").write_bytes(b"not an image")
    (root / "bee/28.jpg").write_bytes(jpeg(rng)[:200])
    return root


@pytest.fixture(scope="module")
def autoencoder(vae) -> Autoencoder:
    return load_autoencoder(vae)


HOW = Encoding(RESOLUTION, shard_size=8, batch_size=4, num_threads=2)


def encode_here(folder: Path, autoencoder: Autoencoder, out: Path, how: Encoding = HOW) -> None:
    encode_images(open_image_set(f"folder:{folder}"), autoencoder, out, how, source=f"folder:{folder}")


@pytest.fixture(scope="module")
def encoded(folder, autoencoder, tmp_path_factory) -> tuple[Path, str]:
    """The images encoded in this process, and what was said."""
    out, said = tmp_path_factory.mktemp("encoded") / "latents", io.StringIO()
    handler, level = logging.StreamHandler(said), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    encode_here(folder, autoencoder, out)
    log.removeHandler(handler)
    log.setLevel(level)
    return out, said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_moments_are_the_autoencoders_of_image_and_mirror_image(encoded, folder, autoencoder):
    metadata, shards = open_shards(encoded[0])
    assert [len(s.labels) for s in shards] == [7, 8, 8, 8, 8, 8, 8, 3]
    images = open_image_set(f"folder:{folder}")
    readable = [i for i in range(60) if not images.name(i).endswith(("ant/07.jpg", "bee/28.jpg"))]
    squares = np.stack([centre_square(images.load(i)[0], RESOLUTION) for i in readable])
    moments = np.concatenate([s.moments for s in shards])
    assert moments.dtype == np.float16
    for view, pixels in enumerate((squares, squares[:, :, ::-1])):
        expected = autoencoder.encode(to_float(pixels))
        np.testing.assert_allclose(moments[:, view].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    labels = np.concatenate([s.labels for s in shards])
    np.testing.assert_array_equal(labels, [images.load(i)[1] for i in readable])
    stats = metadata["stats"]
    assert stats["count_per_class"] == {"0": 30, "1": 28}
    assert [Path(name).name for name in stats["skipped"]] == ["07.jpg", "28.jpg"]
    assert metadata["autoencoder"] == autoencoder.sha256


def test_progress_and_corrupt_images_are_reported(encoded):
    said = encoded[1]
    assert re.search(r"warning: skipped .*ant/07\.jpg: not a readable image", said)
    assert re.search(r"60 images · [\d,.]+ images/s · 0m00s left", said)
    assert re.search(
        r"encoded 58 images, each with its mirror image, to .*: 8 shards, 2 images skipped", said
    )


def test_altered_shard_and_one_with_a_damaged_report_are_made_again(
    encoded, folder, autoencoder, tmp_path, messages, caplog
):
    out = copied(encoded[0], tmp_path / "latents")
    shards = sorted(out.glob("*.moments.npy"))
    shards[0].write_bytes(shards[0].read_bytes()[:-3])
    (out / "shard-00003-of-00008.json").write_text('{"sha256": [1]}')
    encode_here(folder, autoencoder, out)
    assert "6 of 8 shards are complete and sound" in caplog.messages
    assert contents(out) == contents(encoded[0])


DAMAGED_SETTINGS = {
    "no JSON": b"hello",
    "binary": b"\xff\x00",
    "empty": b"",
    "a list": b"[]",
    "nested": b"[" * 10**5,
    "other types": b'{"resolution": [], "batch_size": null}',
}


@pytest.mark.parametrize("damage", DAMAGED_SETTINGS.values(), ids=DAMAGED_SETTINGS)
def test_damaged_settings_of_an_encoding_are_refused_in_one_line(
    encoded, folder, autoencoder, damage, tmp_path
):
    out = copied(encoded[0], tmp_path / "latents")
    (out / "encoding.json").write_bytes(damage)
    before = contents(out)
    with pytest.raises(UserError, match="choose a new folder") as refused:
        encode_here(folder, autoencoder, out)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 64}, "holds another encoding: resolution=64 here, 32 there"),
        ({"resolution": 30}, "resolution=30 must be a multiple of 8"),
        ({"part": (2, 2)}, "part=2/2: expected I/N"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; known: float16, float32"),
    ],
)
def test_another_encoding_and_settings_that_cannot_be_are_refused(
    encoded, folder, autoencoder, changes, message
):
    before = contents(encoded[0])
    with pytest.raises(UserError, match=message):
        encode_here(folder, autoencoder, encoded[0], HOW._replace(**changes))
    assert contents(encoded[0]) == before


def test_too_many_corrupt_images_end_an_encoding(folder, autoencoder, tmp_path):
    with pytest.raises(UserError, match="1 image cannot be read, more than max_corrupt=0: mend or remove"):
        encode_here(folder, autoencoder, tmp_path / "latents", HOW._replace(max_corrupt=0))
    assert not (tmp_path / "latents/metadata.json").exists()


# The command


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def encode(source: str, vae: Path, out: Path, *flags: str) -> list[str]:
    command = [sys.executable, str(ROOT / "tools/encode_latents.py"), f"--source={source}", f"--vae={vae}"]
    sizes = [f"--resolution={RESOLUTION}", "--shard_size=8", "--batch_size=4", "--num_threads=2"]
    return [*command, *sizes, f"--out={out}", *flags]


def execute(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.processes
def test_killed_five_times_ends_with_the_same_bytes(folder, vae, environment, tmp_path):
    """SIGKILL at random moments after work has begun; the parts of two processes in one folder."""
    rng, out, whole = random.Random(0), tmp_path / "latents", tmp_path / "uninterrupted"
    done = execute(encode(f"folder:{folder}", vae, whole), environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"encoded 58 images, .*: 8 shards, 2 images skipped, latents rms [\d.]+\n$", done.stdout)
    for attempt in range(5):
        command = encode(f"folder:{folder}", vae, out, f"--part={attempt % 2}/2")
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        before = len(list(out.iterdir())) if out.is_dir() else 0
        while process.poll() is None and len(list(out.glob("*"))) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    for part in (0, 1):
        done = execute(encode(f"folder:{folder}", vae, out, f"--part={part}/2"), environment)
        assert done.returncode == 0, done.stderr
    expected, found = contents(whole), contents(out)
    assert {name for name in found if not name.endswith(".partial")} == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_imagenet_archives(folder: Path, synsets: list[str]) -> None:
    """Archives as ImageNet's: of each class a tar within the tar; here five images each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in synsets:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for i in range(5):
                    add_to_tar(images, f"{synset}_{i}.JPEG", jpeg(rng))
            add_to_tar(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(1, 4):
            add_to_tar(archive, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(rng))


@pytest.mark.slow
@pytest.mark.processes
def test_rehearsal_from_imagenets_archives_to_sampled_pngs(vae, environment, tmp_path):
    """The real TFDS imagenet2012 builder → encode → main on in256 → resume → sample → decode → PNG."""
    synsets = ["n01440764", "n01443537", "n15075141"]
    write_imagenet_archives(tmp_path / "tfds/downloads/manual", synsets)
    environment = environment | {"TFDS_DATA_DIR": str(tmp_path / "tfds")}
    done = execute(encode("tfds:imagenet2012", vae, tmp_path / "in256"), environment)
    assert done.returncode == 0, done.stderr
    metadata, shards = open_shards(tmp_path / "in256")
    assert (metadata["num_classes"], metadata["image_size"], metadata["channels"]) == (1000, 4, 4)
    assert metadata["stats"]["count_per_class"] == {"0": 5, "1": 5, "999": 5}
    assert sum(len(shard.labels) for shard in shards) == 15

    small = f"""
        data.source=latents:{tmp_path / "in256"} vae={vae} data.image_size=4 method.network.size=custom
        method.network.patch_size=2 method.network.hidden_size=32 method.network.depth=1
        method.network.num_heads=2 method.network.decoder_hidden_size=16 method.network.decoder_depth=1
        method.network.decoder_num_heads=2
        compute.precision=float32 training.batch_size=8 checkpoint.every_steps=2 report.every_steps=1
        report.tensorboard=false report.preview_rows=2 report.preview_columns=2 sampling.num_steps=2
    """
    train = [sys.executable, "-m", "maskdit_jax.main", f"--config={ROOT / 'configs/in256.py'}"]
    train += [f"--workdir={tmp_path / 'run'}", *(f"--config.{flag}" for flag in small.split())]
    for steps, message in ((3, "finished at step 3"), (5, "resumed at step 3")):
        done = execute([*train, f"--config.training.num_steps={steps}"], environment)
        assert done.returncode == 0, done.stderr
        assert message in done.stdout
    assert "finished at step 5" in done.stdout

    sampler = [sys.executable, "-m", "maskdit_jax.sample", f"--workdir={tmp_path / 'run'}"]
    done = execute([*sampler, f"--out={tmp_path / 'samples'}", "--seeds=0-3", "--labels=999"], environment)
    assert done.returncode == 0, done.stderr
    for seed in range(4):
        with Image.open(tmp_path / f"samples/000000/{seed:06d}.png") as png:
            assert (png.size, png.mode) == ((RESOLUTION, RESOLUTION), "RGB")
    assert json.loads((tmp_path / "in256/stats.json").read_text())["num_images"] == 15


@pytest.mark.processes
def test_tfds_without_its_archives_says_where_they_belong(vae, environment, tmp_path):
    environment = environment | {"TFDS_DATA_DIR": str(tmp_path / "tfds")}
    done = execute(encode("tfds:imagenet2012", vae, tmp_path / "in256"), environment)
    assert done.returncode == 2
    assert "tfds:imagenet2012 cannot be prepared" in done.stderr
    assert "manual" in done.stderr
    done = execute(encode("tfds:nothing_like_it", vae, tmp_path / "in256"), environment)
    assert done.stderr == "error: tfds:nothing_like_it: tensorflow_datasets knows no such data set\n"
