"""A whole run, for the command and for Python: agreement on its options, training, samples and card."""

import contextlib
import math
from pathlib import Path

import jax

from maskdit_jax.config import ConfigDict, resolve
from maskdit_jax.config_file import check_known_options
from maskdit_jax.config_file import load as load_config
from maskdit_jax.distributed.peers import Peers
from maskdit_jax.files import locked
from maskdit_jax.finish import finish
from maskdit_jax.training import loop
from maskdit_jax.training.agreement import agree, check_same_folder, data_identity, run_options, this_process


def train(
    config: ConfigDict | str | Path,
    workdir: str | Path,
    *,
    allow_changes: bool = False,
    peers: Peers | None = None,
) -> None:
    """Train what a configuration describes in a folder, up to its samples and card; go on if it has begun.

    Args:
      config: such as `load_config("digits")`, changed as wished; or the name or file of a recipe.
      workdir: folder of the run: `load`, `write_samples` and `export_torch` take it.
      allow_changes: go on also with options that make it another run.
      peers: the other processes of the run, where the command has joined them.

    Raises:
      UserError: an option, the data or the folder cannot be used, or too many steps were not finite.
      SystemExit: with the code 75, after SIGTERM or Ctrl-C, when the step is saved.
    """
    if isinstance(config, ConfigDict):
        config = ConfigDict(config.to_dict())
        check_known_options(config, "ConfigDict")
    else:
        config = load_config(str(config))
    config, workdir = resolve(config, device_count=jax.device_count()), Path(workdir)
    # Before the folder is touched: a refused run leaves nothing behind.
    command = {"the command": "train", "--allow_changes": allow_changes}
    agree(command | this_process() | run_options(config, workdir))
    check_same_folder("--workdir", workdir)
    source = loop.open_configured_source(config)
    agree(data_identity(config, source))
    with locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        loop.train(
            config, workdir, source, peers or Peers({}, math.inf, math.inf), allow_changes=allow_changes
        )
        finish(workdir)
