"""Will it fit? The programs of a config compiled for a TPU topology, without the TPU (extra `tpu`).

    python scripts/aot_check.py --config configs/mesc_gpt2.yaml --topology v5e:2x4 --mesh.data 1 --mesh.fsdp -1

For each program: bytes per chip, what goes over the links, FLOPs, and with --largest the largest batch that fits. Exit code 1 where a
program does not fit, 2 where the question is wrong. Every setting of the config may be given on the command line as usual.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from therapy_jax import config as config_module
from therapy_jax import run
from therapy_jax.config import Config, ConfigError
from therapy_jax.run import console, escape

PROGRAMS = ("sft", "sampler", "ppo")
SCALING = ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
MB = 1e6


def main(config: Config, asked: argparse.Namespace) -> bool:
    """-> whether everything fits."""
    from therapy_jax import aot, sharding

    mesh = sharding.make_mesh(config.mesh, aot.topology_devices(asked.topology))
    chip = aot.CHIPS.get(mesh.devices.flat[0].device_kind)
    if chip is None and asked.largest:
        raise ConfigError(
            f"--largest: the memory of a {mesh.devices.flat[0].device_kind} is not written down in aot.CHIPS"
        )
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    console.print(f"[bold]aot_check[/]: {escape(asked.topology)}, {mesh.size} chips, {axes}")
    known, reports = aot.programs(config, mesh), []
    for name in asked.programs:
        program = known[name]
        batch = program.batch_size
        sharding.check_divides(
            batch // (program.multiple // sharding.row_shards(mesh)), mesh, f"{name}: the batch {batch}, in parts,"
        )
        report = measure(program, batch, mesh, config, asked)
        reports.append(report)
        if asked.largest:
            assert chip is not None
            reports.append(largest(program, report, mesh, chip.memory, config, asked))
    console.print(table(reports, chip))
    for report in reports:
        if report.fits:
            console.print(told(report, chip))
    return all(report.fits for report in reports if report.batch == known[report.program].batch_size)


def measure(program: Any, batch: int, mesh: Any, config: Config, asked: argparse.Namespace, **more: Any) -> Any:
    """Compile, and add a line to --out: a long series loses nothing."""
    from therapy_jax import aot

    console.print(f"compiling {program.name} at batch {batch} ...")
    chip = aot.CHIPS.get(mesh.devices.flat[0].device_kind)
    report, text = aot.compile_program(program, batch, mesh)
    if asked.out:
        path = Path(asked.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "topology": asked.topology, "chips": mesh.size, **more, "mesh": dict(mesh.shape), "model": config.model.name or "from scratch",
            "remat": config.model.remat, "prompt": config.prompt.max_tokens, "reply": config.sampling.max_new_tokens,
            "row_tokens": config.sft.row_tokens, "value_head": config.ppo.value_head, **report._asdict(),
            "products": report.flops / chip.flops if chip else 0.0,
            "links": sum(report.sent.values()) / chip.link if chip else 0.0,
        }  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if asked.text and text:
        Path(asked.text).mkdir(parents=True, exist_ok=True)
        (Path(asked.text) / f"{program.name}_{batch}.hlo").write_text(text, encoding="utf-8")
    return report


def largest(program: Any, first: Any, mesh: Any, memory: float, config: Config, asked: argparse.Namespace) -> Any:
    """The largest batch that fits: a second compile, a line through both, and a compile that confirms. Where the compiler
    refuses what the line promised, a sixteenth less is tried, and so on."""
    from therapy_jax import aot

    step = program.multiple
    other = first.batch * 2 if first.fits else max(first.batch // 2 // step * step, step)
    second = first if other == first.batch else measure(program, other, mesh, config, asked)
    small, large = sorted((first, second), key=lambda report: report.batch)
    best = max((r for r in (small, large) if r.fits), key=lambda r: r.batch, default=None)
    known = small.total and large.total and small is not large
    wanted = aot.line(small, large, memory) // step * step if known else small.batch
    wanted = wanted if large.fits else min(wanted, (large if best else small).batch - step)
    while wanted > (best.batch if best else 0):
        found = measure(program, wanted, mesh, config, asked)
        if found.fits:
            return found
        wanted = min(wanted - step, wanted * 15 // 16 // step * step)
    return best or small


def scaling(config: Config, asked: argparse.Namespace) -> bool:
    """The SFT step on slices of 4 to 256 chips: so many rows a chip, and so many rows in all (both from --scaling). What --out
    holds already is not compiled again."""
    import aot_scaling  # scripts/aot_scaling.py

    from therapy_jax import aot, sharding

    each, together = asked.scaling
    out = Path(asked.out or "results/aot_scaling.jsonl")
    asked.out = str(out)
    for topology in SCALING:
        asked.topology = topology
        mesh = sharding.make_mesh(config.mesh, aot.topology_devices(topology))
        program = aot.programs(config, mesh)["sft"]
        for kind, batch in (("weak", each * mesh.size), ("strong", together)):
            done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
            if not any(line.get("kind") == kind and line["topology"] == topology for line in done):
                measure(program, batch, mesh, config, asked, kind=kind)
    lines = [line for line in map(json.loads, out.read_text().splitlines()) if line.get("kind")]
    picture = str(out.with_suffix(".png"))
    aot_scaling.draw(lines, aot.CHIPS["TPU v5 lite"], picture)
    console.print(f"drawn: {escape(picture)}")
    return all(line["fits"] for line in lines)


def table(reports: list[Any], chip: Any) -> Any:
    from rich.table import Table

    shown = Table(title="MB of one chip" + (f", which has {chip.memory / MB:,.0f}" if chip else ""))
    for name in (
        "program",
        "batch",
        "fits",
        "arguments",
        "temporary",
        "in place",
        "total",
        "sent",
        "TFLOP",
        "compiled",
    ):
        shown.add_column(name, justify="left" if name == "program" else "right")
    for r in reports:
        sizes = [f"{x / MB:,.0f}" for x in (r.arguments, r.temporaries, r.aliased, r.total, sum(r.sent.values()))]
        fits = "[green]yes[/]" if r.fits else "[red]no[/]"
        shown.add_row(r.program, str(r.batch), fits, *sizes, f"{r.flops / 1e12:,.1f}", f"{r.seconds:.0f} s")
    return shown


def told(report: Any, chip: Any) -> str:
    """What a program sends, and the least time that its products and the links take at the chip's public rates."""
    kinds = ", ".join(
        f"{count} {kind} ({report.sent[kind] / MB:,.0f} MB)" for kind, count in sorted(report.count.items())
    )
    depends = f"; up to {report.uncertain / MB:,.0f} MB of it as the data has it" if report.uncertain > MB else ""
    rates = ""
    if chip is not None:
        products, links = report.flops / chip.flops, sum(report.sent.values()) / chip.link
        rates = f"; at least {products * 1e3:,.1f} ms of products, {links * 1e3:,.1f} ms of links"
    return f"{report.program}, batch {report.batch}: {kinds or 'no collectives'}{depends}{rates}"


def markdown(path: Path) -> str:
    """The lines of --out as a table: of each program the largest batch that fits, and the smallest that does not."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells: dict[tuple[Any, ...], list[Any]] = {}
    for x in lines:
        remat = ", remat" if x["remat"] and x["program"] != "sampler" else ""
        critic = f", {x['value_head']} critic" if x["program"] == "ppo" else ""
        shape = f"{x['row_tokens']}" if x["program"] == "sft" else f"{x['prompt']} + {x['reply']}"
        what = f"{x['program']}, {shape} tokens{remat}{critic}"
        cells.setdefault((x["model"], x["topology"], "×".join(map(str, x["mesh"].values())), what), []).append(x)
    rows = [
        "| model | topology | mesh | program | batch | GB a chip | sent | products / links, at least | does not fit |"
    ]
    rows.append("|---|---|---|---|---:|---:|---:|---:|---:|")
    for key, of in cells.items():
        best = max((x for x in of if x["fits"]), key=lambda x: x["batch"], default=None)
        beyond = min((x["batch"] for x in of if not x["fits"]), default="")
        shown = ["none", "", "", ""]
        if best is not None:
            sent = sum(best["sent"].values())
            times = f"{best['products'] * 1e3:,.0f} / {best['links'] * 1e3:,.0f} ms" if best["products"] else ""
            shown = [f"{best['batch']:,}", f"{best['total'] / 1e9:.1f}", f"{sent / 1e9:.2f} GB", times]
        rows.append("| " + " | ".join([*key, *shown, str(beyond)]) + " |")
    return "\n".join(rows)


def parse() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4, v6e:4x4")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--largest", action="store_true", help="find the largest batch that fits")
    parser.add_argument(
        "--scaling",
        nargs=2,
        type=int,
        metavar=("ROWS_A_CHIP", "ROWS"),
        help="the SFT step on 4 to 256 chips instead, drawn",
    )
    parser.add_argument("--out", help="JSON Lines file that gets a line for each compiled program")
    parser.add_argument("--table", metavar="FILE.jsonl", help="compile nothing: what --out wrote, as a table")
    parser.add_argument("--text", help="folder for the compiled programs' text (XLA's HLO)")
    asked, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    return asked, config_module.parse(rest, description=__doc__)


if __name__ == "__main__":
    asked, config = parse()
    if asked.table:
        print(markdown(Path(asked.table)))
        sys.exit(0)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is to be asked of a TPU that may be here; its compiler is enough
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no chip to fight over
    run.deepen_compiler_stack()
    try:
        sys.exit(0 if (scaling if asked.scaling else main)(config, asked) else 1)
    except ConfigError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
