"""Pictures as arrays of bytes: files that Pillow reads, arrays, and the IDX files of MNIST and its like."""

from __future__ import annotations

import gzip
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from resonance_nn.data.documents import DataError

IDX_BYTE = 0x08  # the type of IDX elements that we read
LARGEST = 1 << 28  # pixels


def read_image(source: str | os.PathLike[str] | Image.Image | np.ndarray, num_channels: int) -> np.ndarray:
    """A picture as (rows, columns, channels) uint8, grey or red, green and blue, whatever it was.

    Transparent parts show white. Of an animation the first frame counts, and a rotation that its EXIF data ask for is
    done. An array has rows, columns and, if any, channels (1, 3 or 4) last; floats are 0 … 1.

    Raises:
        DataError: the file is missing, damaged, or no picture; the array is none.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels = {num_channels}: pictures are read as 1, grey, or 3, red, green and blue")
    if isinstance(source, Image.Image):
        return _pixels(source, num_channels, "image")
    if isinstance(source, np.ndarray):
        return _pixels(_from_array(source), num_channels, "image")
    with _opened(source) as image:
        return _pixels(image, num_channels, str(source))


def channels_of(source: str | os.PathLike[str] | np.ndarray) -> int:
    """1 for a grey picture without colours, else 3. Raises DataError as :func:`read_image`."""
    if isinstance(source, np.ndarray):
        return 1 if source.ndim == 2 or source.shape[2] == 1 else 3
    with _opened(source) as image:
        return 1 if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16") else 3


@contextmanager
def _opened(source: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A picture file; whatever goes wrong with it within is a DataError that names it."""
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, not a picture' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, zlib.error, struct.error, Image.DecompressionBombError, Warning) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as a picture ({reason}); remove it or save it anew") from error


def _pixels(image: Image.Image, num_channels: int, name: str) -> np.ndarray:
    if min(image.size) < 1 or image.width * image.height > LARGEST:
        raise DataError(f"{name}: has {image.width} × {image.height} pixels; must be 1 to {LARGEST:,}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F", "I;16", "I;16B", "I;16L"):  # more than 8 bits a pixel, which convert() would cut off
        values = np.asarray(image, np.float64)
        span = float(values.max() - values.min()) or 1.0
        high = 65535.0 if image.mode.startswith("I") and values.max() > 255 else 255.0
        values = (
            values / high * 255 if values.min() >= 0 and values.max() <= high else (values - values.min()) / span * 255
        )
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
    return array[..., None] if num_channels == 1 else array


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise DataError(
            f"array of shape {array.shape}: a picture has rows, columns and, if any, 1, 3 or 4 channels last"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise DataError("array of floats: a picture's are 0 … 1; scale them, or give bytes 0 … 255")
        array = (array * 255).round()
    elif array.min() < 0 or array.max() > 255:
        raise DataError(f"array of {array.dtype} up to {array.max()}: a picture's bytes are 0 … 255")
    return Image.fromarray(array.astype(np.uint8))


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """An array of bytes in the IDX format (LeCun et al. 1998), gzipped or not.

    Raises:
        DataError: it is none, or cut short.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, IDX_BYTE)) or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: is not an IDX file of bytes, as MNIST's are")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{path}: has {values.size:,} bytes, its head says {' × '.join(map(str, shape))}; fetch it anew"
        )
    return values.reshape(shape)
