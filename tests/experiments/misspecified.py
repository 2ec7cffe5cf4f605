"""What a wrong corruption does to digits, and if it shows:  python tests/experiments/misspecified.py

A row for each case, "TRUE as ASSUMED": the last lap of a run on digits that one law corrupted, while another
is assumed. energy, coverage and frechet_pca see no truth; all other metrics do.
5 laps, unless --settings says otherwise.
"""

import table
from laps import run

CASES = [
    "mask 0.5", "mask 0.5 as mask 0.2", "mask 0.5 as mask 0.8", "mask 0.5 as block 0.5",
    "block 0.5", "block 0.5 as mask 0.5",
    "blur 0.8", "blur 0.8 as blur 0.5", "blur 0.8 as blur 1.1",
    "noise 0.5", "noise 0.5 as noise 0.25", "noise 0.5 as noise 1.0",
    "jpeg 20", "jpeg 20 as jpeg 50", "jpeg 20 as jpeg 8",
]  # fmt: skip


def main() -> None:
    options, rows = table.parse(__doc__, cases=CASES), []
    for case in options.cases:
        true, _, assumed = case.partition(" as ")
        settings = table.preset("digits", true, **dict(laps=5) | options.settings)
        (row,) = run(true, assumed or true, settings, every=False)
        rows.append({"data": true, "learnt with": assumed or true} | row)
        table.show(rows[-1])
    table.table("A wrong corruption", rows, vars(options))


if __name__ == "__main__":
    main()
