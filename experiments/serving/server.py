"""`jaxsp serve`, where the whole document and nothing have as many slots as σ; all is compiled beforehand.

python -m experiments.serving.server serve FOLDER ..., started by ``speed.py``. As it is, the server gives few
slots to what σ is compared with, and compiles for it when it is needed: in the midst of a turn.
"""

from __future__ import annotations

from typing import Any

from jaxsp.__main__ import main
from jaxsp.serve import brackets
from jaxsp.serve.scheduler import Scheduler


class Compiled(Scheduler):
    """A batch whose programs are all there when it is."""

    def __init__(self, *arguments: Any, warm_up: bool) -> None:
        del warm_up
        super().__init__(*arguments, warm_up=True)


if __name__ == "__main__":
    brackets.MOST_SLOTS = 2**10
    brackets.Scheduler = Compiled
    main()
