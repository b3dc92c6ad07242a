"""What the benchmarks measure with: processes in turn, memory of one's own, and peers that train what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_soak
import forms
import harness
import numpy as np
import peers
import pytest
import simulation
import weight

from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not here: the extra benchmarks")


def printing(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_peer(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


# ---- harness -------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_harness_are_true() -> None:
    assert doctest.testmod(harness).failed == 0


def test_what_weight_measures_is_the_memory_and_time_of_that_code_alone() -> None:
    empty, large = (
        harness.run_once(printing(weight.MEASURED.format(code=code)))
        for code in ("pass", "held = bytearray(b'1') * 50_000_000")
    )
    assert 45 < large["rss_mb"] - empty["rss_mb"] < 60
    assert large["peak_mb"] >= large["rss_mb"] - 1
    assert 0 <= empty["cpu_s"] < large["cpu_s"]
    for code in weight.VARIANTS.values():
        compile(code, "variant", "exec")


def test_variants_run_in_turn_each_in_a_fresh_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import json, os; open({!r}, 'a').write({!r}); print('words'); print(json.dumps({{'pid': os.getpid()}}))"
    commands = {name: printing(code.format(str(log), name)) for name in "ab"}
    rows = harness.interleaved(commands, repeats=3)
    assert log.read_text() == "ababab"
    assert len({row["pid"] for name in "ab" for row in rows[name]}) == 6


def test_a_table_has_median_smallest_and_largest_and_leaves_out_what_is_missing() -> None:
    rows = {"a": [{"s": 1.0}, {"s": 4.0}, {"s": 2.0}], "b": [{"s": 1500, "accuracy": None}]}
    lines = harness.table(rows, {"s": "seconds", "accuracy": "right"}).splitlines()
    assert lines[0] == "| | seconds | right |"
    assert lines[2:] == ["| a | 2 [1, 4] |  |", "| b | 1,500 [1,500, 1,500] |  |"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such peer')", "ended with 1: no such peer"),
        ("print('done')", "ended its output with 'done'; it has to print one JSON object"),
        ("print('[1]')", "ended its output with '\\[1\\]'"),
        ("pass", "ended its output with ''"),
    ],
)
def test_a_command_that_measures_nothing_is_an_error(code: str, message: str) -> None:
    with pytest.raises(harness.BenchmarkError, match=message):
        harness.run_once(printing(code))


def test_peak_memory_is_the_process_own_and_not_its_parents() -> None:
    held = np.ones(400_000_000, np.uint8)  # touched, so that it is in memory while the child is started
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import harness, json, numpy\n"
    small = harness.run_once(printing(code + "print(json.dumps({'mb': harness.peak_rss_mb()}))"))["mb"]
    code += "x = numpy.ones(100_000_000, numpy.uint8); print(json.dumps({'mb': harness.peak_rss_mb()}))"
    large = harness.run_once(printing(code))["mb"]
    assert harness.peak_rss_mb() > held.nbytes / 1e6 > 300 > small
    assert 95 < large - small < 105


def test_a_device_holds_the_same_examples_whatever_the_variant() -> None:
    first, again, other = (harness.chosen(1000, 128, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 128
    rows, labels = harness.made_up(50, 32, vocabulary=100, seed=0)
    assert {len(row) for row in rows} == {32}
    assert min(map(min, rows)) >= 5
    assert max(map(max, rows)) < 100
    assert set(labels) <= set(range(harness.LABELS))
    lengths = [len(row) for row in harness.made_up(500, 32, vocabulary=100, seed=0, mixed=True)[0]]
    assert (min(lengths), max(lengths)) == (4, 32)


# ---- peers ---------------------------------------------------------------------------------------------------------

SMALL = ("--model", "nano", "--length", "16", "--batch", "8", "--examples", "20")


@pytest.mark.parametrize(
    ("padding", "widths"), [("max_length", [9, 9, 9]), ("batch", [8, 4, 7]), ("bucketed", [3, 6, 8])]
)
def test_batches_are_padded_as_named_and_hold_each_example_once(padding: str, widths: list[int]) -> None:
    lengths = [3, 8, 4, 2, 7, 6]
    data = peers.Encoded([[10 + i] * n for i, n in enumerate(lengths)], list(range(6)))
    batches = list(peers._batches(data, 2, 9, padding, None))
    assert [feed["input_ids"].shape[1] for feed in batches] == widths
    assert sorted(int(i) for feed in batches for i in feed["labels"]) == list(range(6))
    for feed in batches:
        for ids, mask, label in zip(feed["input_ids"], feed["attention_mask"], feed["labels"], strict=True):
            assert ids[mask == 1].tolist() == data.rows[int(label)]
            assert not ids[mask == 0].any()


def test_full_fine_tuning_trains_and_sends_every_parameter() -> None:
    row = run_peer("--peer", "hf-full", *SMALL)
    assert row["steps"] == 9  # 3 epochs of 8 + 8 + 4
    assert 0 <= row["update_bytes"] - 4 * row["trained_parameters"] < 16_384  # safetensors' header
    assert row["accuracy"] is None
    assert 0 < row["cpu_s_step"] < row["cpu_s_round"]
    assert row["peak_rss_mb"] > 100  # torch alone


@PEFT
def test_lora_trains_the_attention_linears_and_the_head() -> None:
    row = run_peer("--peer", "peft-best", *SMALL)
    # 2 blocks: rank 8 on q, k and output, 32 -> 32, and on v, 64 -> 32; head 64 -> 7.
    assert row["trained_parameters"] == 2 * 8 * (3 * (32 + 32) + (64 + 32)) + 64 * 7 + 7
    assert row["update_bytes"] < 5 * row["trained_parameters"]


def test_flowers_client_learns_and_returns_all_weights(tiny_dataset: Dataset, tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines = [json.dumps({"text": e.text, "label": e.label}) for e in getattr(tiny_dataset, name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = ["--peer", "flower", *SMALL, "--data", str(tmp_path), "--examples", "0", "--epochs", "6"]
    row = run_peer(*words, "--learning-rate", "3e-3")
    assert (row["examples"], row["test_examples"], row["steps"]) == (96, 24, 72)
    assert row["update_bytes"] > 4 * row["trained_parameters"]
    assert row["accuracy"] > 0.5  # of 4 labels, equally many of each
    assert row["loss"] < 1.0 < np.log(4)


def test_an_unknown_peer_is_named_in_one_sentence() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--peer", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("peers.py: there is no peer 'nobody'; there are hf-full")


# ---- the coordinator's ---------------------------------------------------------------------------------------------


def run_script(name: str, *words: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attacks_meet_aggregators_and_only_ours_survives_a_nan(tiny_dataset: Dataset, tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines = [json.dumps({"text": e.text, "label": e.label}) for e in getattr(tiny_dataset, name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = ("--devices", 10, "--examples", 96, "--warm-up", 1, "--rounds", 1, "--seeds", "0", "--partition", "iid")
    words += ("--attacks", "none,NaN,colluders", "--aggregators", "StreamingFedAvg,Flower: FedAvg")
    told = run_script("attacks.py", "--data", tmp_path, *words, "--out", tmp_path / "out.json")
    (run,) = json.loads((tmp_path / "out.json").read_text())
    cells = run["cells"]
    assert len(cells) == 2 * 10
    assert cells["Flower: FedAvg | NaN"]["accuracy"] == 0.0
    assert cells["ours: StreamingFedAvg | NaN"]["accuracy"] > 0.0
    assert (cells["ours: StreamingFedAvg | NaN"]["flagged"], cells["ours: StreamingFedAvg | NaN"]["sent"]) == (1, 1)
    assert cells["ours: StreamingFedAvg | colluders: against"]["sent"] == 2
    assert {cell["refused"] for cell in cells.values()} == {0}
    assert "| flagged by our screen | 0/0 | 1/1 |" in told


def test_the_benchmark_of_aggregation_compares_ways_with_the_same_bits() -> None:
    told = run_script("aggregation.py", "--devices", 5, "--mb", 0.01, "--repeats", 1).splitlines()
    assert [line.split(":")[0] for line in told[1:]] == ["sum", "ours", "Flower", "grid"]
    assert float(told[0].split()[-1]) < 1e-5


def test_the_benchmark_of_the_gate_tells_what_it_adds() -> None:
    told = run_script("gate.py", "--devices", 3, "--calls", 50)
    assert told.count("p99") == 3
    assert "the gate adds" in told


def test_fault_26_three_hours_of_conditions_coming_and_going_leave_a_device_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The soak of a day, for three hours of it: it works, it is interrupted, it never works when it may not, and does not grow."""
    from pocketfed.client_sdk import status

    monkeypatch.setattr(status, "OFTEN_S", 0.0)
    found = device_soak.live(3, 0, tmp_path, device_soak.build(tmp_path), rounds=5)
    assert found["wrong_steps"] == 0
    assert found["handed_in"] >= 5
    assert found["broken_off"] + found["gave_back"] >= 1
    assert abs(found["growth_files"]) <= 2
    assert found["growth_mb"] < 25


# ---- forms ---------------------------------------------------------------------------------------------------------


def test_forms_are_compared_on_the_same_student_and_examples(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, part in (("train", tiny_dataset.train), ("test", tiny_dataset.test)):
        rows = [json.dumps({"text": e.text, "label": e.label}) for e in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    out = tmp_path / "rows.jsonl"
    words = ["forms.py", "--data", str(tmp_path), "--model", "nano", "--forms", "full/float32,full/int8,head/topk:0.1"]
    words += ["--seeds", "0", "--rounds", "2", "--devices", "3", "--partition", "iid", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    forms.main()
    plain, coded, head = forms.whole_rows(out)
    assert [r["form"] for r in (plain, coded, head)] == ["full/float32", "full/int8", "head/topk:0.1"]
    assert plain["parameters"] == coded["parameters"] > head["parameters"]
    assert 3.8 < plain["bytes_up"] / coded["bytes_up"] < 4
    assert plain["bytes_down"] == coded["bytes_down"]
    assert "| full/int8 | 1 |" in capsys.readouterr().out
    forms.main()  # what is there is not done again
    assert len(forms.whole_rows(out)) == 3


def test_differences_are_taken_seed_by_seed() -> None:
    ours = [{"seed": 0, "accuracy": 0.90}, {"seed": 1, "accuracy": 0.80}, {"seed": 2, "accuracy": 0.5}]
    others = [{"seed": 1, "accuracy": 0.81}, {"seed": 0, "accuracy": 0.93}]
    assert forms.difference(ours, others, "accuracy") == "-2.0 ± 1.4"  # -3 and -1
    assert forms.difference(ours, [], "accuracy") == ""


# ---- algorithms ----------------------------------------------------------------------------------------------------


def written(dataset: Dataset, folder: Path) -> Path:
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        rows = [json.dumps({"text": e.text, "label": e.label, "user": e.user}) for e in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script of benchmarks/ in this process, and gives what it printed."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


def test_the_examples_in_what_benchmarks_share_are_true() -> None:
    for name in ("virtual", "personal"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_federations_of_lora_are_compared_on_the_same_devices_and_go_on_from_what_is_there(
    tiny_dataset: Dataset, tmp_path: Path, told: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    words = (
        "--data",
        written(tiny_dataset, tmp_path),
        "--train",
        "lora:4",
        "--devices",
        2,
        "--rounds",
        2,
        "--epochs",
        1,
    )
    words += ("--examples", 40, "--partition", "iid", "--seeds", 0, "--out", out)
    table = told("lora_federation", *words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    up = {r["variant"]: r["bytes_up"] for r in rows}
    assert len(up) == len(rows) == 5
    assert up["naive"] == up["exact"] > up["exact, unequal"] > up["FFA"]
    assert all((r["lost"] is not None) == r["variant"].startswith("exact") for r in rows)
    assert len({r["curve"][0] for r in rows}) == 1, "all start alike"
    assert table.count("| RoLoRA | 1 |") == 1
    told("lora_federation", *words)
    assert len(out.read_text().splitlines()) == len(rows)
    assert table.endswith(told("lora_federation", "--table", out))


def test_personal_heads_are_compared_device_by_device(tiny_dataset: Dataset, tmp_path: Path, told: Any) -> None:
    out = tmp_path / "rows.jsonl"
    words = ("--data", written(tiny_dataset, tmp_path), "--test", 4, "--least", 8, "--examples", 10, "--rounds", 2)
    words += ("--tune", 1, "--seeds", "0", "--out", out)
    table = told("personal", *words)
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["devices"] == 6  # users, each with 16 examples
    assert row["examples"] == [10] * 6
    assert {way: len(a) for way, a in row["accuracies"].items()} == dict.fromkeys(
        ("global", "personal head", "global, tuned", "alone"), 6
    )
    assert row["bytes_up"]["personal head"] < row["bytes_up"]["global"]
    assert "| personal head |" in table
    told("personal", *words)
    assert len(out.read_text().splitlines()) == 1


def test_rules_are_compared_as_the_share_of_hostile_devices_grows(
    tiny_dataset: Dataset, tmp_path: Path, told: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    words = (
        "--data",
        written(tiny_dataset, tmp_path),
        "--devices",
        10,
        "--examples",
        96,
        "--warm-up",
        1,
        "--rounds",
        1,
    )
    words += ("--partition", "iid", "--shares", "0,0.1,0.3", "--attacks", "flip ×10", "--aggregators", "FedAvg,Krum")
    table = told("hostile", *words, "--seeds", "0", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    attacks = {"sign flip ×10", "boast, flip ×10", "colluders: flip ×10"}
    assert {(r["attack"], r["share"], r["sent"]) for r in rows if r["share"]} == {
        (attack, share, sent) for attack in attacks for share, sent in ((0.1, 1), (0.3, 3))
    }
    assert {r["attack"] for r in rows if not r["share"]} == {"none"}
    assert {r["refused"] for r in rows} == {0}
    assert "| ours: StreamingKrum |" in table
    told("hostile", *words, "--seeds", "0", "--out", out)
    assert len(out.read_text().splitlines()) == len(rows)


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["load", "asynchrony"])
def test_the_examples_in_a_benchmark_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_load_benchmark_measures_check_ins_of_a_coordinator_that_serves() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), "--parts", "check-ins", "--seconds", "0.5"]
    more = ["--devices", "20", "--polls", "4", "--at-once", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["check-ins"]
    assert (row["devices"], row["polls"]) == (20, 4)
    assert "failures" not in row
    assert row["per_s"] > 0
    assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert row["rss_mb"] > 20


def test_a_simulation_is_measured_with_all_processes_below_it() -> None:
    """A child that holds 100 MB of its own and has used a tenth of a second of processor time."""
    tree = simulation.Tree()
    before = tree.peak_mb
    busy = "import time\nheld = bytearray(b'x') * 10**8\nwhile time.process_time() < 0.1: pass\nprint(len(held), flush=True)\ninput()"
    with subprocess.Popen(printing(busy), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "100000000\n"
        tree.look()
        child.communicate("\n")
    assert tree.peak_mb > before + 99
    assert tree.stop() > 0.09


def test_the_simulation_benchmark_hands_its_settings_to_every_variant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def interleaved(commands: dict[str, list[str]], repeats: int, threads: int, on_row: Any) -> dict[str, Any]:
        ran.extend(commands.values())
        row = {"seconds_round": 2.0, "accuracy": 0.5}
        return {name: [row if name == "in-process" else row | {"seconds_round": 5.0}] for name in commands}

    monkeypatch.setattr(simulation, "interleaved", interleaved)
    sizes = ["--devices", "10,20", "--data", str(tmp_path), "--flower-rate", "0.001"]
    simulation.main(["--variants", "in-process,flower", *sizes, "--out", str(tmp_path / "rows.jsonl")])
    assert [(c[c.index("--variant") + 1], c[c.index("--devices") + 1]) for c in ran] == [
        ("in-process", "10"), ("flower", "10"), ("in-process", "20"), ("flower", "20"),
    ]  # fmt: skip
    assert all(c[c.index("--flower-rate") + 1] == "0.001" for c in ran)
    assert "flower: (2.5, 2.5, 2.5) times in-process's seconds a round" in capsys.readouterr().out
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
