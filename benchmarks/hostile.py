"""What is left of the accuracy as the share of hostile devices grows, rule by rule.

    python benchmarks/hostile.py --data DATA/snips --model STUDENT --train ladder --seeds 0,1,2,3,4 --out hostile.jsonl
    python benchmarks/hostile.py --table hostile.jsonl

Fleet, attacks and screen are those of attacks.py. Every rule is told to reckon with `--assumed` of the devices, whatever the
share is; at most that share is tried. All cells of a seed begin from the same parameters, after `--warm-up` rounds without
attackers. Cells that `--out` already has are not done again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from attacks import ATTACKS, add_options, aggregators, chosen, make_fleet, run_cell, warmed_up
from virtual import Row, asked, options, spread

from pocketfed.coordinator import flwr_compat
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.validation import Limits
from pocketfed.model.rows import append_row, whole_rows

TOGETHER = ("a little", "against", "within", "min-max")
CHOSEN = ("sign flip", "sign flip ×10", "boast, flip ×10", *(f"colluders: {name}" for name in TOGETHER))


def run_seed(arguments: argparse.Namespace, seed: int, done: set[tuple[str, str, float]]) -> None:
    flwr_compat.enter_run(1)
    shares = [float(share) for share in arguments.shares.split(",")]
    rules = aggregators(arguments.devices, arguments.assumed)
    attacks = chosen(arguments.attacks, ATTACKS) if arguments.attacks else CHOSEN
    cells = [
        (rule, attack, share)
        for rule in chosen(arguments.aggregators, rules)
        for share in shares
        for attack in (attacks if share else ["none"])
    ]
    missing = [cell for cell in cells if cell not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        fleet = make_fleet(arguments, seed, Path(scratch), max(shares))
        theta = warmed_up(fleet, arguments.warm_up)
        limits, names = Limits.of(len(theta), RunConfig()), sorted(fleet.local)
        for rule, attack, share in missing:
            begun, bad = time.process_time(), names[: round(share * len(names))]
            told = run_cell(
                fleet, theta, arguments.warm_up + 1, arguments.rounds, ATTACKS[attack][1], rules[rule], limits, bad
            )
            row = {"data": arguments.data.name, "train": arguments.train, "seed": seed, "devices": len(names)}
            row |= {"rule": rule, "attack": attack, "share": share, "assumed": arguments.assumed}
            row |= {"start": fleet.measure(theta)[0], "rounds": arguments.rounds, **told}
            append_row(arguments.out, row | {"cpu_s": round(time.process_time() - begun, 1)})
            print(f"seed {seed}, {rule}, {attack}, {share:.0%}: {told['accuracy']:.3f}", flush=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table an attack: accuracy in percent as mean [smallest, largest] over seeds."""
    out: list[str] = []
    shares = sorted({r["share"] for r in rows})
    for attack in dict.fromkeys(r["attack"] for r in rows if r["share"]):
        seeds = {r["seed"] for r in rows if r["attack"] == attack}
        out += [f"\n{attack} ({len(seeds)} seeds)\n", "| | " + " | ".join(f"{s:.0%}" for s in shares) + " |"]
        out += ["|---" * (len(shares) + 1) + "|"]
        for rule in dict.fromkeys(r["rule"] for r in rows):
            those = [r for r in rows if r["rule"] == rule and r["attack"] in (attack, "none")]
            cells = [spread([100 * r["accuracy"] for r in those if r["share"] == share]) for share in shares]
            out += [f"| {rule} | " + " | ".join(cells) + " |"]
    return "\n".join(out)


def main() -> None:
    parser = options(__doc__)
    add_options(parser)
    parser.add_argument("--shares", default="0,0.1,0.2,0.3", help="of the devices that are hostile")
    parser.add_argument("--assumed", type=float, default=0.3, help="share that the rules reckon with")
    parser.add_argument(
        "--attacks", default="", help=f"those whose names hold one of these words; if empty, {'; '.join(CHOSEN)}"
    )
    parser.add_argument("--aggregators", default="", help="likewise; all if empty")
    arguments = asked(parser, table)
    if arguments is None:
        return
    for seed in map(int, arguments.seeds.split(",")):
        rows = [r for r in whole_rows(arguments.out) if r["seed"] == seed and r["data"] == arguments.data.name]
        done = {(r["rule"], r["attack"], r["share"]) for r in rows if r["train"] == arguments.train}
        run_seed(arguments, seed, done)
    print(table(whole_rows(arguments.out)))


if __name__ == "__main__":
    main()
