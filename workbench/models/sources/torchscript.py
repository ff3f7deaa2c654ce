from __future__ import annotations
TITLE="torchscript"
OPTIONS=set()
def fits(r): return False
