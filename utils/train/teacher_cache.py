"""The teacher's outputs for mini-batches that it has seen before, in a file (--teacher_cache).

Runs of one seed, data set, normalisation, batch size, growth, --max_images_per_step and number of processes see the
same mini-batches, whatever they train and with whichever loss: only the first of them has to run the teacher.
"""

import hashlib
import shutil
import sqlite3
import sys
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor

from utils.base.errors import UserError
from utils.train.engine import at_least_float32

# SQLite keeps it in the head of the file: what the file is.
APPLICATION = 0x41485347
# Bytes that stay free on the disk, for checkpoints.
RESERVE = 1 << 30


class TeacherCache:
    """A table of outputs by the content of the mini-batch and the teacher. Several runs may share the file.

    Args:
        path: the file; it is created where there is none. Logits and features take 4 bytes a number and image.
        identity: what identifies the teacher and its arithmetic, such as the SHA-256 of its checkpoint.

    Attributes:
        counts: mini-batches of this run whose outputs were read, and those whose outputs were computed.

    Raises:
        UserError: the file cannot be opened or is something else.
    """

    def __init__(self, path: str, identity: str):
        self.path, self.identity = path, identity
        self.counts = {"read": 0, "computed": 0}
        try:
            self._database: sqlite3.Connection | None = sqlite3.connect(path, timeout=60, isolation_level=None)
            # In this order, as another run may be making the file.
            ((tables,),) = self._database.execute("SELECT count(*) FROM sqlite_master")
            ((application,),) = self._database.execute("PRAGMA application_id")
            if not tables:
                self._database.execute(f"PRAGMA application_id = {APPLICATION}")
            elif application != APPLICATION:
                raise sqlite3.DatabaseError("file is another program's database")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS outputs (mini_batch BLOB, name TEXT, numbers BLOB, "
                "PRIMARY KEY (mini_batch, name)) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise UserError(f"--teacher_cache '{path}': {error}; name another file, which it may write") from None

    def get(self, images: Tensor, names: Set[str]) -> dict[str, list[Tensor]] | None:
        """The outputs of these names, [float32 (B, width)] each, on the device of images (B, C, H, W); None where one
        is missing."""
        command = "SELECT name, numbers FROM outputs WHERE mini_batch = ?"
        rows = dict(self._execute(command, (self._key(images),)))
        if not names <= rows.keys():
            return None
        self.counts["read"] += 1
        numbers = {name: torch.frombuffer(bytearray(rows[name]), dtype=torch.float32) for name in names}
        return {name: [x.view(len(images), -1).to(images.device)] for name, x in numbers.items()}

    def put(self, images: Tensor, outputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Stores outputs that were computed for images, and returns them."""
        self.counts["computed"] += 1
        if self._database and shutil.disk_usage(Path(self.path).resolve().parent).free < RESERVE:
            self._give_up(f"less than {RESERVE >> 20} MiB are left on its disk")
        key = self._key(images)
        for name, (x,) in outputs.items():
            numbers = at_least_float32(x).contiguous().cpu().numpy().tobytes()
            self._execute("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?)", (key, name, numbers))
        return outputs

    def check(self, images: Tensor, outputs: dict[str, list[Tensor]]) -> None:
        """Raises UserError where the file has other outputs for these images than those that were just computed; stores
        these where it has none."""
        stored = self.get(images, outputs.keys()) or self.put(images, outputs)
        self.counts.update(read=0, computed=0)
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
        content = hashlib.blake2b(f"{self.identity} {arithmetic} {tuple(images.shape)}".encode(), digest_size=16)
        # In memory order for channels_last, so that nothing is copied on a CPU.
        content.update(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        return content.digest()

    def _execute(self, command: str, values: tuple) -> list:
        """The rows. A file that fails later ends no run: the teacher is computed then."""
        if self._database is None:
            return []
        try:
            return self._database.execute(command, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(str(error))
            return []

    def _give_up(self, reason: str) -> None:
        self._database = None
        print(f"warning: --teacher_cache '{self.path}': {reason}; this run goes on without it", file=sys.stderr)
