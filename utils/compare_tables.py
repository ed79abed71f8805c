"""Own results beside published ones: every results.json under results/ and runs/, or under the folders given.

python -m utils.compare_tables                             # prints the tables
python -m utils.compare_tables runs/table --picture a.png  # and draws accuracy against multiply-adds
python -m utils.compare_tables --update                    # renews results/README.md, picture, README's table
"""

import sys

from utils.base.errors import run_main
from utils.tables.markdown import main

if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
