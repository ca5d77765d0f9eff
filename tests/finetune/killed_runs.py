"""Runs that are killed at random, again and again, until one comes through: every one must end in the
bits of the run that nobody killed, with nothing else left.

    python -m tests.finetune.killed_runs 200 --seed 0    a line for each, a summary, exit code 1 if one fails

Half of the kills come at a random call that writes, renames, removes or moves a subnet, so that
between any two of them one may fall; the others at a random time.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from losia_kernels.integrations.history import read_log
from tests.checkpoint.trained_pairs import assert_same_model

HERE = Path(__file__).parent
KILLED = -9
TIMES = ("tokens_per_second", "memory_gib", "seconds")  # of the log: differ between any two runs


class Runs:
    """The runs of ``doomed_process.py``: each in a process of its own, whose exit status ``run``
    returns."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "doomed_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        )

    def run(self, *arguments) -> int:
        arguments = [str(each) if isinstance(each, Path) else each for each in arguments]
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()  # at rest, it has nothing to lose
        self._process.communicate()


class Killed:
    """A run that nobody killed, in ``folder``, and others held to it."""

    def __init__(self, runs: Runs, folder: Path, model: Path):
        self.runs, self.folder, self.model = runs, folder, model
        self.whole = folder / "whole"
        self.whole.mkdir()
        assert runs.run(self.whole, model, "count") == 0
        count, seconds = (self.whole / "count.txt").read_text().split()
        self.events, self.seconds = int(count), float(seconds)
        self.where: Counter[str] = Counter()  # how often which kind of call was the last

    def check(self, number: int, seed: int) -> str:
        """Kill the run of this ``number`` up to three times, let it end, and hold it to the whole
        one."""
        chance = random.Random(f"{seed} {number}")
        folder = self.folder / str(number)
        folder.mkdir()
        said = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            event, second = chance.randrange(self.events), chance.uniform(0, self.seconds)
            moment = chance.choice((f"event {event}", f"second {second:.3f}"))
            status = self._go_on(folder, moment)
            assert status in (0, KILLED), (
                number,
                said,
                (folder / "printed.txt").read_text()[-2000:],
            )
            where = (folder / "died.txt").read_text() if status == KILLED else "not killed"
            resumed = "resumed, " if said else ""
            self.where[resumed + where.partition(" ")[0]] += 1
            said.append(f"{moment}: {where}")
        status = self._go_on(folder, "")
        assert status == 0, (number, said, (folder / "printed.txt").read_text()[-2000:])
        self.hold(folder / "run")
        return "; ".join(said)

    def _go_on(self, folder: Path, moment: str) -> int:
        (folder / "died.txt").write_text("training")
        return self.runs.run(folder, self.model, moment, (folder / "run" / "run.json").exists())

    def hold(self, run: Path) -> None:
        """The same model and records, the same files, nothing beside them."""
        whole = self.whole / "run"
        assert_same_model(run / "model", whole / "model")
        ours, theirs = (
            sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (run, whole)
        )
        assert ours == theirs, set(ours) ^ set(theirs)
        assert not [path for path in run.parent.iterdir() if "unfinished" in path.name]
        logs = [
            [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(each)]
            for each in (run / "log.jsonl", whole / "log.jsonl")
        ]
        assert logs[0] == logs[1]
        assert (run / "subnets.jsonl").read_bytes() == (whole / "subnets.jsonl").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    arguments = parser.parse_args()
    from tests.integrations.tiny_llama import make_model, make_tokenizer

    failed, runs = 0, Runs()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "base"
        make_model().save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        killed = Killed(runs, Path(folder), model)
        for number in range(arguments.first, arguments.first + arguments.count):
            try:
                print(number, "good", killed.check(number, arguments.seed), flush=True)
            except AssertionError as error:
                failed += 1
                print(number, "BAD", error, flush=True)
    runs.close()
    print(
        f"{arguments.count - failed} of {arguments.count} good;", dict(killed.where.most_common())
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
