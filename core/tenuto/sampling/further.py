"""`Further`: timesteps beyond the calibrated ones, and the rows that tables get for them.

A row of a table is made when its timestep first comes, once for all runs with such a schedule, and
found again by value.
"""

from __future__ import annotations

import torch

MOST = 128  # timesteps: Qwen-Image's tables take 4.2 MiB of each


class Further:
    """Which row of their own the tables of a denoiser read, at a timestep that was not calibrated.

    tables: how many there are. place: that row, None where it has none: at a calibrated timestep,
    and where the rows of a batch are at different ones. row: the same as int64 (1,) on the device,
    in the same memory at every step. missing: whether some table has nothing there yet, or there is
    no such row: then tables compute. generation: grows when all rows are forgotten.
    """

    def __init__(self, tables: int = 0, most: int = MOST) -> None:
        self.tables, self.most = tables, most
        self.place: int | None = None
        self.missing, self.generation = False, 0
        with torch.inference_mode(False):
            self.row = torch.zeros(1, dtype=torch.int64)
        self._places: dict[float, int] = {}
        self._filled: list[int] = []  # how many tables have a row, by place

    def move(self, timestep: float | None, device: object = "cpu") -> None:
        """To the row of `timestep`; None: there is none."""
        if timestep is None or not self.tables:
            self.place, self.missing = None, False
            return
        if timestep not in self._places:
            if len(self._places) >= self.most:
                self.forget()
            self._places[timestep] = len(self._filled)
            self._filled.append(0)
        self.place = self._places[timestep]
        self.missing = self._filled[self.place] < self.tables
        if self.row.device != torch.empty(0, device=device).device:  # type: ignore[call-overload]
            with torch.inference_mode(False):
                self.row = torch.zeros(1, dtype=torch.int64, device=device)  # type: ignore
        self.row.fill_(self.place)

    def mix(self, exact: bool) -> None:
        """The rows of the batch are at different timesteps; exact: all at a calibrated step."""
        self.place, self.missing = None, bool(self.tables) and not exact

    def fill(self, place: int) -> None:
        """One more table has its row."""
        self._filled[place] += 1

    def forget(self) -> None:
        """Let go of all rows: the model was moved or cast, or there are too many."""
        self._places.clear()
        self._filled.clear()
        self.place, self.missing = None, True
        self.generation += 1
