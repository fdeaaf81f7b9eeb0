"""Writes the table of mechanisms into the files named on the command line."""

import pathlib
import sys

from attn_lab.catalogue import with_table

for name in sys.argv[1:]:
    path = pathlib.Path(name)
    path.write_text(with_table(path.read_text()))
