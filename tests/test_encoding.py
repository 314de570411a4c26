"""Images → shards → training: resumable after any kill, indifferent to corrupt images, the real commands."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from PIL import Image

from maskdit_jax import load_autoencoder
from maskdit_jax.data.image_sets import open_image_set
from maskdit_jax.data.images import centre_square, to_float
from maskdit_jax.data.shards import open_shards

ROOT = Path(__file__).parent.parent
RESOLUTION = 32


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A small autoencoder of the published kind: 8 times smaller latents of four channels."""
    torch.manual_seed(0)
    model = TorchAutoencoder(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    path = tmp_path_factory.mktemp("vae") / "small"
    model.save_pretrained(path)
    return path


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
def environment(tmp_path_factory) -> dict[str, str]:
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


@pytest.fixture(scope="module")
def uninterrupted(folder, vae, environment, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("encoded") / "latents"
    done = execute(encode(f"folder:{folder}", vae, out), environment)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_moments_are_the_autoencoders_of_image_and_mirror_image(uninterrupted, folder, vae):
    metadata, shards = open_shards(uninterrupted[0])
    assert [len(s.labels) for s in shards] == [7, 8, 8, 8, 8, 8, 8, 3]
    images, autoencoder = open_image_set(f"folder:{folder}"), load_autoencoder(vae)
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


def test_progress_and_corrupt_images_are_reported(uninterrupted):
    out = uninterrupted[1]
    assert re.search(r"warning: skipped .*ant/07\.jpg: not a readable image", out)
    assert re.search(r"60 images · [\d,.]+ images/s · 0m00s left", out)
    assert re.search(r"encoded 58 images, each with its mirror image, to .*: 8 shards, 2 images skipped", out)


def test_killed_five_times_ends_with_the_same_bytes(uninterrupted, folder, vae, environment, tmp_path):
    """SIGKILL at random moments after work has begun; the parts of two processes in one folder."""
    rng, out = random.Random(0), tmp_path / "latents"
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
    expected, found = contents(uninterrupted[0]), contents(out)
    assert {name for name in found if not name.endswith(".partial")} == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def test_altered_shard_is_made_again(uninterrupted, folder, vae, environment, tmp_path):
    out = tmp_path / "latents"
    out.mkdir()
    for name, content in contents(uninterrupted[0]).items():
        (out / name).write_bytes(content)
    shard = next(out.glob("*.moments.npy"))
    shard.write_bytes(shard.read_bytes()[:-3])
    done = execute(encode(f"folder:{folder}", vae, out), environment)
    assert "7 of 8 shards are complete and sound" in done.stdout
    assert contents(out) == contents(uninterrupted[0])


def test_another_encoding_too_many_corrupt_images_and_bad_flags_are_refused(
    uninterrupted, folder, vae, environment, tmp_path
):
    out = uninterrupted[0]
    before = contents(out)
    for flags, message in (
        ([f"--out={out}", "--resolution=64"], "holds another encoding: resolution=64 here, 32 there"),
        ([f"--out={tmp_path / 'a'}", "--resolution=30"], "resolution=30 must be a multiple of 8"),
        ([f"--out={tmp_path / 'b'}", "--part=2/2"], "part=2/2: expected I/N"),
        ([f"--out={tmp_path / 'c'}", "--max_corrupt=0"], "1 images cannot be read, more than max_corrupt=0"),
    ):
        done = execute(encode(f"folder:{folder}", vae, out, *flags), environment)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
        assert message in done.stderr
    assert contents(out) == before


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
        data.source=latents:{tmp_path / "in256"} vae={vae} model.image_size=4 model.size=custom
        model.patch_size=2 model.hidden_size=32 model.depth=1 model.num_heads=2
        model.decoder_hidden_size=16 model.decoder_depth=1 model.decoder_num_heads=2
        model.precision=float32 training.batch_size=8 checkpoint.every_steps=2 report.every_steps=1
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
        with Image.open(tmp_path / f"samples/{seed:06d}.png") as png:
            assert (png.size, png.mode) == ((RESOLUTION, RESOLUTION), "RGB")
    assert json.loads((tmp_path / "in256/stats.json").read_text())["num_images"] == 15


def test_tfds_without_its_archives_says_where_they_belong(vae, environment, tmp_path):
    environment = environment | {"TFDS_DATA_DIR": str(tmp_path / "tfds")}
    done = execute(encode("tfds:imagenet2012", vae, tmp_path / "in256"), environment)
    assert done.returncode == 2
    assert "tfds:imagenet2012 cannot be prepared" in done.stderr
    assert "manual" in done.stderr
    done = execute(encode("tfds:nothing_like_it", vae, tmp_path / "in256"), environment)
    assert done.stderr == "error: tfds:nothing_like_it: tensorflow_datasets knows no such data set\n"
