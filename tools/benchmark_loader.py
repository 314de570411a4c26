"""Speed of reading cached moments, from a folder of shards or from synthetic ones, beside a bare read."""

import json
import tempfile
from pathlib import Path

from maskdit_jax.data.loader_speed import benchmark_loader, write_synthetic_shards
from maskdit_jax.errors import Parser, UserError, one_line_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of shards; default: 25,000 synthetic images")
    parser.add_argument("--batch", type=int, default=256, help="items of a batch")
    parser.add_argument("--threads", type=int, default=2, help="reading threads; 0: none")
    parser.add_argument("--rounds", type=int, default=20, help="turns of the loader and the bare read")
    parser.add_argument("--batches", type=int, default=200, help="of a turn")
    flags = parser.parse_args()
    options = {"batch_size": flags.batch, "num_threads": flags.threads}
    options |= {"rounds": flags.rounds, "batches_per_round": flags.batches}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        if min(flags.batch, flags.rounds, flags.batches) < 1 or flags.threads < 0:
            raise UserError("--batch, --rounds and --batches must be at least 1, --threads at least 0")
        if flags.data is None:
            write_synthetic_shards(Path(folder), 25_000)
        print(json.dumps(benchmark_loader(flags.data or Path(folder), **options), indent=1))


if __name__ == "__main__":
    main()
