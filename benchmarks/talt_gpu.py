"""Is TALT fast on a GPU? ResNet-18 on CIFAR-10 to 94 %, and a small GPT to AdamW's loss, in a given time.

    python benchmarks/talt_gpu.py --data FOLDER --minutes 16 --records runs.jsonl --output talt_gpu.md
    python benchmarks/talt_gpu.py --report --records runs.jsonl         # the page of what was done so far
    python benchmarks/talt_gpu.py --smoke                               # tiny and on the CPU: does the script work?

In this order: milliseconds of a step; four learning rates for each optimizer on the validation part; then for each
optimizer and seed the shortest horizon T·2^(k/2) that reaches the target. No run is begun that would not end in time.
Each finished run is a line of `--records`: the same command goes on where it was ended.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from table import machine, publish
from talt_gpu_report import page
from talt_gpu_runs import MEASURED, Records, Run, measure, train
from talt_gpu_tasks import Data, GPUTask, tasks

OPTIMIZERS = ("nesterov", "adamw", "muon", "talt", "soap")
BASELINE = "adamw"
# TALT with half of the bases, of the shorter sides, half as often. It takes TALT's learning rate.
LIGHT = "talt-light"
CONTENDERS: dict[str, dict[str, Any]] = {name: {} for name in OPTIMIZERS}
CONTENDERS[LIGHT] = {"one_sided": True, "update_interval": 20}
# Only the steps of these are measured.
OTHER_STEPS: dict[str, dict[str, Any]] = {
    "talt-one-sided": {"one_sided": True},
    "talt-side-64": {"max_side": 64},
    "talt-asynchronous": {"asynchronous": True},
}
TRIALS = 6
TUNING = 0.35  # of the time, at most
TUNING_SEED, FINAL_SEEDS = 0, (100, 101, 102)


def next_rate(start: float, tried: Mapping[float, float]) -> float:
    """The learning rate to try next, by the same rule for all: `start`, twice and half of it, then a factor of two on
    beyond the best where that is the largest or smallest, otherwise between the best and the better one beside it.
    """
    for rate in (start, 2 * start, start / 2):
        if rate not in tried:
            return rate
    rates = sorted(tried)
    best = rates.index(min(rates, key=lambda rate: tried[rate]))
    if best in (0, len(rates) - 1):
        return rates[best] / 2 if best == 0 else rates[best] * 2
    beside = min((rates[best - 1], rates[best + 1]), key=lambda rate: tried[rate])
    return math.sqrt(rates[best] * beside)


def next_k(scores: Mapping[int, float], target: float, start: int, ks: tuple[int, int]) -> int | None:
    """The horizon to try next; None where the shortest that reaches the target is known, or that there is none."""
    k = start
    while k in scores:
        k += -1 if scores[k] <= target else 1
        if not ks[0] <= k <= ks[1] or (k in scores and (scores[k] <= target) != (scores[start] <= target)):
            return None
    return k


class Bench:
    """One task's runs, as many as the time allows.

    Args:
        task: Which.
        data: Its data.
        device: Where everything is.
        records: Of all runs.
        deadline: By `time.perf_counter`.
        seeds: Of the final runs.
    """

    def __init__(
        self,
        task: GPUTask,
        data: Data,
        device: torch.device,
        records: Records,
        deadline: float,
        seeds: tuple[int, ...] = FINAL_SEEDS,
    ) -> None:
        self.task, self.data, self.device, self.records = task, data, device, records
        self.deadline, self.seeds = deadline, seeds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def do(self, run: Run, seconds: float) -> bool:
        """Whether a run was done, now or before: it is not begun where so many seconds are not left."""
        if self.records.find(run) is not None:
            return True
        if seconds > self.left:
            print(f"{run.task} {run.stage} {run.contender} {run.steps}: no time for {seconds:.0f} s", flush=True)
            return False
        work = measure if run.stage == "steps" else train
        try:
            record = work(run, self.task, self.data, self.device)
        except Exception as error:  # whatever it is: the time of the device is not spent on one optimizer's mistake
            record = {"failure": f"{type(error).__name__}: {error}"[:300], "score": math.inf}
        self.records.add(run, record)
        return True

    def step_costs(self) -> None:
        """What a step costs; TALT's as it is later on, when its bases are renewed at regular intervals."""
        for name, options in {**CONTENDERS, **OTHER_STEPS}.items():
            base, steps = name.partition("-")[0], min(MEASURED, self.task.horizon)
            regular = {"dynamic_updates": False} if base == "talt" else {}
            own = {**self.task.settings[base], **options, **regular}
            self.do(Run(self.task.name, "steps", name, own, TUNING_SEED, steps), 0.0)

    def step_seconds(self, contender: str) -> float:
        """Of one step: of the last run that took any, or as it was measured."""
        for stage in ("final", "tune"):
            for _, record in reversed(self.records.of(self.task.name, stage, contender)):
                if record.get("steps"):
                    return record["seconds"] / record["steps"]
        for _, record in self.records.of(self.task.name, "steps", contender):
            if "model_ms" in record:
                return (record["model_ms"] + record["optimizer_mean_ms"]) / 1e3
        return self.step_seconds("talt") if contender == LIGHT else math.inf

    def tune(self) -> None:
        """Round after round, so that all have had the same number of trials whenever time ends."""
        known = self.records.of(self.task.name, "tune")
        able = [name for name in OPTIMIZERS if math.isfinite(self.step_seconds(name))]
        if not able:
            return
        affordable = TUNING * self.left / (TRIALS * sum(map(self.step_seconds, able)))
        fewest, most = self.task.tuning
        steps = known[0][0].steps if known else int(min(max(affordable, fewest), most))
        for trial in range(TRIALS):
            for name in able:
                tried = self.tried(name)
                if len(tried) > trial:
                    continue
                own = self.task.settings[name]
                rate = float(f"{next_rate(own['lr'], tried):.4g}")
                run = Run(self.task.name, "tune", name, {**own, "lr": rate}, TUNING_SEED, steps)
                if not self.do(run, steps * self.step_seconds(name)):
                    return

    def tried(self, contender: str) -> dict[float, float]:
        """The scores of its learning rates."""
        return {
            run.settings["lr"]: record["score"] for run, record in self.records.of(self.task.name, "tune", contender)
        }

    def final(self, contender: str, k: int, seed: int) -> Run | None:
        """A run with the best learning rate; None where there is none."""
        base = contender.partition("-")[0]
        tried = self.tried(base)
        best = min(tried, key=lambda rate: tried[rate], default=None)
        if best is None or not math.isfinite(tried[best]):
            return None
        own = {**self.task.settings[base], "lr": best, **CONTENDERS[contender]}
        return Run(self.task.name, "final", contender, own, seed, self.task.steps(k))

    def scores(self, contender: str, seed: int) -> dict[int, float]:
        """Of its final runs, by k."""
        found = {}
        for k in range(self.task.ks[0], self.task.ks[1] + 1):
            run = self.final(contender, k, seed)
            record = self.records.find(run) if run else None
            if record is not None:
                found[k] = record["score"]
        return found

    def target(self) -> float | None:
        """The score to reach: 1 − accuracy, or the median of AdamW's at T over the seeds, which are done first."""
        if self.task.accuracy is not None:
            return 1 - self.task.accuracy
        for seed in self.seeds:
            run = self.final(BASELINE, 0, seed)
            if run is not None:
                self.do(run, self.task.horizon * self.step_seconds(BASELINE))
        found = [self.scores(BASELINE, seed).get(0) for seed in self.seeds]
        there = [score for score in found if score is not None]
        return statistics.median(there) if there else None

    def search(self, target: float) -> None:
        """Seed after seed: each optimizer's next horizon in turns, then TALT with fewer bases."""
        for seed in self.seeds:
            for group in (OPTIMIZERS, (LIGHT,)):
                waiting = list(group)
                while waiting:
                    waiting = [name for name in waiting if self.one_more(name, seed, target)]

    def one_more(self, contender: str, seed: int, target: float) -> bool:
        """Do its next run; False where there is none, or no time."""
        start = 0 if contender == BASELINE and self.task.accuracy is None else self.task.start
        k = next_k(self.scores(contender, seed), target, start, self.task.ks)
        run = None if k is None else self.final(contender, k, seed)
        return run is not None and self.do(run, run.steps * self.step_seconds(contender))

    def work(self) -> None:
        """Everything, as long as there is time."""
        self.step_costs()
        self.tune()
        target = self.target()
        if target is not None:
            self.search(target)


def about(device: torch.device) -> list[str]:
    """Where the runs were made."""
    lines = machine(("losslab", "torch", "pytorch_optimizer"))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        lines.append(f"- GPU: {torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    return lines


def arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz")
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=16.0, help="for all tasks together")
    parser.add_argument("--records", type=Path, default=Path("talt_gpu.jsonl"), help="the file of finished runs")
    parser.add_argument("--report", action="store_true", help="only the page, from the records")
    parser.add_argument("--smoke", action="store_true", help="tiny tasks; also without a GPU")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    return parser.parse_args()


def main() -> None:
    began = time.perf_counter()
    args = arguments(list(tasks(smoke=True)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = tasks(smoke=args.smoke)
    if args.smoke and args.records == Path("talt_gpu.jsonl"):
        args.records = Path(tempfile.mkdtemp()) / "runs.jsonl"
    records = Records(args.records)
    if not args.report:
        if device.type == "cpu" and not args.smoke:
            print("no CUDA device here, so nothing was measured (--smoke tries the script on the CPU)")
            return
        if "resnet" in args.tasks and not args.smoke and not (args.data and (args.data / "cifar10.npz").exists()):
            raise SystemExit(f"--data: expected a folder with cifar10.npz, got {args.data}; or --tasks gpt")
        torch.backends.cudnn.benchmark = True
        records.add(Run("", "about", "", {}, 0, len(records.all)), {"lines": about(device)})
        for number, name in enumerate(args.tasks):
            task, left = known[name], began + 60 * args.minutes - time.perf_counter()
            deadline = time.perf_counter() + left / (len(args.tasks) - number)
            data = task.data(None if args.smoke else args.data, device)
            Bench(task, data, device, records, deadline).work()
    publish(page([known[name] for name in args.tasks], records, list(CONTENDERS)), args.output)


if __name__ == "__main__":
    main()
