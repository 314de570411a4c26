"""Checkpoints: which are kept, which is chosen, and what is said of those that are not."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from readers import READERS
from tiny import SAVE_EVERY, steps_of, tiny_config, tiny_flags

from maskdit_jax import load as load_model
from maskdit_jax import main
from maskdit_jax.api import other_weights
from maskdit_jax.errors import UserError
from maskdit_jax.files import locked
from maskdit_jax.finish import finish
from maskdit_jax.training.build import build
from maskdit_jax.training.checkpoint import Checkpoints, DamagedError, StructureError
from maskdit_jax.training.optimizer import without_clip
from maskdit_jax.training.report import Reporter


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with steps 3, 4, 8 and 9, whose weights are as many times the first ones."""
    config = tiny_config()
    state = build(config).start(None)
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, keep=2, keep_every_steps=4)
    for step in (3, 4, 8, 9):
        ema_params = jax.tree.map(lambda x, step=step: x * step, state.params)
        saved = state._replace(step=np.int32(step), ema={"ema": ema_params})
        checkpoints.save(saved, {"config": config.to_dict(), "items_consumed": 7 * step, "seconds": 1.5})
    assert checkpoints.settle() == ""
    checkpoints.close()
    return workdir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def size_of(model) -> float:
    return float(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(jax.device_get(model.params)))))


def test_newest_are_kept_and_every_fourth_for_good(run):
    assert Checkpoints(run).steps == [4, 8, 9]


@pytest.mark.parametrize("notes", [b'{"commit_timestamp_nsecs": "x"}', b"[" * 100_000, b"\xff", b""])
def test_what_orbax_notes_of_a_step_may_be_damaged(notes, copy):
    """It would otherwise hide every step of the run."""
    (copy / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_bytes(notes)
    assert load_model(copy).origin.step == 9
    checkpoints = Checkpoints(copy, keep=1)
    assert checkpoints.steps == [4, 8, 9]
    checkpoints.set_aside_after(8)
    assert checkpoints.steps == [4, 8]


def test_sampling_reads_the_ema_alone(copy):
    """Nothing else of the checkpoint needs to be there."""
    expected = size_of(load_model(copy))
    for item in ("opt_state", "counters", "params"):
        shutil.rmtree(copy / "checkpoints" / "9" / item)
    model = load_model(copy)
    assert model.origin.step == 9
    assert size_of(model) == expected


def test_newest_healthy_step_is_loaded_and_the_damaged_one_reported(copy, caplog):
    expected = size_of(load_model(copy)) / 9 * 8
    for file in (copy / "checkpoints" / "9" / "ema_params" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "maskdit_jax"):
        model = load_model(copy)
    assert model.origin.step == 8
    assert size_of(model) == pytest.approx(expected, rel=1e-6)
    assert f"passed over: checkpoint 9 in {copy / 'checkpoints'} is damaged: ema_params: " in caplog.text
    assert sorted(p.name for p in copy.iterdir()) == ["checkpoints"]  # who only reads moves nothing


def test_any_step_that_is_kept_is_loaded_and_a_damaged_one_not_passed_over(copy):
    assert size_of(load_model(copy, step=4)) == pytest.approx(size_of(load_model(copy)) / 9 * 4, rel=1e-6)
    with pytest.raises(UserError, match=r"step=3: .* holds the steps 4, 8, 9$"):
        load_model(copy, step=3)
    shutil.rmtree(copy / "checkpoints" / "8" / "ema_params")
    with pytest.raises(DamagedError, match=r"checkpoint 8 in .* is damaged: ema_params: "):
        load_model(copy, step=8)


@pytest.fixture(scope="module")
def fresh():
    """A run's configuration, the shapes of its state, and the state before its first step."""
    config = tiny_config()
    training = build(config)
    return config, training.state_shapes, training.start(None)


def saved_and_restored(state, workdir, config, shapes):
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(state, {"config": config.to_dict(), "items_consumed": 7, "seconds": 1.5})
    assert checkpoints.settle() == ""
    return checkpoints.restore(int(state.step), checkpoints.meta(int(state.step)), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("older", [lambda chain: chain, without_clip], ids=["clipped", "not"])
def test_state_saved_before_clipping_was_always_in_it_is_read(older, fresh, tmp_path):
    """Then it was there only where a run clipped."""
    config, shapes, state = fresh
    restored = saved_and_restored(state._replace(opt_state=older(state.opt_state)), tmp_path, config, shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("item", "other", "expected"),
    [
        pytest.param(
            "opt_state",
            optax.trace(0.9).init,
            r"1\.0\.count is missing, expected int32\[\]",
            marks=pytest.mark.slow,
        ),
        (
            "params",
            lambda params: params | {"more": np.zeros(3, "f")},
            r"more is float32\[3\], expected none",
        ),
    ],
    ids=["optimizer", "network"],
)
def test_state_of_other_arrays_is_called_so_and_not_damaged(item, other, expected, fresh, tmp_path):
    config, shapes, state = fresh
    saved = state._replace(**{item: other(state.params)})
    with pytest.raises(StructureError, match=rf"checkpoint 0 in .* is of another .*: {item}: {expected}; "):
        saved_and_restored(saved, tmp_path, config, shapes)


@pytest.mark.slow
def test_compressed_checkpoints_of_before_load(run, tmp_path, monkeypatch):
    meta = Checkpoints(run).meta(9)
    model = load_model(run)
    older = Checkpoints(tmp_path, keep=1)
    older._manager = ocp.CheckpointManager(older.folder, options=older._options)
    monkeypatch.setattr(ocp.args, "PyTreeSave", ocp.args.StandardSave)
    older.save_weights(9, {"ema_params": model.params}, {k: v for k, v in meta.items() if k != "digests"})
    older.close()

    def bytes_on_disk(folder):
        files = (folder / "checkpoints/9/ema_params").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    assert bytes_on_disk(tmp_path) < bytes_on_disk(run)
    assert size_of(load_model(tmp_path)) == size_of(model)
    assert Checkpoints(tmp_path).meta(9)["digests"]["ema_params"] == meta["digests"]["ema_params"]


def test_checkpoint_without_digests_is_not_trusted(copy):
    file = copy / "checkpoints" / "9" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["digests"]
    file.write_text(json.dumps(meta))
    with pytest.raises(DamagedError, match=r"checkpoint 9 in .* is damaged: meta: .* without digests"):
        Checkpoints(copy).meta(9)


def test_step_that_is_gone_is_not_mixed_with_another(copy):
    model = load_model(copy)
    shutil.rmtree(copy / "checkpoints" / "9")
    with pytest.raises(UserError, match="no longer holds step 9"):
        other_weights(model, "params")


def test_folder_is_locked_while_a_run_writes_and_free_after(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is being written by pid"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("pid ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "damaged"])
def test_a_file_in_place_of_a_folder_stops_the_run_before_it_begins(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is in the way, where a folder belongs"):
        Checkpoints(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_a_step_that_is_on_disk_has_its_preview(tmp_path, monkeypatch):
    """However early the run is killed after that: here the moment the checkpoint is complete."""

    class Killed(BaseException):
        """Stands for the end of the process, which nothing in it could catch."""

    save = Checkpoints.save

    def save_and_die(checkpoints, state, meta):
        save(checkpoints, state, meta)
        assert checkpoints.settle() == ""
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        main.main([f"--workdir={tmp_path}", *tiny_flags({"report.preview_steps": SAVE_EVERY})])
    assert steps_of(tmp_path) == [SAVE_EVERY]
    assert [p.name for p in (tmp_path / "previews").iterdir()] == [f"step_{SAVE_EVERY:08d}.png"]


def test_a_preview_that_cannot_be_written_is_given_up(tmp_path, messages, caplog):
    """A file stands where its folder belongs."""
    (tmp_path / "previews").write_text("mine")
    options = {"first_step": 0, "num_steps": 1, "batch_size": 1, "every_steps": 1}
    Reporter(tmp_path, **options).grid(1, np.zeros((2, 2, 1), np.uint8))
    assert "previews/step_00000001.png could not be written: " in caplog.text
    assert (tmp_path / "previews").read_text() == "mine"


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b'{"step": "9"}', b'{"num_samples": []}', b"[" * 100_000, b"\xff"]
)
def test_damaged_card_is_passed_over_at_the_end_of_a_run(damage, tmp_path, messages, caplog):
    """What cannot be printed is neither a card nor a reason to fail."""
    card = READERS["card"].good(tmp_path)
    card.write_bytes(damage)
    finish(card.parent)
    assert "card.json" in caplog.text
    assert "it is passed over" in caplog.text
    assert "finished at step 3" in caplog.text
