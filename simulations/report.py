"""What a run has shown, for people: run.json, report.md and an HTML page that needs nothing but itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketfed.simulations.charts import STYLE, Series, chart, clean, escape, unit_of
from pocketfed.simulations.plots import LINE_NAMES, plots
from pocketfed.simulations.resuming import flat

FORMAT = 1
PACKAGES = ("pocketfed", "numpy", "onnxruntime", "flwr", "torch", "tokenizers", "SQLAlchemy")
# What devices do with an assignment, by its kind and phase, and why one ends that nobody lost (simulations/books.py).
DOING = {
    "train": {"download": "download", "training": "training", "upload": "upload"},
    "evaluate": {
        "download": "evaluation: download",
        "training": "evaluation: measuring",
        "upload": "evaluation: answer",
    },
}
TOLD = {
    "deadline": "the round's deadline came first",
    "surplus": "the round had enough updates",
    "absent": "the offer ended before the device came",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>
:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}}
td{{white-space:nowrap}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #8885;text-align:right}}
td:first-child,th:first-child{{text-align:left}}td.words{{white-space:normal;text-align:left;min-width:20rem}}
figure{{margin:1rem 0}}pre{{overflow-x:auto}}{style}</style></head><body>
{body}
</body></html>
"""
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class ReportError(ValueError):
    """A report that cannot be written, or read."""


def environment() -> dict[str, Any]:
    """What the run was made with; nothing that tells whose machine it was."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"python": platform.python_version(), "machine": machine, "packages": found}


def describe(result: Any, config: Mapping[str, Any], title: str) -> dict[str, Any]:
    """run.json: all that a report shows, and all that another needs to be compared with it.

    Args:
        result: a SimulationResult. config: as resolved, nested.
    """
    told: dict[str, Any] = result.to_dict()
    told["model"] = {k: v for k, v in told["model"].items() if k != "config"}
    return {"format": FORMAT, "title": title, "config": dict(config), "environment": environment(), **told}


def read_run(path: Path) -> dict[str, Any]:
    """run.json, or the folder that it lies in.

    Raises:
        ReportError: it is not there, or none of ours.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        known = run["format"] == FORMAT and run["rounds"][-1]["round"] >= 0 and isinstance(run["config"], dict)
    except OSError as error:
        raise ReportError(f"cannot read {file} ({error.strerror}); give the folder of a --report") from None
    except (ValueError, KeyError, TypeError, IndexError):
        known = False
    if not known:
        raise ReportError(f"{file} is not the run.json of a --report of this version; write it again")
    return dict(run)


def write_report(run: Mapping[str, Any], folder: Path, partition_svg: str = "") -> None:
    """run.json, report.html, report.md and its plots, into `folder`."""
    pictures = {**plots([run], ["federated"]), **({"partition": partition_svg} if partition_svg else {})}
    devices = run.get("devices") or {}
    values = sorted(devices["values"].values()) if devices.get("values") else []
    if values:
        ranked = Series("devices", list(enumerate(values, 1)), "line" if len(values) > 60 else "marks")
        title, y = f"Accuracy of each device, on {devices['source']}", "accuracy"
        pictures["devices"] = chart(title, "device, the worst-served first", y, [ranked], unit_y=True)
    tables = {
        "Final figures": figures([run], ["value"]),
        "Costs": _costs(run),
        "Where assignments ended": _lost(run),
        "Told to stop by the round": _stopped(run),
        "Data and model": _facts(run),
        "Configuration": _pairs(flat(run["config"])),
        "Environment": _pairs(flat(run["environment"])),
    }
    write_page(folder, run["title"], pictures, tables, {"run.json": json.dumps(run, indent=1, default=str) + "\n"})


# ---- tables -------------------------------------------------------------------------------------------------------------


def figure(value: Any) -> str:
    """
    >>> figure(0.97314), figure(1234567.0), figure(None), figure(12), figure(0.0)
    ('0.9731', '1,234,567', '', '12', '0')
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return clean(value, 300)
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def figures(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """One column a run: the test, the devices, and the lines beside them."""
    rows: list[list[str]] = []

    def row(name: str, values: Sequence[Any]) -> None:
        if any(v is not None for v in values):
            rows.append([name, *map(figure, values)])

    row("accuracy on the test", [run["final"]["accuracy"] for run in runs])
    row("loss on the test", [run["final"]["loss"] for run in runs])
    for key, what in (("mean", "mean"), ("p10", "10th percentile"), ("worst_decile", "worst decile")):
        row(f"accuracy over devices, {what}", [(run.get("devices") or {}).get(key) for run in runs])
    for name, told in LINE_NAMES.items():
        lines = [(run.get("lines") or {}).get(name) or {} for run in runs]
        row(f"{told}: accuracy on the test", [line.get("accuracy") for line in lines])
        row(f"{told}: loss on the test", [line.get("loss") if line.get("accuracy") is None else None for line in lines])
        row(f"{told}: 10th percentile on the test", [(line.get("on_test") or {}).get("p10") for line in lines])
        for key, what in (("mean", "mean"), ("p10", "10th percentile"), ("worst_decile", "worst decile")):
            row(f"{told}: over devices, {what}", [(line.get("own") or {}).get(key) for line in lines])
    for key, told in (("bytes_up", "bytes up a device"), ("bytes_down", "bytes down a device")):
        row(told, [(run.get("costs") or {}).get(key) for run in runs])
    row("training, s a device", [(run.get("costs") or {}).get("device_seconds") for run in runs])
    row("all phases, s a device", [(run.get("costs") or {}).get("worked_seconds") for run in runs])
    row("estimated energy, J a device", [(run.get("costs") or {}).get("joules") for run in runs])
    row("wall clock, s", [(run.get("costs") or {}).get("wall_s") for run in runs])
    row("the fleet's clock", [_passed(run) for run in runs])
    row("test examples", [run["final"]["test_examples"] for run in runs])
    return ["", *names], rows


def _passed(run: Mapping[str, Any]) -> str | None:
    seconds = (run.get("costs") or {}).get("virtual_s")
    return None if seconds is None else f"{figure(seconds / unit_of(seconds).seconds)} {unit_of(seconds).name}"


def _costs(run: Mapping[str, Any]) -> Table:
    costs = run.get("costs") or {}
    if not costs:
        return ["", "value"], []
    whose = {"measured": "as measured here", "fleet": "by the fleet's model"}
    uncounted = (costs.get("uncounted_bytes_up", 0), costs.get("uncounted_bytes_down", 0))
    rows = [
        ["devices", figure(costs["devices"])],
        ["bytes up a device, mean and most", f"{figure(costs['bytes_up'])}, {figure(costs['most_bytes_up'])}"],
        ["bytes down a device, mean and most", f"{figure(costs['bytes_down'])}, {figure(costs['most_bytes_down'])}"],
        ["of that in no round, up and down", ", ".join(map(figure, uncounted))],
        [f"training, s a device, {whose.get(costs['seconds_are'], '')}", figure(costs["device_seconds"])],
        ["training, s of all devices", figure(costs["total_device_seconds"])],
        ["download, training and upload, s a device", figure(costs.get("worked_seconds"))],
        ["download, training and upload, s of all devices", figure(costs.get("total_worked_seconds"))],
        ["estimated energy, J a device", figure(costs["joules"])],
        ["estimated energy, J of all devices", figure(costs["total_joules"])],
        ["the estimate", _energy_model(costs)],
    ]
    return ["", "value"], [row for row in rows if row[1] not in ("", "0, 0")]


def _energy_model(costs: Mapping[str, Any]) -> str:
    energy, tiers = costs["energy"], costs.get("tier_watts")
    if tiers:
        watts = ", ".join(f"{clean(tier, 60)} {value:g} W" for tier, value in tiers.items())
        return f"watts x seconds of download, training and upload, which also drain the batteries: {watts}"
    sent = f"{energy['joules_per_mb_up']:g} J a MB up + {energy['joules_per_mb_down']:g} J a MB down"
    return f"{energy['watts']:g} W x seconds of training + {sent}"


def _fates(run: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """With a fleet: by kind of assignment, the counts of all rounds together."""
    found: dict[str, Counter[str]] = {}
    for r in run["rounds"]:
        for kind, counts in (r.get("fates") or {}).items():
            found.setdefault(kind, Counter()).update(counts)
    return {kind: found[kind] for kind in DOING if kind in found}


def _lost(run: Mapping[str, Any]) -> Table:
    """By phase: who began it, and who was lost in it, had to go or could not."""
    rows = [
        [name, figure(fate[f"began {phase}"]), figure(fate[phase]), _share(fate[phase], fate[f"began {phase}"])]
        for kind, fate in _fates(run).items()
        for phase, name in DOING[kind].items()
    ]
    return ["phase", "began it", "lost in it", "of those that began it"], rows


def _stopped(run: Mapping[str, Any]) -> Table:
    rows = [
        [f"evaluation: {told}" if kind == "evaluate" else told, figure(fate[why]), _share(fate[why], fate["offered"])]
        for kind, fate in _fates(run).items()
        for why, told in TOLD.items()
        if fate[why]
    ]
    return ["why", "assignments", "of all offered"], rows


def _share(part: int, whole: int) -> str:
    """
    >>> _share(1, 8), _share(0, 0)
    ('12.5%', '')
    """
    return f"{part / whole:.1%}" if whole else ""


def _facts(run: Mapping[str, Any]) -> Table:
    facts = {f"data: {k}": v for k, v in (run.get("data") or {}).items()}
    facts |= {f"rows left out: {k}": v for k, v in (run.get("skipped") or {}).items()}
    facts |= {f"model: {k}": v for k, v in run["model"].items() if not isinstance(v, (dict, list))}
    facts |= {"test": run["final"]["test_source"], "parameters, SHA-256": run["final"]["parameters_sha256"]}
    if run.get("devices"):
        facts["devices are measured on"] = run["devices"]["source"]
    for name, line in (run.get("lines") or {}).items():
        told = [f"{line['epochs']} epochs"] if line["epochs"] else []
        told += [f"{line['devices']} devices"] if line["devices"] else []
        told += [line["why"]] if line.get("why") else []
        if told:
            facts[f"line: {LINE_NAMES.get(name, name)}"] = ", ".join(told)
    return _pairs(facts)


def _pairs(values: Mapping[str, Any]) -> Table:
    return ["", "value"], [[clean(k), figure(v)] for k, v in values.items()]


# ---- files --------------------------------------------------------------------------------------------------------------


def write_page(
    folder: Path, title: str, pictures: Mapping[str, str], tables: Mapping[str, Table], more: Mapping[str, str]
) -> None:
    """Each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.svg": standalone(svg) for name, svg in pictures.items()}
    files |= {
        "report.html": to_html(title, pictures, tables),
        "report.md": to_markdown(title, pictures, tables),
        **more,
    }
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, folder / name)


def standalone(svg: str) -> str:
    """An SVG that was made to stand in a page, as a file."""
    if "xmlns=" in svg.split(">", 1)[0]:
        return svg
    head, tail = svg.split(">", 1)
    return f"{head.replace('<svg', '<svg xmlns=' + chr(34) + 'http://www.w3.org/2000/svg' + chr(34), 1)}><style>{STYLE}</style>{tail}"


def to_html(title: str, pictures: Mapping[str, str], tables: Mapping[str, Table]) -> str:
    body = [f"<h1>{escape(title)}</h1>"]
    body += [
        f"<figure>{svg.replace(' xmlns=' + chr(34) + 'http://www.w3.org/2000/svg' + chr(34), '')}</figure>"
        for svg in pictures.values()
    ]
    for name, (columns, rows) in tables.items():
        if not rows:
            continue
        head = "".join(f"<th>{escape(c)}</th>" for c in columns)
        lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        body.append(f"<h2>{escape(name)}</h2><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _cell(text: str) -> str:
    kind = ' class="words"' if len(text) > 60 and " " in text else ""  # a sentence may be broken, a figure not
    return f"<td{kind}>{escape(text, 300)}</td>"


def to_markdown(title: str, pictures: Mapping[str, str], tables: Mapping[str, Table]) -> str:
    out = [f"# {quoted(title)}", "", *(f"![{name}]({name}.svg)" for name in pictures)]
    for name, (columns, rows) in tables.items():
        if rows:
            out += ["", f"## {quoted(name)}", "", _row(columns), "|---" * len(columns) + "|", *map(_row, rows)]
    return "\n".join(out) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(quoted, cells)) + " |"


def quoted(text: object) -> str:
    """As plain text in Markdown.

    >>> quoted("a|b <i>[x](y)")
    'a\\\\|b \\\\<i\\\\>\\\\[x\\\\](y)'
    """
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", clean(text, 300))
