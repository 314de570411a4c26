"""Draw the curves of a run, or quality over network calls from the JSON of tools/compare_solvers.py."""

from pathlib import Path

from maskdit_jax.errors import Parser, one_line_errors
from maskdit_jax.files import read_json
from maskdit_jax.plots import plot_quality, plot_run


def main() -> None:
    parser = Parser("python tools/plot.py", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="run folder: the numbers of its metrics.jsonl")
    what.add_argument("--solvers", type=Path, help="JSON file of tools/compare_solvers.py")
    parser.add_argument("--out", required=True, type=Path, help="picture: .png, .svg or .pdf")
    flags = parser.parse_args()
    with one_line_errors():
        if flags.workdir:
            names = plot_run(flags.workdir, flags.out)
            print(f"{', '.join(names)} in {flags.out}")
        else:
            plot_quality(read_json(flags.solvers).get("rows", []), flags.out)
            print(f"quality over network calls in {flags.out}")


if __name__ == "__main__":
    main()
