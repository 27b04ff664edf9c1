"""The requirements on the machine code of the GPU kernels, in one table: RULES.

The first rule whose pattern is found in a kernel's name applies; the last rule matches all remaining kernels. A new
kernel needs a row above the last one. A new kind of bound needs a field of ``Rule`` and some lines in ``examine``.

A pair is one hidden unit of one query and one step: B * Tq * Tk * A pairs in a call. The number of pairs that a thread
computes in one iteration of its hot loop is found from the loop: the number of reciprocals times the units that share
each or, for relu, the number of maxima. If a row states what a thread reads from shared memory per unit, this is
checked against the bytes that the loop reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .sass import Code, Loop, blocks_for_registers

# The regimes: the requirements depend on what a kernel computes.
MANY_FORWARD, MANY_BACKWARD, DECODE, OTHER = "many-query forward", "many-query backward", "decode", "other"
RELU_FORWARD, RELU_BACKWARD = f"{MANY_FORWARD}, relu", f"{MANY_BACKWARD}, relu"
TARGETS = ("sm_80", "sm_90a", "sm_100")


@dataclass
class Facts:
    """Facts about one kernel, compiled for one target."""

    name: str  # demangled, with template arguments
    origin: str  # the source file, or the case of the Triton kernels
    target: str
    registers: int
    stack: int
    shared: int
    threads: int  # maximum threads per block
    blocks: int  # planned blocks per multiprocessor; 0 if not specified
    loops: list[Loop]  # innermost loops
    code: Code
    arguments: list[str] = field(default_factory=list)  # template arguments
    constants: Mapping[str, Any] = field(default_factory=dict)  # constexpr arguments of a Triton kernel


@dataclass(frozen=True)
class Rule:
    pattern: str
    regime: str
    sharing: int = 0  # units that share a reciprocal in the hot loop
    counted: str = "MUFU.RCP"  # the instruction that is used to count pairs
    special: float | None = None  # maximum special-function operations per pair
    slots: float | None = None  # maximum issue slots per pair
    warps: int = 0  # minimum warps per multiprocessor that the registers must allow
    wide_loads: bool = False  # whether rows must be loaded 16 bytes at a time
    stack: int = 0  # maximum bytes of local memory per thread
    # (queries, steps) per thread. A thread that reads its rows from shared memory reads one number per row and unit,
    # and `constants` more.
    thread_tile: Callable[[Facts], tuple[int, int]] | None = None
    constants: int = 1
    applies: Callable[[Facts], bool] = lambda _: True


def _is_float32(facts: Facts) -> bool:
    """Whether the arithmetic is float32. Float64 is for gradient checks and has no bounds."""
    return not any(re.search(r"\bdouble\b", text) for text in facts.arguments) and not facts.constants.get("FLOAT64")


def _is_many_queries(facts: Facts) -> bool:
    """Whether the second template argument, the queries per thread, is large enough to reuse the loads of a row."""
    return _is_float32(facts) and int(facts.arguments[1]) >= 8


def _tile_of_template(first: int) -> Callable[[Facts], tuple[int, int]]:
    def tile(facts: Facts) -> tuple[int, int]:
        return int(facts.arguments[first]), int(facts.arguments[first + 1])

    return tile


def _is_many_queries_of_triton(facts: Facts) -> bool:
    """Whether this is the factored backward over a tile of queries."""
    return _is_float32(facts) and bool(facts.constants.get("FACTORED")) and facts.constants.get("BLOCK_Q", 0) >= 16


def _has_reciprocals_of_triton(facts: Facts) -> bool:
    """Whether the scores use tanh or sigmoid. relu has no reciprocals; tests/test_triton_aot.py counts its slots."""
    return _is_float32(facts) and facts.constants.get("ACTIVATION", "tanh") not in ("relu", "leaky_relu")


def _is_decoding_of_triton(facts: Facts) -> bool:
    """Whether there is one score vector. Several are read again in each iteration, from L1, with narrower loads."""
    return _is_float32(facts) and (facts.constants.get("VECTORS") or 1) == 1


# CUDA C++. 12 warps hide the latency of the special function unit and of shared memory, and leave 168 registers. The
# relu kernels have their own rows. The loop of leaky relu has no maximum, so its pairs are not counted.
_FORWARD: dict[str, Any] = dict(slots=3.5, warps=12, thread_tile=_tile_of_template(1), applies=_is_float32)
_BACKWARD: dict[str, Any] = dict(sharing=1, warps=12, applies=_is_many_queries)
_RELU: dict[str, Any] = dict(counted="FMNMX", special=0.0)

RULES = (
    Rule(r"many_queries_scores_kernel<.*\bActivatedScores>", RELU_FORWARD, sharing=1, **_RELU, **_FORWARD),
    Rule(r"scores_backward_kernel<.*\bActivatedPair>", RELU_BACKWARD, slots=8.5, **_RELU, **_BACKWARD),
    Rule(r"many_queries_scores_kernel", MANY_FORWARD, sharing=3, special=0.34, **_FORWARD),
    Rule(r"scores_backward_kernel", MANY_BACKWARD, special=1.02, slots=9.0, **_BACKWARD),
    # Two units share a reciprocal, which is counted without a bound, because memory is the bottleneck. Form<..., false>
    # is for rows that are not aligned to 16 bytes.
    Rule(r"few_queries_kernel<Form<.*, false>,", DECODE, sharing=2, warps=16, applies=_is_float32),
    Rule(r"few_queries_kernel", DECODE, sharing=2, wide_loads=True, warps=16, applies=_is_float32),
    # Triton. The compiler keeps layout conversions and masks in the loop. So the bounds are those of
    # tests/test_triton_aot.py, which it can reach. ptxas may spill a few bytes across a whole loop.
    Rule(
        r"^tiled_scores_kernel$",
        MANY_FORWARD,
        sharing=3,
        special=0.34,
        slots=3.7,
        warps=12,
        applies=_has_reciprocals_of_triton,
    ),
    Rule(
        r"^backward_kernel$",
        MANY_BACKWARD,
        sharing=1,
        special=1.02,
        slots=10.5,
        stack=32,
        applies=_is_many_queries_of_triton,
    ),
    Rule(r"^decode_kernel$", DECODE, wide_loads=True, stack=32, applies=_is_decoding_of_triton),
    Rule(r"^_?\w+_kernel$", OTHER, stack=32),
    Rule(r"", OTHER),
)


@dataclass
class Finding:
    """A kernel with its counts and its problems."""

    name: str
    origin: str
    target: str
    regime: str
    registers: int
    stack: int
    local: int  # loads and stores of local memory
    shared: int
    threads: int
    warps: int  # warps per multiprocessor that the registers allow
    hot: dict[str, int] | None = None  # counts of one iteration of the hot loop in one thread
    pairs: float | None = None  # per iteration and thread
    slots_per_pair: float | None = None
    special_per_pair: float | None = None
    wide_share: float | None = None  # fraction of the global bytes of the hot loop that wide loads read
    thread_tile: tuple[int, int] | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rule_for(facts: Facts, rules: tuple[Rule, ...] = RULES) -> Rule:
    """The first rule whose pattern is in the name. If it does not apply, only the general rules hold."""
    rule = next(rule for rule in rules if re.search(rule.pattern, facts.name))
    return rule if rule.applies(facts) else Rule(rule.pattern, OTHER, stack=rule.stack)


def examine(facts: Facts, rules: tuple[Rule, ...] = RULES) -> Finding:
    rule = rule_for(facts, rules)
    blocks = blocks_for_registers(facts.registers, facts.threads or 1024)
    warps = min(64, blocks * -(-(facts.threads or 1024) // 32))
    local = facts.code.local
    finding = Finding(
        facts.name, facts.origin, facts.target, rule.regime, facts.registers, facts.stack, local, facts.shared,
        facts.threads, warps,
    )  # fmt: skip
    problems = finding.problems
    if facts.stack > rule.stack or (local and facts.stack == 0):
        in_a_loop = max((loop.local for loop in facts.loops), default=0)
        where = f", up to {in_a_loop} of them in a loop" if in_a_loop else ", none in a loop"
        problems.append(f"local memory: {facts.stack} bytes, {local} loads and stores{where}")
    elif any(loop.local for loop in facts.loops):
        problems.append("local memory is used in a loop")
    if blocks < max(1, facts.blocks):
        problems.append(
            f"{facts.registers} registers leave room for {blocks} blocks of {facts.threads} threads, "
            f"planned are {max(1, facts.blocks)}"
        )
    if rule.regime != OTHER and facts.threads == 0:
        problems.append("no __launch_bounds__: no occupancy was planned")
    elif warps < rule.warps:
        problems.append(f"{facts.registers} registers leave room for {warps} warps, fewer than {rule.warps}")
    if rule.sharing:
        _examine_pairs(facts, rule, finding)
    if rule.wide_loads:
        _examine_loads(facts, finding)
    return finding


def _examine_pairs(facts: Facts, rule: Rule, finding: Finding) -> None:
    """The hot loop has the most reciprocals (or other counted instructions) and no exponential: the exact form of tanh,
    for large inputs, has both.

    If the exponentials of tanh are polynomials, the shorter of the two loops is the hot one.
    """
    one = "reciprocal" if rule.counted == Rule.counted else rule.counted
    candidates = [loop for loop in facts.loops if loop.count(rule.counted) and not loop.count("MUFU.EX2", "MUFU.TANH")]
    if not candidates and rule.special is None:
        return  # dot-product attention
    if not candidates:
        finding.problems.append(f"no loop with {one}s and without exponentials: pairs take tanh itself")
        return
    hot = max(candidates, key=lambda loop: (loop.count(rule.counted), -loop.slots))
    pairs = float(hot.count(rule.counted) * rule.sharing)
    if rule.thread_tile is not None:
        queries, steps = finding.thread_tile = rule.thread_tile(facts)
        units = _shared_numbers(hot) / (queries + steps + rule.constants)
        if units:
            pairs = units * queries * steps
        if abs(pairs - hot.count(rule.counted) * rule.sharing) > 0.1 * pairs:
            shared = pairs / hot.count(rule.counted)
            finding.problems.append(f"{shared:.2f} units share a {one}, expected {rule.sharing}")
    finding.hot, finding.pairs = hot.classes(), pairs
    finding.slots_per_pair, finding.special_per_pair = hot.slots / pairs, hot.special / pairs
    for what, value, most in (
        ("special-function operations", finding.special_per_pair, rule.special),
        ("issue slots", finding.slots_per_pair, rule.slots),
    ):
        if most is not None and value > most:
            finding.problems.append(f"{value:.3f} {what} for a pair, at most {most:g}")


def _shared_numbers(loop: Loop) -> float:
    """The 4-byte numbers that a thread reads from shared memory in one iteration."""
    sizes = {"U8": 0.25, "S8": 0.25, "U16": 0.5, "S16": 0.5, "64": 2, "128": 4}
    total = 0.0
    for name, count in loop.counts.items():
        parts = name.split(".")
        if parts[0] == "LDS":
            total += count * next((sizes[part] for part in parts[1:] if part in sizes), 1)
    return total


def _examine_loads(facts: Facts, finding: Finding) -> None:
    """Rows of keys and values must be loaded 16 bytes at a time; other loads of the loop (a mask) are small."""
    loads = [loop for loop in facts.loops if loop.global_bytes[0]]
    if not loads:
        finding.problems.append("no loop with global loads of 16 bytes")
        return
    hot = max(loads, key=lambda loop: loop.global_bytes[0])
    wide, every = hot.global_bytes
    finding.hot, finding.wide_share = hot.classes(), wide / every
    if finding.wide_share < 0.9:
        finding.problems.append(f"{100 * finding.wide_share:.0f}% of the bytes come by loads of 16 bytes, at least 90%")
