"""Execute the notebooks of this folder, each in a kernel of its own, and fail if a cell does.

    python examples/notebooks/execute.py            # all of them, as CI does (make notebooks)
    python examples/notebooks/execute.py --write    # and write what they put out into the files that are committed

The statements that a notebook makes about its results stand as ``assert`` in its last cell. What is written has the
outputs and nothing of the machine: no times of execution, no version of Python.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = Path(__file__).resolve().parent
CELL_SECONDS = 600  # a cell that hangs; the machine may be busy
CPU_SECONDS = 360  # of a whole notebook: three minutes on two cores
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Outcome:
    """What came of one notebook; ``failure`` is empty if all is well."""

    name: str
    seconds: float
    cpu_seconds: float
    failure: str


def execute(path: Path, write: bool = False, cpu_limit: float = CPU_SECONDS) -> Outcome:
    """Execute one notebook in its own folder, and write it if all is well.

    The CPU seconds are those of all children of this process so far: call it once per process.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    start, failure = time.perf_counter(), ""
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        failure = str(error)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime
    if not failure and cpu_seconds > cpu_limit:
        failure = f"{path.name} took {cpu_seconds:.0f} CPU seconds, more than {cpu_limit:.0f}"
    if write and not failure:
        notebook.metadata = nbformat.from_dict(METADATA)
        for cell in notebook.cells:
            cell.metadata = nbformat.from_dict({})
        nbformat.write(notebook, path)
    return Outcome(path.name, seconds, cpu_seconds, failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="files (default: all of this folder)")
    parser.add_argument("--write", action="store_true", help="write the outputs into the files")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (default: %(default)s)")
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.notebooks] or sorted(FOLDER.glob("*.ipynb"))
    # Kernels that run side by side share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    spawn = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(arguments.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        for outcome in pool.map(execute, paths, [arguments.write] * len(paths)):
            taken = f"{outcome.seconds:6.1f} s, CPU {outcome.cpu_seconds:6.1f} s"
            print(f"{outcome.name:<28} {taken}   {'FAILED' if outcome.failure else 'ok'}", flush=True)
            if outcome.failure:
                failed += 1
                print(outcome.failure, file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
