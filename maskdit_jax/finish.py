"""The end of a run: grid of samples and evaluation card of its newest checkpoint."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax

from maskdit_jax.api import load
from maskdit_jax.config import ConfigDict
from maskdit_jax.data.images import save_png
from maskdit_jax.distributed.hosts import from_first
from maskdit_jax.errors import UserError, first_line
from maskdit_jax.evaluation.card import describe_card, evaluation_card
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.log import log
from maskdit_jax.options import is_a
from maskdit_jax.training.checkpoint import FOLDER, open_run
from maskdit_jax.training.report import sample_grid
from maskdit_jax.training.sinks import Sinks, open_boards

CARD, GRID = "card.json", "samples.png"


def finish(workdir: Path) -> None:
    """Sample grid and, if the run asks for one, evaluation card of the run's newest checkpoint.

    Only what is missing or older than the checkpoint is made; the card is printed in any case. All
    processes of the run sample, the first one writes.
    """
    checkpoints = open_run(workdir)
    step, meta, _ = checkpoints.newest_healthy(lambda *_: None)
    checkpoints.close()
    card_file, grid_file = workdir / CARD, workdir / GRID
    card = _read_card(card_file) if card_file.exists() else {}
    config = ConfigDict(meta["config"])
    wanted = config.evaluation.num_samples
    saved_at = (workdir / FOLDER / str(step)).stat().st_mtime
    grid_is_new = grid_file.exists() and grid_file.stat().st_mtime >= saved_at
    if from_first(not grid_is_new or bool(wanted and card.get("step") != step)):
        model = load(workdir)
        grid = sample_grid(model)
        card = evaluation_card(model, wanted) if wanted else {}
        if jax.process_index() > 0:
            return
        save_png(grid_file, grid)
        if wanted:
            card = {
                "step": step,
                **card,
                "training_s": meta["seconds"],
                "training_images_per_s": meta["items_consumed"] / meta["seconds"],
            }
            with appears_whole(card_file) as partial:
                partial.write_text(json.dumps(card, indent=1))
        with contextlib.closing(Sinks(open_boards(workdir, config))) as boards:
            boards.image(step, "final_samples", grid)
            boards.scalars(step, _numbers(card))
    if card:
        log.info(describe_card(card))
    log.info(
        f"finished at step {step:,}: samples in {grid_file}" + (f", card in {card_file}" if card else "")
    )


def _numbers(card: dict[str, Any], prefix: str = "card") -> dict[str, float]:
    """Those of a card by name, such as card/guided/frechet_distance."""
    numbers: dict[str, float] = {}
    for name, value in card.items():
        if isinstance(value, dict):
            numbers |= _numbers(value, f"{prefix}/{name}")
        elif is_a(value, float):
            numbers[f"{prefix}/{name}"] = float(value)
    return numbers


def _read_card(file: Path) -> dict[str, Any]:
    """The card that is there, for it to be printed again; empty, with a warning, where it is damaged."""
    try:
        card = read_json(file)
        describe_card(card)
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = error if isinstance(error, UserError) else f"{file} is no card: {first_line(error, 100)}"
        log.warning(f"warning: {problem}; it is passed over, and made anew where the run asks for one")
        return {}
    return card
