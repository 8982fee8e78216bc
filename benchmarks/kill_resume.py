"""A recipe killed at random moments, and whether it ends where the unbroken run ends.

    python benchmarks/kill_resume.py --config configs/demo.py --workdir kills --kills 10 \\
        -- --config.stages[1].steps=30

The recipe runs once unbroken, and then again with `kill -9` at moments drawn from the time that
each stage took, started again after each: at least one within distilling, fine-tuning, a method
and exporting, where the recipe has them. In the end every kept parameter and every byte of the
exports is compared. Exits with 1 unless all are identical.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BEGIN = ": begin"
MORE_RUNS = 5  # for moments that came too late: a stage may be quicker than it was
# Where in a stage a moment is drawn from, as shares of its time.
EARLIEST, LATEST = 0.05, 0.95


@dataclass
class Moment:
    """When to kill: a share of a stage's time, counted from its beginning."""

    stage: str
    share: float


@dataclass
class Kill:
    """What was killed.

    Attributes:
      run: which of the broken runs.
      stage: that it was in.
      seconds: since that stage had begun, in this process.
      reached: what the stage had told or kept by then.
      resumed: what the next process could go on from.
      over: whether the stage was done by then.
      identical: whether the run ended as the unbroken one.
    """

    run: int
    stage: str
    seconds: float
    reached: str
    resumed: str
    over: bool = False
    identical: bool = False


class Child:
    """`jaxcompress run` in a process group of its own, whose lines are read as they come."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.stages: list[tuple[str, float]] = []  # that began, and when
        self._news = threading.Condition()
        self._over = False
        self._log = log.open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "jaxcompress", "run", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._log.write(line)
            self._log.flush()
            with self._news:
                if line.rstrip().endswith(BEGIN):
                    self.stages.append((line.rstrip().removesuffix(BEGIN), time.monotonic()))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def wait_for(self, stage: str) -> float | None:
        """When a stage began; None where the process ended without it."""
        with self._news:
            self._news.wait_for(lambda: self._over or stage in dict(self.stages))
        return dict(self.stages).get(stage)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None where it still runs after these seconds."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join()
        self._log.close()
        return code

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


class Harness:
    """The unbroken run, the broken ones, and their comparison."""

    def __init__(self, workdir: Path, arguments: list[str], seed: int) -> None:
        self.workdir, self.arguments = workdir, arguments
        self.draw = random.Random(seed)
        self.durations: dict[str, float] = {}
        self.kills: list[Kill] = []

    def start(self, name: str) -> Child:
        root = self.workdir / name
        return Child([*self.arguments, "--workdir", str(root)], self.workdir / f"{name}.log")

    def unbroken(self) -> None:
        """Run it, and note how long each stage takes."""
        child = self.start("unbroken")
        code = child.wait()
        if code not in (0, 1):  # 1: a check of the recipe failed, which is no matter here
            sys.exit(f"the unbroken run ended with {code}: see {self.workdir}/unbroken.log")
        names = [name for name, _ in child.stages]
        report = json.loads((self.workdir / "unbroken" / "report.json").read_text())
        self.durations = {s["name"]: s["seconds"] for s in report["stages"] if s["name"] in names}

    def moments(self, count: int) -> list[Moment]:
        """One within each kind of stage, and others anywhere, in the order of the stages."""
        chosen = [self.draw.choice(names) for names in self.spared().values()][:count]
        names, weights = list(self.durations), list(self.durations.values())
        chosen += self.draw.choices(names, weights, k=count - len(chosen))
        return in_order([Moment(name, self.draw.uniform(EARLIEST, LATEST)) for name in chosen])

    def spared(self) -> dict[str, list[str]]:
        """Stages by their kind, of the kinds within which nothing was killed."""
        kinds: dict[str, list[str]] = {}
        for name in self.durations:
            kinds.setdefault(kind_of(name), []).append(name)
        hit = {kind_of(kill.stage) for kill in self.kills if not kill.over} | {"evaluate"}
        return {kind: names for kind, names in kinds.items() if kind not in hit}

    def broken(self, number: int, moments: list[Moment]) -> list[Moment]:
        """One run, killed at each of these moments in turn; returns those that it was too fast for.

        A stage that is taken up again goes on where it was, so a later moment within it comes that
        much earlier.
        """
        name, late, before = f"broken-{number}", [], Moment("", 0.0)
        for moment in moments:
            child = self.start(name)
            began = child.wait_for(moment.stage)
            done = before.share if before.stage == moment.stage else 0.0
            seconds = max(moment.share - done, 0.0) * self.durations[moment.stage]
            if began is None or child.wait(max(began + seconds - time.monotonic(), 0)) is not None:
                child.wait()
                late.append(moment)
                continue
            child.kill()
            self.note(number, name, child)
            before = moment
        code = self.start(name).wait()
        if code not in (0, 1):
            sys.exit(
                f"a run that was started again ended with {code}: see {self.workdir}/{name}.log"
            )
        return late

    def note(self, number: int, name: str, child: Child) -> None:
        """What was killed, and what of it is left."""
        stage, began = child.stages[-1]
        folder = self.workdir / name / "stages" / stage
        steps = (folder / "metrics.jsonl").read_text() if has(folder / "metrics.jsonl") else ""
        told = [json.loads(line)["step"] for line in steps.splitlines() if line.endswith("}")]
        groups = len(list((folder / "partial").glob("*.json")))
        saved = [
            int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()
        ]
        reached = f"step {told[-1]} logged" if told else f"{groups} groups kept" if groups else "-"
        resumed = (
            f"step {max(saved)}" if saved else f"group {groups}" if groups else "its beginning"
        )
        over = has(folder / "stage.json")
        if over:
            reached, resumed = "its end", "the next stage"
        seconds = time.monotonic() - began
        self.kills.append(Kill(number, stage, seconds, reached, resumed, over))
        print(f"killed: run {number}, {stage} after {seconds:.1f} s, {reached}", flush=True)

    def compare(self, number: int) -> None:
        """A broken run with the unbroken one."""
        roots = self.workdir / "unbroken", self.workdir / f"broken-{number}"
        differing = [what for what, a, b in pairs(*roots) if a != b]
        for kill in self.kills:
            kill.identical |= kill.run == number and not differing
        print(f"run {number}: {', '.join(differing) or 'identical'}", flush=True)


def in_order(moments: list[Moment]) -> list[Moment]:
    return sorted(moments, key=lambda moment: (moment.stage, moment.share))


def kind_of(stage: str) -> str:
    """`distill`, `finetune`, `evaluate`, `export`, or `method`."""
    word = stage.partition("-")[2]
    return word if word in ("distill", "finetune", "evaluate", "export") else "method"


def has(path: Path) -> bool:
    return path.is_file()


def pairs(mine: Path, theirs: Path) -> list[tuple[str, object, object]]:
    """(what, in the one, in the other) of all that a run leaves: parameters, exports, report."""
    found: list[tuple[str, object, object]] = []
    reports = [json.loads((root / "report.json").read_text())["stages"] for root in (mine, theirs)]
    for a, b in zip(*reports, strict=True):
        told = ("quality", "size", "losses")
        found += [(f"{a['name']}: {name}", a[name], b[name]) for name in told]
        if a["model"]:
            found.append(
                (f"{a['name']}: parameters", *(digest(r, a["name"]) for r in (mine, theirs)))
            )
        if a["method"] == "export":
            folder = a["options"].get("path", "export")
            found.append(
                (f"{a['name']}: files", *(contents(root / folder) for root in (mine, theirs)))
            )
    return found


def digest(root: Path, stage: str) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every buffer of the parameters that a stage kept."""
    import jax
    import numpy as np

    from jaxcompress.training.checkpoints import load_params

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        root / "stages" / stage / "params", lambda shapes: jax.tree.map(lambda _: here, shapes)
    )
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        jax.tree_util.keystr(path): (f"{x.dtype} {x.shape}", np.asarray(x).tobytes())
        for path, x in flat
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=Path, required=True, help="made anew")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--runs", type=int, default=2, help="that share the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("changes", nargs="*", metavar="--config.FIELD=VALUE", help="after --")
    given = parser.parse_args()
    if given.workdir.exists() and any(given.workdir.iterdir()):
        parser.error(f"--workdir {given.workdir}: is not empty")
    given.workdir.mkdir(parents=True, exist_ok=True)
    harness = Harness(given.workdir, ["--config", given.config, *given.changes], given.seed)
    harness.unbroken()
    waiting, number = harness.moments(given.kills), 0
    while waiting and number < given.runs + MORE_RUNS:
        number += 1
        share = -(-len(waiting) // max(given.runs - number + 1, 1))
        taken = in_order(harness.draw.sample(waiting, share))
        waiting = [moment for moment in waiting if moment not in taken]
        # What came too late is tried again in a further run, earlier in its stage.
        late = harness.broken(number, taken)
        waiting += [Moment(moment.stage, moment.share / 2) for moment in late]
        harness.compare(number)
        if not waiting:
            waiting = [Moment(names[0], EARLIEST) for names in harness.spared().values()]
    table = table_of(harness.kills)
    print(table)
    (given.workdir / "kills.md").write_text(table)
    enough = len(harness.kills) >= given.kills and not harness.spared()
    sys.exit(0 if enough and all(kill.identical for kill in harness.kills) else 1)


def table_of(kills: list[Kill]) -> str:
    """Markdown, a row for each kill."""
    rows = [["run", "killed in", "after", "reached", "goes on from", "identical"], ["---"] * 6]
    for kill in kills:
        end = "yes" if kill.identical else "NO"
        after = f"{kill.seconds:.1f} s"
        rows.append([str(kill.run), kill.stage, after, kill.reached, kill.resumed, end])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
