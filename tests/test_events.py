"""Events between the processes of `doit -n` and the view."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from gamebear_tasks.progress import events


def test_a_late_acknowledgement_does_not_count_for_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        wire = events._Wire(str(tmp_path / "s"), "last")
        view, _ = listener.accept()
        monkeypatch.setattr(events, "ANSWER", 0.01)
        wire.leave_terminal(True)  # the view does not answer in time
        monkeypatch.setattr(events, "ANSWER", 60.0)
        view.send(b"\n")
        done: list[str] = []

        def answer() -> None:
            data = b""
            while data.count(b"\n") < 2:
                data += view.recv(1 << 10)
            time.sleep(0.2)
            done.append("the view handles the second prompt")
            view.send(b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        wire.leave_terminal(False)
        assert done
        thread.join()
        view.close()
        wire.leave_terminal(True)  # does not block after the view has gone
