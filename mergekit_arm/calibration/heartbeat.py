"""Signs of life: every process of a job shows its own, and watches another's.

torch has no such thing: ``monitored_barrier`` waits for a fixed time however alive the others
are, and names a rank only at its end, while a process may need hours for its batches; an
elastic launcher sees its own host. So each process counts up a number in the job's key-value
store and watches that of the next one in the ring.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented

BEAT = 2.0  # seconds
DEAD_AFTER = 60.0  # seconds without a heartbeat; loading a library can hold one up for some
FAILED = "failed"
"""Key of what the first process to fail has said."""


class Heartbeat:
    """Beats for this process, and learns whether another has failed or died."""

    def __init__(self, process: int, processes: int, name: str) -> None:
        """Prepare for number ``process`` of ``processes``, which others call ``name``."""
        self._process = process
        self._peer = (process + 1) % processes
        self._name = name
        self._over = threading.Event()
        self.lost: str | None = None
        """Which other process failed or died, and how."""

    def start(self, address: str, port: int, prefix: str, timeout: timedelta) -> None:
        """Begin, with the store at ``address`` and ``port``, whose keys begin with ``prefix``."""
        # A connection of its own: a heartbeat must not wait for the main thread's requests.
        own = TCPStore(address, port, is_master=False, timeout=timeout)
        store = PrefixStore(prefix, own)
        store.set(f"name/{self._process}", self._name)
        self._address = address
        threading.Thread(target=self._watch, args=(store,), daemon=True).start()

    def stop(self) -> None:
        """Beat no more; others must know of the end."""
        self._over.set()

    def wait_for_news(self) -> None:
        """Wait until it is known who has died, or nobody can have."""
        self._over.wait(DEAD_AFTER + 2 * BEAT)

    def lost_store(self) -> None:
        """Note the loss of the process that holds the store, unless another was lost before."""
        self.lost = self.lost or f"rank 0 on {self._address} cannot be reached: it died"

    def _watch(self, store: Store) -> None:
        peer = self._peer
        heard, beats = time.monotonic(), -1
        try:
            while not self._over.wait(BEAT):
                store.add(f"beat/{self._process}", 1)
                found = store.add(f"beat/{peer}", 0)
                if found != beats:
                    heard, beats = time.monotonic(), found
                elif time.monotonic() - heard > DEAD_AFTER and not store.check([f"left/{peer}"]):
                    known = store.check([f"name/{peer}"])
                    name = store.get(f"name/{peer}").decode() if known else f"rank {peer}"
                    store.set(FAILED, f"{name} died: no sign of life for {DEAD_AFTER:.0f} s")
                if store.check([FAILED]):
                    self.lost = store.get(FAILED).decode()
                    store.set(f"heard/{self._process}", "")
                    break
        except RuntimeError:
            if not self._over.is_set():
                self.lost_store()
        self._over.set()
