"""A run that goes on with other options: each is free, listed or refused."""

import pytest
from tiny import NUM_STEPS, REPORTED, all_files, arrays_of, difference, refusal, tiny_config, tiny_flags

from maskdit_jax import main
from maskdit_jax.config import ConfigDict, defaults, leaves
from maskdit_jax.errors import UserError
from maskdit_jax.methods import METHODS
from maskdit_jax.training.changes import AT_RESTART, FREE, LISTED, REFUSED, at_restart, check_changes

# Another value than the tiny run's, and what becomes of it.
CHANGES = {
    "seed": (1, REFUSED),
    "data.source": ("digits:0-8", REFUSED),
    "data.latent_scale": (0.5, REFUSED),
    "training.batch_size": (32, REFUSED),
    "ema.decay": (0.5, REFUSED),
    "ema.rule": ("warmup", REFUSED),
    "optimizer.b1": (0.5, REFUSED),
    "method.sigma_data": (0.6, REFUSED),
    "method.P_mean": (-1.0, REFUSED),
    "method.mae_coef": (0.2, REFUSED),
    "method.label_dropout": (0.2, REFUSED),
    "method.mask_ratio": (0.25, REFUSED),
    "init_from": ("elsewhere", REFUSED),
    "optimizer.learning_rate": (1e-4, LISTED),
    "optimizer.warmup_kimg": (1.0, LISTED),
    "optimizer.clip_norm": (1.0, LISTED),
    "optimizer.weight_decay": (0.1, LISTED),
    "training.num_steps": (99, LISTED),
    "compute.precision": ("bfloat16", LISTED),
    "compute.remat": ("full", FREE),
    "training.accumulate": (2, FREE),
    "mesh.fsdp": (8, FREE),
    "checkpoint.every_steps": (1, FREE),
    "report.preview_steps": (3, FREE),
    "evaluation.every_steps": (3, FREE),
    "sampling.cfg_scale": (3.0, FREE),
    "data.num_threads": (3, FREE),
    "data.max_unreadable": (3, FREE),
}


@pytest.fixture(scope="module")
def saved() -> ConfigDict:
    return tiny_config()


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_refused_listed_or_free(name, saved, messages, caplog):
    value, expected = CHANGES[name]
    overrides = {name: value} | ({"mesh.data": 1} if name == "mesh.fsdp" else {})
    changed = tiny_config(overrides)
    line = f"{name}={value}, before {leaves(saved)[name] or (repr('') if name == 'init_from' else 0)}"
    if expected == REFUSED:
        with pytest.raises(UserError, match=r"^runs/x would go on as another run: ") as refused:
            check_changes(saved, changed, "runs/x", allow=False)
        assert line in str(refused.value)
        assert "--allow_changes" in str(refused.value)
        check_changes(saved, changed, "runs/x", allow=True)
    else:
        check_changes(saved, changed, "runs/x", allow=False)
    assert (line in caplog.text) == (expected != FREE)
    assert ("changed since the checkpoint: " in caplog.text) == (expected != FREE)


def test_every_option_has_a_class_and_the_table_names_no_other():
    """An option that the table leaves out is refused: of a method all are."""
    names = {name for method in METHODS for name in leaves(defaults(method))}
    assert not {key for key in AT_RESTART if not any((n + ".").startswith(key + ".") for n in names)}
    assert {at_restart(name) for name in names if name.startswith(("method.", "ema."))} == {REFUSED}
    sections = {name.partition(".")[0] for name in names if "." in name}
    mixed = {"data", "compute", "training", "optimizer"}
    assert {s for s in sections - mixed if s in AT_RESTART} == {
        *("mesh", "checkpoint", "report", "evaluation", "sampling")
    }


def test_an_option_that_the_run_did_not_have_yet_counts_as_its_default(saved):
    older = ConfigDict(saved.to_dict())
    del older["init_weights"]
    check_changes(older, saved, "runs/x", allow=False)
    with pytest.raises(UserError, match="init_weights=ema, before both"):
        check_changes(older, tiny_config({"init_weights": "ema"}), "runs/x", allow=False)


@pytest.mark.slow
def test_the_command_refuses_another_seed_and_goes_on_where_it_is_allowed(run, capsys):
    before = all_files(run)
    flags = [f"--workdir={run}", *tiny_flags(REPORTED), "--config.seed=1"]
    assert f"{run} would go on as another run: seed=1, before 0; " in refusal(capsys, main.main, flags)
    assert all_files(run) == before
    main.main([*flags, "--allow_changes"])
    said = capsys.readouterr().out
    assert "changed since the checkpoint: seed=1, before 0\n" in said
    assert "already finished" in said


@pytest.mark.slow
def test_clipping_switched_on_and_off_changes_no_bit_where_it_does_not_act(run, tmp_path):
    """Switched at restarts, as the program itself advises after divergence."""
    for steps, clip_norm in ((2, 0), (4, 1e6), (NUM_STEPS, 0)):
        options = {"training.num_steps": steps, "optimizer.clip_norm": clip_norm}
        main.main([f"--workdir={tmp_path}", *tiny_flags(options)])
    assert difference(arrays_of(tmp_path), arrays_of(run)) == 0
