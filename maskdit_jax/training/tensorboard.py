"""Files for TensorBoard, written without TensorFlow, which takes seconds to import."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskdit_jax.data.images import save_png
from maskdit_jax.errors import UserError
from maskdit_jax.files import check_folder


class TensorBoard:
    """One file of events in `folder`: numbers, pictures and texts by name and step.

    What a call writes can be read when it returns.

    Raises:
      UserError: the folder cannot be one, or TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        check_folder(folder)
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                f"report.tensorboard=true needs {error.name}: pip install tensorboard, or pass "
                "--config.report.tensorboard=false"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._metadata = summary_pb2.SummaryMetadata
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers, each a point of the curve of its name."""
        values = {name: {"dtype": "DT_FLOAT", "float_val": [value]} for name, value in scalars.items()}
        self._write_tensors(step, "scalars", values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture [H, W, 1 or 3] uint8."""
        png = io.BytesIO()
        save_png(png, image)
        size = [str(length).encode() for length in (image.shape[1], image.shape[0])]
        self._write_tensors(step, "images", {name: _strings([*size, png.getvalue()])})

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text in Markdown."""
        self._write_tensors(step, "text", {name: _strings([text.encode()])})

    def _write_tensors(self, step: int, plugin: str, tensors: Mapping[str, dict[str, Any]]) -> None:
        metadata = self._metadata(plugin_data=self._metadata.PluginData(plugin_name=plugin))
        values = [
            self._summary.Value(tag=name, metadata=metadata, tensor=tensor)
            for name, tensor in tensors.items()
        ]
        self._write(step=step, summary=self._summary(value=values))

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        self._records.close()


def _strings(values: list[bytes]) -> dict[str, Any]:
    """A one-dimensional tensor of them."""
    return {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": len(values)}]}, "string_val": values}
