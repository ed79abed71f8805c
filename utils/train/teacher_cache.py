"""The teacher's outputs for mini-batches that it has seen before, in a file (--teacher_cache).

Runs of one seed, data set and batch size see the same mini-batches, whatever they train and with whichever loss: only
the first of them has to run the teacher.
"""

import hashlib
import sqlite3
import warnings
from collections.abc import Set

import torch
from torch import Tensor

from utils.base.errors import UserError
from utils.train.engine import at_least_float32


class TeacherCache:
    """A table of outputs by the content of the mini-batch and the teacher. Several runs may share the file.

    Args:
        path: the file; it is created where there is none. Logits and features take 4 bytes a number and image.
        teacher: what identifies the teacher, such as the SHA-256 of its checkpoint.

    Raises:
        UserError: the file cannot be opened or is something else.
    """

    def __init__(self, path: str, teacher: str):
        self.path, self.teacher = path, teacher
        try:
            self._file: sqlite3.Connection | None = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS outputs (mini_batch BLOB, name TEXT, numbers BLOB, "
                "PRIMARY KEY (mini_batch, name)) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise UserError(f"--teacher_cache '{path}': {error}; name a file that this program may write") from None

    def get(self, images: Tensor, names: Set[str]) -> dict[str, list[Tensor]] | None:
        """The outputs of these names, [float32 (B, width)] each, on the device of images (B, C, H, W); None where one
        is missing."""
        command = "SELECT name, numbers FROM outputs WHERE mini_batch = ?"
        rows = dict(self._execute(command, (self._key(images),)))
        if not names <= rows.keys():
            return None
        numbers = {name: torch.frombuffer(bytearray(rows[name]), dtype=torch.float32) for name in names}
        return {name: [x.view(len(images), -1).to(images.device)] for name, x in numbers.items()}

    def put(self, images: Tensor, outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Stores outputs for images, and returns them."""
        key = self._key(images)
        for name, (x,) in outputs.items():
            numbers = at_least_float32(x).contiguous().cpu().numpy().tobytes()
            self._execute("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?)", (key, name, numbers))
        return outputs

    def check(self, images: Tensor, outputs: dict[str, list[Tensor]]) -> None:
        """Raises UserError where the file has other outputs for these images than those that were just computed; stores
        these where it has none."""
        stored = self.get(images, outputs.keys()) or self.put(images, outputs)
        for name, (x,) in outputs.items():
            difference = float((stored[name][0] - x).abs().max() / x.abs().max())
            if not difference < 1e-3:
                raise UserError(
                    f"--teacher_cache '{self.path}': its {name} differ by {difference:.1g} of the largest from this "
                    "teacher's; name another file"
                )

    def _key(self, images: Tensor) -> bytes:
        device = images.device.type
        # Outputs that autocast has rounded to bfloat16 are others.
        arithmetic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        content = hashlib.blake2b(f"{self.teacher} {arithmetic} {tuple(images.shape)}".encode(), digest_size=16)
        # In memory order for channels_last, so that nothing is copied on a CPU.
        content.update(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        return content.digest()

    def _execute(self, command: str, values: tuple) -> list:
        """The rows. A file that fails later, such as on a full disk, ends no run: the teacher is computed then."""
        if self._file is None:
            return []
        try:
            return self._file.execute(command, values).fetchall()
        except sqlite3.Error as error:
            warnings.warn(f"--teacher_cache '{self.path}': {error}; not used any more in this run", stacklevel=2)
            self._file = None
            return []
