from __future__ import annotations
TITLE="keras_file"
OPTIONS=set()
def fits(r): return False
