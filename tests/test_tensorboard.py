"""TensorBoard's files: what they hold, and what is not needed to write them."""

import sys

import numpy as np
import pytest

from maskdit_jax.errors import UserError
from maskdit_jax.training.tensorboard import TensorBoard


def test_events_are_written_without_tensorflow(tmp_path, monkeypatch):
    """An import of it would raise; TensorBoard's own reader checks the records' sums."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    board = TensorBoard(tmp_path / "tensorboard")
    board.write_scalars(7, {"loss": 0.5, "rate": 2.0})
    board.write_image(8, "samples", np.zeros((2, 3, 1), np.uint8))
    board.write_text(9, "config", "# a")
    board.close()
    found = [(event.step, v.tag, v.metadata.plugin_data.plugin_name, v.tensor) for event, v in read(tmp_path)]
    assert [row[:3] for row in found] == [
        (7, "loss", "scalars"),
        (7, "rate", "scalars"),
        (8, "samples", "images"),
        (9, "config", "text"),
    ]
    assert [list(row[3].float_val) for row in found[:2]] == [[0.5], [2.0]]
    width, height, png = found[2][3].string_val
    assert (width, height, png[:4]) == (b"3", b"2", b"\x89PNG")
    assert list(found[3][3].string_val) == [b"# a"]


def test_a_file_in_place_of_its_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match="tensorboard is in the way, where a folder belongs"):
        TensorBoard(tmp_path / "tensorboard")


def read(workdir):
    """Each value of a run's file with its event."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    (file,) = (workdir / "tensorboard").iterdir()
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
        except Exception:  # at the end of the file
            return
        event = event_pb2.Event.FromString(reader.record())
        yield from ((event, value) for value in event.summary.value)
