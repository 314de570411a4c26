"""Checkpoints: which are kept, which is chosen, and what is said of those that are not."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config

from maskdit_jax import load as load_model
from maskdit_jax.errors import UserError
from maskdit_jax.files import locked
from maskdit_jax.training.build import build
from maskdit_jax.training.checkpoint import Checkpoints, DamagedError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with steps 3, 4, 8 and 9, whose weights are as many times the first ones."""
    config = tiny_config()
    state = build(config).start(None)
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, keep=2, keep_every_steps=4)
    for step in range(3, 10):
        ema_params = jax.tree.map(lambda x, step=step: x * step, state.params)
        saved = state._replace(step=np.int32(step), ema_params=ema_params)
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
        model.with_weights("params")


def test_folder_is_locked_while_a_run_writes_and_free_after(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is being written by pid"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("pid ")
    assert list(tmp_path.iterdir()) == []
