"""A method is one file: a toy goes through the public commands, and nothing else knows of it."""

import numpy as np
import pytest
from tiny import ROOT, arrays_of, call_tool, difference, refusal, steps_of
from toy import Toy

import maskdit_jax
from maskdit_jax import UserError, main, sample
from maskdit_jax.config import ConfigDict
from maskdit_jax.methods import METHODS

CONFIG = """
from configs import base

def get_config():
    config = base.get_config("toy")
    config.data.update(source="digits", space="pixels", image_size=8, channels=1, num_classes=0)
    config.training.update(num_steps=8, batch_size=16)
    config.checkpoint.every_steps = 4
    config.report.update(every_steps=4, tensorboard=False, preview_steps=0, preview_rows=2, preview_columns=2)
    config.sampling.num_steps = 3
    return config
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Flags that choose the toy, which is known for as long as a test."""
    monkeypatch.setitem(METHODS, "toy", Toy)
    file = tmp_path / "toy_config.py"
    file.write_text(CONFIG)
    return f"--config={file}"


@pytest.mark.slow
def test_a_toy_method_trains_resumes_and_samples_and_is_not_exported(config, tmp_path, monkeypatch, capsys):
    """Under 80 lines; stopped and resumed bit-identical; its own metric is reported; one line on export."""
    assert len((ROOT / "tests" / "toy.py").read_text().splitlines()) < 80
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main.main([config, f"--workdir={whole}", "--config.method.t_max=0.9"])
    said = capsys.readouterr().out
    assert "largest_t 0.4" in said
    assert "finished at step 8" in said
    main.main([config, f"--workdir={resumed}", "--config.method.t_max=0.9", "--config.training.num_steps=4"])
    main.main([config, f"--workdir={resumed}", "--config.method.t_max=0.9"])
    assert "resumed at step 4" in capsys.readouterr().out
    assert difference(arrays_of(resumed), arrays_of(whole)) == 0

    for solver in ("heun", "euler"):
        out = tmp_path / solver
        sample.main(
            [f"--workdir={whole}", f"--out={out}", "--seeds=0-4", "--format=npz", f"--solver={solver}"]
        )
        samples = np.load(out / "samples.npz")["arr_0"]
        assert samples.shape == (5, 8, 8, 1)
        assert len(np.unique(samples.reshape(5, -1), axis=0)) == 5
    exported = tmp_path / "export" / "model.safetensors"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call_tool(monkeypatch, "export_pytorch", f"--workdir={whole}", f"--out={exported}")
    assert stopped.value.code == 2
    assert "toy has no table of PyTorch names" in capsys.readouterr().err
    assert not exported.parent.exists()
    assert steps_of(whole)[-1] == 8


def test_another_network_or_option_of_the_toy_is_refused_by_name(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    line = refusal(capsys, main.main, [config, f"--workdir={workdir}", "--config.method.t_max=2"])
    assert "method.t_max=2.0" in line
    main.main([config, f"--workdir={workdir}", "--config.training.num_steps=1"])
    line = refusal(
        capsys, main.main, [config, f"--workdir={workdir}", "--config.method.network.hidden_size=8"]
    )
    assert "method.network.hidden_size=8 here, 32 there" in line


@pytest.mark.slow
def test_python_trains_as_the_command_does(config, tmp_path):
    """The same bits; an option that does not exist is refused before anything is written."""
    file = config.removeprefix("--config=")
    main.main([config, f"--workdir={tmp_path / 'command'}", "--config.training.num_steps=4"])
    ours = maskdit_jax.load_config(file)
    ours.training.num_steps = 4
    maskdit_jax.train(ours, tmp_path / "python")
    assert difference(arrays_of(tmp_path / "python"), arrays_of(tmp_path / "command")) == 0
    ours = ConfigDict(ours.to_dict())  # unlike the one before, not locked
    ours.optimizer.lr = 1.0
    with pytest.raises(UserError, match=r"there is no option 'optimizer\.lr'; nearest: optimizer\."):
        maskdit_jax.train(ours, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
