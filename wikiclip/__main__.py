import sys
from pathlib import Path

# `python -m` looks for modules in the current folder first. An application's own `service` there is not ours.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    del sys.path[0]

from wikiclip.cli import main

main()
