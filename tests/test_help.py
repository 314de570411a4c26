"""What --help says: the defaults, and where the options are."""

import pytest
from tiny import call_tool

from maskdit_jax import doctor, main, sample
from maskdit_jax.distributed.hosts import check_devices
from maskdit_jax.errors import UserError


def help_of(entry, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        entry(*arguments)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_defaults_once_and_how_to_list_options(capsys, monkeypatch):
    train = help_of(main.main, capsys, ["--help"])
    assert "seconds to wait for all of them (default: 300)" in train
    assert "--config=digits --list_options lists all options" in train
    assert "(default: None)" not in train and "(default: False)" not in train
    words = help_of(sample.main, capsys, ["--help"])
    assert "such as 0-49999 or 3,5,7-9 (default: 0-63)" in words
    assert "of the run's checkpoints; default: the newest" in words and "newest (default" not in words
    assert "(default: 60)" in help_of(doctor.main, capsys, ["--help"])
    assert "that read (default: 4)" in help_of(call_tool, capsys, monkeypatch, "reference_stats", "--help")


def test_no_devices_is_one_line_whatever_jax_raises(monkeypatch):
    """An assertion of JAX's own where the plugin of JAX_PLATFORMS is not installed."""

    def devices():
        raise AssertionError

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"JAX_PLATFORMS=cuda: its plugin is not installed; .*'\.\[cuda12\]'"):
        check_devices()
