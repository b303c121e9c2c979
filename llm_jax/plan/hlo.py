"""What a compiled program sends between devices, and how long the compiler thinks it takes: read from its HLO text.

The text is what jax.stages.Compiled.as_text() gives on CPU and TPU. The program is scheduled: instructions stand in the
order in which a device runs them.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

from llm_jax.parallel.chips import ON_CHIP, Chip
from llm_jax.plan.costs import ATTENTION

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Transfers between slices are send and recv, carried by the runtime (Megascale), which names the collective.
MEGASCALE = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip

OPERATION = r'op_name="([^"]*)"'
IOTA = r"(\[[\d,]+\])<=(\[[\d,]+\])(?:T\(([\d,]+)\))?"
# Cycles a second, where the published peak of bfloat16 is that many times the multipliers of the chip's matrix units.
# v4: arXiv:2304.01433, table 4; v7x: a guess.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "v7x": 2.2e9}
ICI_LATENCY = 1e-6  # seconds a hop: assumed
DCN_LATENCY = 20e-6  # seconds: assumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of exchange, by the axes of the mesh along which the devices of a group lie.

    bytes: of one device's whole array, once: what an all-gather makes, a reduce-scatter takes, an all-reduce takes and
    makes, a permute or an all-to-all sends.
    count: executions in a run of the program; loops whose length the text does not tell count as run once, and every
    branch of a conditional as taken.
    across_slices: over the data-centre network. A collective over the devices of several slices is compiled as one
    within each slice (listed by itself) and one between them.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int  # of a group; of a permute within a slice: the two of a pair
    bytes: int
    asynchronous: bool  # other work is scheduled between its start and its end
    across_slices: bool
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all executions, at least: by the best algorithm, on a ring."""
        rounds = {"all-reduce": 2, "collective-permute": self.devices / max(1, self.devices - 1)}.get(self.kind, 1)
        return self.count * self.bytes * rounds * (self.devices - 1) / self.devices


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All that the program of one step exchanges, equal ones added up, the most bytes sent first."""
    program, counts = _Program(text, mesh), collections.Counter()

    def visit(computation: str, times: int) -> None:
        for step in program.steps(computation):
            for collective in step.starts.values():
                if collective.devices > 1:
                    counts[collective] += times
            for called in step.calls:
                visit(called, times * (step.times or 1))

    visit(program.entry, 1)
    found = [dataclasses.replace(collective, count=count) for collective, count in counts.items()]
    return sorted(found, key=lambda collective: -collective.sent)


def windowed_einsums(text: str) -> list[str]:
    """Matrix products that the partitioner made loops of, to hide an exchange: at the sizes of a Transformer these cost
    more than they hide, and llm_jax gathers weights by hand to avoid them. Each as the program names it."""
    loops = re.findall(r"^.* while\(.*\bbody=%?\S*windowed_dot_general.*$", text, re.MULTILINE)
    names = (re.search(OPERATION, loop) for loop in loops)
    return sorted({name[1] if name else "without a name" for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the compiler expects of a run of the program: compiler-estimated, and never measured."""

    seconds: float
    compute: float  # seconds of it in which the core computes or moves memory
    kernels: float  # seconds of that in Pallas kernels
    waits: dict[str, float]  # seconds of it in which the core waits for others, by kind of collective and axes
    unpriced: tuple[str, ...]  # whose time is not in it: kernels without a known cost, loops without a known length


def estimate(text: str, mesh: jax.sharding.Mesh, chip: Chip) -> Estimate:
    """The program of a TPU replayed in its own schedule.

    Time is the compiler's estimated_cycles of each instruction. Collectives, for which it writes none, take what their
    bytes need on the links (see _seconds), one after the other, while the core goes on until the schedule waits for
    them. Pallas kernels take their FLOPs at the share of the peak that the formulas assume for attention. A loop is its
    body times its length.

    Nothing of this was checked on a TPU: believe comparisons of two programs on one kind of chip more than the seconds.
    """
    program, clock = _Program(text, mesh), CLOCKS[chip.name]
    duration = functools.cache(lambda collective: _seconds(collective, mesh, chip))
    waits, compute, kernels, unpriced = collections.Counter(), [0.0], [0.0], set()

    def run(computation: str, times: int) -> float:
        now, free, ends = 0.0, {False: 0.0, True: 0.0}, {}
        for step in program.steps(computation):
            for key, collective in step.starts.items():
                network = collective.across_slices
                free[network] = max(now, free[network]) + duration(collective)
                ends[key] = (free[network], collective)
            cycles = step.instruction.attribute(r'"estimated_cycles":"(\d+)"')
            busy = int(cycles or 0) / clock
            if "tpu_custom_call" in step.instruction.attributes:
                flops = _kernel_flops(step.instruction)
                if flops is None:
                    unpriced.add(re.sub(r"[.\d]+$", "", step.instruction.name))
                else:
                    busy = flops * chip.devices / chip.flops / ATTENTION
                    kernels[0] += busy * times
            compute[0] += busy * times
            now += busy
            for end, collective in (ends[key] for key in step.waits if key in ends):
                if end > now:
                    waits[f"{collective.kind} {'+'.join(collective.axes)}"] += (end - now) * times
                    now = end
            if step.times is None:
                unpriced.add(f"all but one round of {step.instruction.attribute(OPERATION) or step.instruction.name}")
            rounds = step.times or 1
            durations = [run(called, times * rounds) for called in step.calls]
            now += rounds * (max(durations) if step.instruction.opcode == "conditional" else sum(durations))
        return now

    seconds = run(program.entry, 1)
    return Estimate(
        seconds=seconds, compute=compute[0], kernels=kernels[0], waits=dict(waits), unpriced=tuple(sorted(unpriced))
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: str
    attributes: str

    def sources(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.operands)

    def called(self, *attributes: str) -> list[str]:
        """Computations named by these attributes."""
        lists = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for names in lists for name in re.findall(r"[\w.\-]+", names)]

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(slots=True)
class _Step:
    """What running one instruction means. Exchanges go by a key, under which another step waits for them."""

    instruction: _Instruction
    starts: dict[str, Collective] = dataclasses.field(default_factory=dict)
    waits: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    times: int | None = 1  # each of calls; None: nothing tells


class _Program:
    def __init__(self, text: str, mesh: jax.sharding.Mesh):
        self.computations, self.entry = _parse(text)
        self.mesh = mesh
        self.slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
        # Devices are numbered as in the mesh; a program for several slices numbers those of its own slice.
        partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
        self.num_partitions = int(partitions[1]) if partitions else 1
        everywhere = self.num_partitions == mesh.size
        own = np.arange(mesh.size) if everywhere else np.flatnonzero(self.slices == self.slices[0])
        self.coordinates = np.stack(np.unravel_index(own, mesh.devices.shape), axis=-1)

    def steps(self, computation: str) -> Iterator[_Step]:
        instructions = self.computations[computation]
        # An asynchronous exchange may be a chain of fusions, each with the same channel: the first starts it, others
        # compute meanwhile, the last waits for it.
        inner, last, received = {}, {}, {}
        for instruction in instructions:
            if instruction.opcode in ("fusion", "async-start", "call-start", "custom-call"):
                inner[instruction.name] = self._inner(instruction)
                last |= dict.fromkeys(inner[instruction.name], instruction.name)
            elif instruction.opcode == "recv":
                received[_rendezvous(instruction)] = instruction.shape
        started = {}
        for instruction in instructions:
            step, opcode = _Step(instruction), instruction.opcode
            source = next(iter(instruction.sources()), "")
            if opcode.removesuffix("-start") in KINDS:
                step.starts[instruction.name] = self._collective(instruction, asynchronous=opcode.endswith("-start"))
                if not opcode.endswith("-start"):
                    step.waits = (instruction.name,)
            elif opcode in ("async-start", "call-start"):
                for key, collective in inner[instruction.name].items():
                    step.starts[key] = dataclasses.replace(collective, asynchronous=True)
                started[instruction.name] = tuple(step.starts)
            elif opcode == "async-update":
                started[instruction.name] = started.get(source, (source,))
            elif opcode == "send" and "xla_megascale" in instruction.attributes:
                key = _rendezvous(instruction)
                step.starts[key] = self._between_slices(instruction, received.get(key, instruction.shape))
            elif opcode == "recv" and "xla_megascale" in instruction.attributes:
                started[instruction.name] = (_rendezvous(instruction),)
            elif opcode.endswith("-done"):
                step.waits = started.get(source, (source,))
            elif opcode in ("fusion", "custom-call"):
                for key, collective in inner[instruction.name].items():
                    if last[key] == instruction.name:
                        step.waits += (key,)
                    if key not in started:
                        started[key] = (key,)
                        step.starts[key] = dataclasses.replace(collective, asynchronous=last[key] != instruction.name)
            elif opcode == "while":
                step.calls, step.times = tuple(instruction.called("body")), self._trip_count(instruction, computation)
            elif opcode in ("call", "conditional"):
                step.calls = tuple(
                    instruction.called("to_apply", "branch_computations", "true_computation", "false_computation")
                )
            yield step

    def _inner(self, instruction: _Instruction) -> dict[str, Collective]:
        """Exchanges within what an instruction calls, by their channel."""
        found = {}
        for name in instruction.called("calls", "to_apply", "called_computations"):
            for called in self.computations.get(name, ()):
                if called.opcode in KINDS:
                    scatters = name.startswith("all-reduce-scatter")
                    # Each of these fusions ends what it starts, and some have the same channel.
                    key = instruction.name if scatters else called.attribute(r"channel_id=(\d+)") or called.name
                    found[key] = self._collective(called, kind="reduce-scatter" if scatters else called.opcode)
                else:
                    found |= self._inner(called)
        return found

    def _collective(self, instruction: _Instruction, asynchronous: bool = False, kind: str | None = None) -> Collective:
        opcode = instruction.opcode.removesuffix("-start")
        groups = _groups(instruction.attributes, self.num_partitions)
        if groups.max() >= len(self.coordinates):
            raise ValueError(
                f"{instruction.name} names device {groups.max()}, and the mesh has {len(self.coordinates)}"
            )
        members = self.coordinates[groups]  # [groups, devices of a group, axes of the mesh]
        shape = instruction.shape
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shape = _elements(shape)[1]  # of (operands, results, ...)
        size = _num_bytes(shape) * (groups.shape[1] if opcode == "reduce-scatter" else 1)
        slices = self.slices[np.ravel_multi_index(tuple(np.moveaxis(members, -1, 0)), self.mesh.devices.shape)]
        return Collective(
            kind=kind or opcode,
            axes=self._axes(members),
            devices=groups.shape[1],
            bytes=size,
            asynchronous=asynchronous,
            across_slices=bool((slices != slices[:, :1]).any()),
        )

    def _between_slices(self, send: _Instruction, received: str) -> Collective:
        each = [np.argwhere(self.slices.reshape(self.mesh.devices.shape) == index) for index in np.unique(self.slices)]
        return Collective(
            kind=MEGASCALE[send.attribute(r'transfer_type="(\w+)"')],
            axes=self._axes(np.stack(each, axis=1)),
            devices=len(each),
            bytes=max(_num_bytes(_elements(shape)[0]) for shape in (send.shape, received)),
            asynchronous=True,
            across_slices=True,
        )

    def _axes(self, members: np.ndarray) -> tuple[str, ...]:
        """Axes of the mesh along which the devices of a group [groups, devices, axes] differ."""
        differ = (members != members[:, :1]).any((0, 1))
        return tuple(name for name, differs in zip(self.mesh.axis_names, differ, strict=True) if differs)

    def _trip_count(self, loop: _Instruction, computation: str) -> int | None:
        """CPU's compiler writes it down. TPU's leaves `counter < bound` as the condition; the counter goes up by 1.
        None: it depends on the data."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(known)
        (condition,) = loop.called("condition")
        inside = {instruction.name: instruction for instruction in self.computations[condition]}
        outside = {instruction.name: instruction for instruction in self.computations[computation]}
        compared = [inside[name] for i in inside.values() if i.opcode == "compare" for name in i.sources()]
        bounds = [int(i.operands) for i in compared if i.opcode == "constant"]
        counters = [i.attribute(r"index=(\d+)") for i in compared if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            return None
        (initial,) = loop.sources()
        first = outside.get(outside[initial].sources()[int(counters[0])])
        while first and first.opcode == "copy":
            first = outside.get(first.sources()[0])
        return bounds[0] - (int(first.operands) if first and first.opcode == "constant" else 0)


def _kernel_flops(call: _Instruction) -> float | None:
    """What a Pallas kernel states, as that of ragged_dot does; None: nothing is known.

    Splash attention states nothing. Under a causal mask, with heads that the matrix unit sees padded to 128, it
    multiplies 2 times forward (scores, values), and backward 3 times for queries and 4 for keys and values.
    """
    if stated := call.attribute(r'"cost_estimate":\{"flops":"(\d+)"'):
        return float(stated)
    kernel = re.match(r"splash_mha_(fwd|dq|dkv)_", call.name)
    layouts = call.attribute(r"operand_layout_constraints=\{(.*?\})\}")
    if not kernel or not layouts:
        return None
    # [B, N, T, H] and [B, K, S, H] after what tells which blocks are masked; B is left out if it is 1.
    queries, keys = (_integers(sizes) for sizes in re.findall(r"f(?:16|32)\[([\d,]+)\]", layouts)[:2])
    *heads, length, width = queries
    product = 2 * math.prod(heads) * length * keys[-2] * max(width, 128) / 2
    return {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]] * product


def _seconds(collective: Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """Of one execution, with all links of the group's chips in use; bytes as in Collective.sent."""
    one = dataclasses.replace(collective, count=1)
    if collective.across_slices:
        return one.sent * chip.devices / chip.dcn + DCN_LATENCY
    # The group of the first device: the others look the same.
    index = tuple(slice(None) if name in collective.axes else 0 for name in mesh.axis_names)
    group = np.array([device.coords for device in np.atleast_1d(mesh.devices[index]).flat])
    places = np.unique(group, axis=0)
    if len(places) == 1:
        return one.sent / (ON_CHIP * chip.link)
    slice_shape = tuple(1 + max(device.coords[i] for device in mesh.devices.flat) for i in range(chip.torus))
    extents = [len(np.unique(places[:, i])) for i in range(chip.torus)]
    rings = zip(chip.wraps(slice_shape), extents, slice_shape, strict=True)
    links = [2 if wraps and extent == size else 1 for wraps, extent, size in rings if extent > 1]
    # Devices of a chip share its links; those that are not of the group have the same to send.
    sent = one.sent * chip.devices * len(places) / len(group)
    latency = ICI_LATENCY * sum(extent - 1 for extent in extents)
    if collective.kind == "collective-permute":
        return sent / chip.link + ICI_LATENCY
    if collective.kind.endswith("all-to-all"):
        # A quarter of everything crosses the middle of the longest dimension each way, on one link a line or on two.
        crossing = collective.bytes * chip.devices * max(extents) / 4 / max(links)
        return max(crossing, sent / sum(links)) / chip.link + latency
    return sent / sum(links) / chip.link + latency


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the first computation to run."""
    computations, entry, instructions = {}, "", []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            is_entry, name = match.groups()
            instructions = computations[name] = []
            entry = name if is_entry else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            name, rest = match.groups()
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            begin = rest.index("(")
            end = begin + _closing(rest[begin:])
            instructions.append(_Instruction(name, rest[:begin], shape, rest[begin + 1 : end - 1], rest[end:]))
    return computations, entry


def _closing(text: str) -> int:
    """One past the parenthesis that closes the first character."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    elements, depth, begin = [], 0, 1
    for i, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            elements.append(shape[begin:i])
            begin = i + 1
    return elements


def _num_bytes(shape: str) -> int:
    """Of all arrays of a shape, which may be a tuple, without the padding of tiles."""
    total = 0
    for bits, dimensions in re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        total += math.prod(int(size) for size in dimensions.split(",") if size) * int(bits or 8)
    return total // 8


def _rendezvous(transfer: _Instruction) -> str:
    return transfer.attribute(r'rendezvous="([^"]*)"')


def _groups(attributes: str, num_partitions: int) -> np.ndarray:
    """[groups, devices of a group]: which devices exchange with which; of a permute, its pairs."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", attributes):
        return np.array([_integers(group) for group in match[1].split("},")])
    if match := re.search(rf"replica_groups={IOTA}", attributes):
        return _iota(*match.groups())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        return _mesh_groups(*match.groups())
    return np.arange(num_partitions)[None]  # replica_groups={}: all


def _iota(shape: str | None, source: str, order: str | None) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): the numbers from 0 in the second shape, transposed, in the first shape if there is one."""
    dimensions = _integers(source)
    numbers = np.arange(math.prod(dimensions)).reshape(dimensions).transpose(_integers(order) if order else None)
    return numbers.reshape(_integers(shape)) if shape else numbers


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _mesh_groups(axes: str, device_ids: str | None, used: str) -> np.ndarray:
    """mesh['a'=2,'b'=4] {'b'}: a group has all along b. A part of an axis is 'b':(major)size."""
    sizes = {name: int(size) for name, size in re.findall(r"([^',=]+)'?=(\d+)", axes)}
    coordinates = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    for name, major, size in re.findall(r"([^',:]+)'?(?::\((\d+)\)(\d+))?", used):
        size, minor = (int(size), sizes[name] // int(major) // int(size)) if size else (sizes[name], 1)
        coordinates[name] = coordinates[name] - coordinates[name] // minor % size * minor
    others = np.ravel_multi_index(tuple(coordinates.values()), tuple(sizes.values()))
    groups = np.argsort(others, kind="stable").reshape(len(np.unique(others)), -1)
    if device_ids is None:
        return groups
    if transposed := re.fullmatch(r"(\[[\d,]+\])T\(([\d,]+)\)", device_ids):
        return _iota(None, *transposed.groups()).reshape(-1)[groups]
    iota = re.match(IOTA, device_ids)
    ids = _iota(*iota.groups()) if iota else np.array(_integers(device_ids.split("]")[-1]))
    return ids.reshape(-1)[groups]
