"""Sets of images, undecoded: folders of files, and what tensorflow_datasets has prepared."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from maskdit_jax.data.images import MAX_FILE_BYTES, ImageError, decode_image
from maskdit_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImageSet(Protocol):
    """Images by number; `classes` are their names, empty when there are none."""

    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> "tuple[Image, int]":
        """The decoded image, and its class, -1 when the set has none.

        Raises:
          ImageError: it cannot be decoded; the message names it.
          UserError: it cannot be read.
        """


class Folder:
    """A sub-folder for each class, classes in the order of their names; or images alone, without classes.

    Photographs that the camera says were taken sideways are turned upright.
    """

    def __init__(self, path: str):
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"folder:{path}: there is no such folder")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        flat = _images_in(root)
        if self.classes and flat:
            raise UserError(
                f"folder:{path} has both images ({flat[0].name}) and sub-folders ({self.classes[0]}): move "
                "the images into the sub-folders of their classes, or the sub-folders elsewhere"
            )
        by_class = [_images_in(root / name, deep=True) for name in self.classes] or [flat]
        empty = [name for name, files in zip(self.classes, by_class) if not files]
        if empty or (not flat and not self.classes):
            where = f"{path}/{empty[0]}" if empty else path
            raise UserError(f"folder:{path}: no images ({', '.join(SUFFIXES)}) in {where}")
        self._files = [file for files in by_class for file in files]
        counts = [len(files) for files in by_class]
        labels = np.arange(len(self.classes)) if self.classes else np.array([-1])
        self._labels = np.repeat(labels, counts).astype(np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def load(self, index: int) -> "tuple[Image, int]":
        file = self._files[index]
        try:
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise ImageError(f"{file}: {size:,} bytes, more than the {MAX_FILE_BYTES:,} of any image")
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        return decode_image(content, self.name(index)), int(self._labels[index])


class Tfds:
    """Training split of a tensorflow_datasets data set: its `image` feature, and `label` if it has one.

    The first use downloads and prepares it under TFDS_DATA_DIR, in random-access files; archives that
    must be fetched by hand (ImageNet) are looked for in TFDS_DATA_DIR/downloads/manual. Preparing
    imports TensorFlow, reading does not. Images are not turned by what EXIF says, as TensorFlow's own
    decoder and the published preparations of ImageNet do not turn them.
    """

    def __init__(self, name: str):
        import tensorflow_datasets as tfds  # seconds to import

        try:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
            self._items = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UserError(f"tfds:{name}: tensorflow_datasets knows no such data set") from error
        except Exception as error:  # every data set has its own ways to fail
            reason = " ".join(str(error).split())[:300] or repr(error)  # what to do is in its later lines
            raise UserError(f"tfds:{name} cannot be prepared or read: {reason}") from error
        features = builder.info.features
        if "image" not in features:
            raise UserError(f"tfds:{name} has no images: its features are {', '.join(features)}")
        self.classes = list(features["label"].names) if "label" in features else []
        self._name = name

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        return f"tfds:{self._name}[{index}]"

    def load(self, index: int) -> "tuple[Image, int]":
        item = self._items[index]
        image = decode_image(item["image"], self.name(index), upright=False)
        return image, int(item["label"]) if self.classes else -1


def _images_in(folder: Path, deep: bool = False) -> list[Path]:
    """Images of a folder, sorted; `deep`: of those in it too."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())


def open_image_set(name: str) -> ImageSet:
    """The images of `folder:PATH` or `tfds:NAME`.

    Raises:
      UserError: unknown, empty or not prepared.
    """
    kind, _, rest = name.partition(":")
    kinds: dict[str, type[Folder] | type[Tfds]] = {"folder": Folder, "tfds": Tfds}
    if kind not in kinds or not rest:
        raise UserError(f"source {name!r} is unknown; known: folder:PATH, tfds:NAME")
    return kinds[kind](rest)
