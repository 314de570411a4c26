"""The process that reads an LMDB for `lmdb_items`: python lmdb_process.py FILE_DESCRIPTOR FOLDER

It imports nothing of the package, so it starts at once, and it judges nothing. Over the pipe it first
says how many entries and bytes the data base has, then answers lists of keys, one message each:
`?KEY KEY …` with a `RECORD` for each key, `=KEY KEY …` with their values, one after the other.
"""

import os
import struct
import sys
from multiprocessing.connection import Connection

RECORD = struct.Struct("<q40s")  # size of the value, -1 when there is none, and how it begins
ABOUT = struct.Struct("<qq")
FAILED = 3  # exit code; the reason is on standard error


def serve(pipe: Connection, folder: bytes) -> None:
    import lmdb

    with lmdb.open(os.fsdecode(folder), readonly=True, lock=False, readahead=False, subdir=True) as env:
        size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        pipe.send_bytes(ABOUT.pack(env.stat()["entries"], size))
        # As buffers, the values are not copied: looking at their size does not read them.
        with env.begin(buffers=True) as transaction:
            while True:
                request = pipe.recv_bytes()
                values = [transaction.get(key) for key in request[1:].split()]
                if request[:1] == b"=":
                    pipe.send_bytes(b"".join(value for value in values if value is not None))
                    continue
                records = [(-1, b"") if v is None else (len(v), bytes(v[:40])) for v in values]
                pipe.send_bytes(b"".join(RECORD.pack(*record) for record in records))


def main() -> None:
    try:
        serve(Connection(int(sys.argv[1])), os.fsencode(sys.argv[2]))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # nobody asks any more
    except Exception as error:  # damage makes LMDB and its package fail in many ways
        print(error or repr(error), file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
