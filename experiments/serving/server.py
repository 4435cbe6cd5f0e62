"""`jaxsp serve`, with as many slots for the whole document and for nothing as for σ, so that all are alike.

python -m experiments.serving.server serve FOLDER ..., started by ``speed.py``.
"""

from __future__ import annotations

from jaxsp.__main__ import main
from jaxsp.serve import brackets

if __name__ == "__main__":
    brackets.MOST_SLOTS = 2**10
    main()
