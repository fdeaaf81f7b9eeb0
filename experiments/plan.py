"""What a train step needs on a machine that is not here.

    python -m experiments.plan --config=experiments/configs/plan.py:7b-gla-1m --topology=v5e:16x16

compiles the train step of a language config for a TPU topology (which needs the `libtpu` wheel and
no TPU), prints bytes, FLOPs and communication of a device and writes `plan.json` into the workdir.
The exit status is 1 if the step does not fit. `--topology=h100:8` compiles for so many CPU devices:
XLA partitions the program alike, but its temporaries are those of a CPU. `--table` plans the
presets of `TABLE` for three topologies, saves each row in `benchmarks/plan.json` as soon as it is
done, and writes them into `docs/plan.md`; rows that the file holds are not made again.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict

from attn_lab.models import count_parameters
from attn_lab.training import (
    PARALLEL,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    on_mesh,
    run_main,
    state_sharding,
)
from attn_lab.training.sharding import batch_sharding
from experiments.configs import plan as presets
from experiments.language import build_model, loss_fn

ROOT = Path(__file__).parent.parent
CHIPS = json.loads((ROOT / "experiments/chips.json").read_text())
TABLE = {"v5e:16x16": 256, "v5p:8x8x8": 512, "v6e:16x16": 256}
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"
ITEM = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (4, 8, 16, 32, 64)}


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of `CHIP:SIZES`, such as v5e:16x16; h100:N is N CPU devices in their place.

    Raises:
      ValueError: an unknown chip or topology, or fewer CPU devices than asked for.
    """
    chip, _, sizes = topology.partition(":")
    if chip not in CHIPS:
        raise ValueError(f"topology must start with one of {', '.join(CHIPS)}; got {topology!r}")
    if chip != "h100":
        # Nothing is opened, so several processes may describe topologies at once.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except Exception as error:
            raise ValueError(f"topology {topology!r} cannot be described: {error}") from error
        return list(described.devices)
    devices = jax.devices("cpu")
    if len(devices) < int(sizes):
        raise ValueError(f"{topology} needs {sizes} CPU devices, there are {len(devices)}")
    return devices[: int(sizes)]


def abstract_step(config: ConfigDict, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The jitted train step of a language config, its state and its batch, without any array."""
    found = []

    def make():
        model = build_model(config, config.vocab_size)
        graphdef, state = create_state(model, optimizer)
        found.append(graphdef)
        return state

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    optimizer = make_optimizer(config.steps, **config.optimizer.to_dict())
    state = jax.eval_shape(make)
    shardings = state_sharding(state, mesh, PARALLEL)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    tokens = placed(tokens, batch_sharding(tokens, mesh))
    step = make_train_step(
        found[0],
        on_mesh(loss_fn, mesh, PARALLEL, config.sequence, config.sequence_order),
        optimizer,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=shardings,
    )
    batch = {"inputs": tokens, "targets": tokens}
    return step, jax.tree.map(placed, state, shardings), batch


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def shape_bytes(text: str) -> list[int]:
    """Bytes of every array that an HLO type names."""
    arrays = re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]", text)
    return [
        ITEM[kind] * math.prod(int(n) for n in sizes.split(",") if n) // 8 for kind, sizes in arrays
    ]


def groups_of(line: str, count: int) -> np.ndarray:
    """Which partitions exchange with each other in a collective, `[groups, members]`.

    HLO writes groups as lists, as a reshaped and transposed iota, or as axes of a mesh.

    Raises:
      ValueError: they are written in another way.
    """

    def iota(sizes, shape, order):
        sizes, shape, order = (x and [int(n) for n in x.split(",")] for x in (sizes, shape, order))
        return np.arange(count).reshape(sizes).transpose(order).reshape(shape)

    order = r"(?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\]{order}", line):
        return iota(found[2], found[1], found[3])
    ids = rf"(?:, device_ids=\(\[([\d,]+)\]{order}\))?"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\]{ids} \{{(.*?)\}}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        at = dict(zip(sizes, np.unravel_index(np.arange(count), list(sizes.values()))))
        # A group is of those who agree in all that is not named: an axis, or a factor of one.
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4]):
            size = int(size or sizes[name])
            after = sizes[name] // (int(before or 1) * size)
            at[name] = at[name] - at[name] // after % size * after
        group = np.ravel_multi_index(list(at.values()), list(sizes.values()))
        rows = np.argsort(group, kind="stable").reshape(len(np.unique(group)), -1)
        return iota(found[2] or str(count), "-1", found[3])[rows]
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        rows = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if "replica_groups={}" in line or "replica_groups" not in line:
        return np.arange(count)[None]
    raise ValueError(f"the groups of a collective cannot be read: {line[:300]}")


def axes_of(groups: np.ndarray, mesh: Mesh) -> str:
    """The mesh axes along which members of a group differ."""
    at = np.stack(np.unravel_index(groups, mesh.devices.shape))
    moved = (at != at[:, :, :1]).any((1, 2))
    return "+".join(name for name, differs in zip(mesh.axis_names, moved) if differs)


def computations(hlo: str) -> dict[str, list[str]]:
    """The instructions of every computation of a module; the entry is named ""."""
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line):
            current = found.setdefault("" if head[1] else head[2], [])
        elif line.startswith("  "):
            current.append(line.strip())
    return found


def trip_count(line: str, parts: dict[str, list[str]]) -> int:
    """How often the body of a `while` runs: as the compiler notes, or the bound of its condition.

    Raises:
      ValueError: there is no constant bound.
    """
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(parts[condition]))
    if not bounds:
        raise ValueError(f"the loop has no constant bound: {line[:200]}")
    return max(map(int, bounds))


def instructions(parts: dict[str, list[str]], name: str = "") -> Iterator[tuple[str, int, str]]:
    """Every instruction that is run, how often, and in which computation; of branches, all."""
    for line in parts[name]:
        yield line, 1, name
        if re.search(r"\basync-(?:update|done)\(", line):  # what its start has called already
            continue
        times = trip_count(line, parts) if re.search(r"\bwhile\(", line) else 1
        called = re.findall(r"(?:calls|body|_computation)=%?([\w.\-]+)", line)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
            called += [each.strip(" %") for each in branches[1].split(",")]
        if re.search(r"\bcall\(", line):
            called += re.findall(r"to_apply=%?([\w.\-]+)", line)
        for each in called:
            for inner, count, where in instructions(parts, each):
                yield inner, times * count, where


def members(shape: str) -> list[str]:
    """The members of a tuple's HLO type, which may be tuples."""
    found, depth, start = [], 0, 1
    for at, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            found.append(shape[start:at].strip())
            start = at + 1
    return found


def collectives(hlo: str, mesh: Mesh) -> dict[str, dict[str, int]]:
    """Bytes of communication by `kind axis` (axes of the mesh, with + between several).

    `payload` is what a device puts in or, for all-gather, gets out; `sent` is what it sends if
    rings carry it out: `(n - 1) / n` of the payload in a group of n, twice that for all-reduce, and
    the payload itself for collective-permute.
    """
    parts, found, chains = computations(hlo), {}, set()
    pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\("
    for line, times, where in instructions(parts):
        match = re.search(pattern, line)
        if not match:
            continue
        if chain := re.search(r'chain_id="(\d+)"', line):
            if chain[1] in chains:  # it goes on while others compute
                continue
            chains.add(chain[1])
        shapes, kind, start = match.groups()
        groups = groups_of(line, mesh.devices.size)
        n = groups.shape[1]
        axes = axes_of(groups, mesh)
        if not axes:
            continue
        if start and kind != "all-reduce":  # operands, results and maybe contexts
            shapes = members(shapes)[kind == "all-gather"]
        payload = times * sum(shape_bytes(shapes))
        if kind == "reduce-scatter" and not start:
            payload *= n
        if where.startswith("all-reduce-scatter"):  # a TPU's fusion with the slice of a device
            kind = "reduce-scatter"
        share = {"collective-permute": 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
        total = found.setdefault(f"{kind} {axes}", Counter())
        total["count"] += times
        total["payload"] += payload
        total["sent"] += round(payload * share)
    return {name: dict(found[name]) for name in sorted(found)}


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a jaxpr: loops count every turn, branches the longest.

    Those inside `shard_map` are multiplied by the devices of the axes it is manual over.
    """

    def flops(eqn):
        inner = [product_flops(x) for x in jaxprs_in_params(eqn.params)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                size = math.prod(eqn.invars[0].aval.shape[n] for n in contracted)
                return 2 * eqn.outvars[0].aval.size * size
            case "scan":
                return eqn.params["length"] * sum(inner)
            case "cond":
                return max(inner)
            case "shard_map":
                names, sizes = eqn.params["newly_manual_axes"], eqn.params["mesh"].shape
                return sum(inner) * math.prod(sizes[name] for name in names)
        return sum(inner)

    return sum(flops(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def model_flops(config: ConfigDict) -> tuple[int, int]:
    """Parameters N and the FLOPs of a step that any implementation needs.

    A token takes `6 N` (without the look-up of an embedding that is not the head), and for every
    number of a mixer's state `6 = 3 * 2` where it attends to it (the mean over causal positions),
    `12` where it decays, writes and reads, `18` where it erases as well.
    """
    model = jax.eval_shape(lambda: build_model(config, config.vocab_size))
    total = count_parameters(model)
    looked_up = 0 if model.tied else config.vocab_size * config.model.width
    per_token = 6 * (total - looked_up)
    for block in model.blocks:
        state = block.mixer.state_bytes(config.length) / 4
        if hasattr(block.mixer, "num_kv_heads"):
            window = block.mixer.window or config.length
            window = min(window, config.length)
            seen = 1 - (window - 1) / (2 * config.length)
            per_token += 6 * seen * state * block.mixer.num_heads / block.mixer.num_kv_heads
        else:
            per_token += (18 if "Delta" in type(block.mixer).__name__ else 12) * state
    return total, round(per_token * config.batch_size * config.length)


def compiled_numbers(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of a step."""
    step, state, batch = abstract_step(config, mesh)
    traced = step.trace(state, batch)
    began = time.perf_counter()
    numbers = {"flops": product_flops(traced.jaxpr)}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message, size = str(error), r"([\d.]+)([KMGT])"
        if asked := re.search(rf"HLO temporaries \({size}\) exceeds.*", message):
            others = 0
        elif asked := re.search(rf"Used {size} of [\d.]+[KMGT] hbm", message):
            others = device_bytes((state, batch))
        else:
            raise
        used = float(asked[1]) * 1024 ** ("KMGT".index(asked[2]) + 1)
        return numbers | {
            "refused": asked[0],
            "temporaries": max(0, round(used) - others),
            "collectives": {},
            "seconds": time.perf_counter() - began,
        }
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return numbers | {
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cost_analysis_flops": cost.get("flops", 0.0),
        "collectives": collectives(compiled.as_text(), mesh),
        "seconds": time.perf_counter() - began,
    }


def plan(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Memory, work and communication of a train step on a topology, by device.

    Returns:
      A dictionary for JSON: `bytes` by kind, `fits`, `flops`, `collectives`, `seconds` and more.

    Raises:
      ValueError: a topology or mesh that does not exist.
    """
    chip = CHIPS[topology.partition(":")[0]] if topology.partition(":")[0] in CHIPS else None
    devices = devices_of(topology)
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    _, state, batch = abstract_step(config, mesh)
    numbers = compiled_numbers(config, mesh)
    params, needed = model_flops(config)
    sizes = {
        "parameters": device_bytes((state.params, state.other)),
        "optimiser": device_bytes((state.opt_state, state.step)),
        "batch": device_bytes(batch),
        "temporaries": numbers["temporaries"],
    }
    share = {name: chip[name] / chip["devices"] for name in ("flops", "memory", "bandwidth")}
    share["interconnect"] = chip["interconnect"] / chip["devices"]
    used, count = sum(sizes.values()), len(devices)
    moved = 2 * (sizes["parameters"] + sizes["optimiser"] + sizes["temporaries"]) + sizes["batch"]
    sent = sum(each["sent"] for each in numbers["collectives"].values())
    seconds = {
        "compute": numbers["flops"] / count / share["flops"],
        "memory": moved / share["bandwidth"],
        "interconnect": sent / share["interconnect"],
    }
    bound = max(seconds.values())
    return {
        "topology": topology,
        "target": "CPU devices in place of GPUs" if topology.startswith("h100") else "TPU compiler",
        "devices": count,
        "mesh": dict(mesh.shape),
        "tokens": config.batch_size * config.length,
        "layers": config.model.num_layers,
        "compile_seconds": round(numbers["seconds"], 1),
        "number_of_parameters": params,
        "bytes": sizes,
        "bytes_used": used,
        "bytes_there": round(share["memory"]),
        "fits": used <= share["memory"],
        "refused": numbers.get("refused"),
        "flops": {
            "model": needed / count,
            "executed": numbers["flops"] / count,
            "cost_analysis": numbers.get("cost_analysis_flops", 0),
        },
        "collectives": numbers["collectives"],
        "seconds": seconds,
        "step_seconds": bound,
        "bound": max(seconds, key=seconds.get),
        "utilisation": needed / count / share["flops"] / bound,
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The plan as text."""
    yield f"{result['topology']}: {result['devices']} devices, mesh {result['mesh']}"
    yield f"{result['target']}, {result['layers']} layers in {result['compile_seconds']} s"
    for name, size in result["bytes"].items():
        yield f"{name:28} {size / 1e9:12.3f} GB"
    verdict = "fits" if result["fits"] else "does not fit"
    there = result["bytes_there"]
    yield f"{'together':28} {result['bytes_used'] / 1e9:12.3f} GB of {there / 1e9:.1f}: {verdict}"
    for name, flops in result["flops"].items():
        yield f"{'FLOPs ' + name:28} {flops / 1e12:12.3f} TFLOP"
    for name, each in result["collectives"].items():
        yield f"{name:28} {each['sent'] / 1e9:12.3f} GB sent in {each['count']}"
    for name, seconds in result["seconds"].items():
        yield f"{'at least, ' + name:28} {seconds:12.4f} s"
    yield f"{'utilisation at most':28} {result['utilisation']:12.1%} ({result['bound']})"


def markdown(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rows of the table in the documentation."""
    head = "preset", "topology", "data x fsdp x tensor x seq", "params", "optimiser", "temporaries"
    head += "of memory", "fits", "model / executed TFLOP", "sent", "step", "bound", "utilisation"
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for name, row in rows.items():
        gigabytes = [f"{row['bytes'][n] / 1e9:.1f}" for n in ("parameters", "optimiser")]
        sent = sum(each["sent"] for each in row["collectives"].values())
        over = (row["bytes_used"] - row["bytes_there"]) / 1e9
        cells = name.split(" ")[0], row["topology"], " x ".join(map(str, row["mesh"].values()))
        cells += *gigabytes, f"{row['bytes']['temporaries'] / 1e9:.1f}"
        cells += (f"{row['bytes_used'] / row['bytes_there']:.0%}",)
        cells += ("yes" if row["fits"] else f"no: {over:.1f} GB too much",)
        cells += (f"{row['flops']['model'] / 1e12:.0f} / {row['flops']['executed'] / 1e12:.0f}",)
        cells += f"{sent / 1e9:.1f}", f"{row['step_seconds']:.2f} s", row["bound"]
        cells += (f"{row['utilisation']:.0%}",)
        yield "| " + " | ".join(cells) + " |"


def table(path: Path) -> dict[str, dict[str, Any]]:
    """Plans of the presets on three topologies; those that a JSON file holds are not made again."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    for preset in presets.TABLE:
        for topology, count in TABLE.items():
            name = f"{preset} {topology}"
            if name not in rows:
                rows[name] = plan(presets.get_config(f"{preset}-{count}"), topology)
                print(*lines(rows[name]), sep="\n", end="\n\n", flush=True)
                write(rows, path)
    return {
        f"{preset} {name}": rows[f"{preset} {name}"] for preset in presets.TABLE for name in TABLE
    }


def with_table(text: str, rows: dict[str, dict[str, Any]]) -> str:
    """A text whose only table of that header has these rows.

    Raises:
      ValueError: there is no such table.
    """
    head, *body = markdown(rows)
    start = text.find(head)
    if start < 0:
        raise ValueError(f"there is no table that begins with {head}")
    old = re.match(r"(?:\|.*\n)+", text[start:])[0]
    return text.replace(old, "\n".join([head, *body]) + "\n")


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)


def main(config: ConfigDict, workdir: str) -> None:
    if flags.FLAGS.table:
        rows, page = table(ROOT / "benchmarks/plan.json"), ROOT / "docs/plan.md"
        page.write_text(with_table(page.read_text(), rows))
        return
    chip, _, sizes = flags.FLAGS.topology.partition(":")
    if chip == "h100" and sizes.isdigit():
        jax.config.update("jax_num_cpu_devices", int(sizes))
    result = plan(config, flags.FLAGS.topology)
    write(result, Path(workdir) / "plan.json")
    print(*lines(result), sep="\n")
    if not result["fits"]:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5e:16x16", "What to compile for.")
    flags.DEFINE_bool("table", False, "Whether to plan all presets.")
    run_main(main, Path(__file__).parent / "configs/plan.py", "runs/plan")
