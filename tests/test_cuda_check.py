"""The reader of machine code and its rules, on text in the disassembler's format and on small test kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("typer", "rich"):
    pytest.importorskip(package, reason="the benchmarks need the dependency group bench")

from bench.cases import FORWARD, TRAINING, Shape  # noqa: E402
from tools.cuda_check import check as cuda_check  # noqa: E402
from tools.cuda_check import nvcc, roofline, sass  # noqa: E402
from tools.cuda_check import rules as cuda_rules  # noqa: E402
from tools.cuda_check.rules import Facts, Rule, examine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def has_compiler() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        found = nvcc.find()
        sass.find_tool("nvdisasm", found)
        sass.find_tool("cuobjdump", found)
    except (nvcc.NoCompiler, FileNotFoundError) as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(bool(has_compiler()), reason=has_compiler())

# Text -----------------------------------------------------------------------------------------------------------------

# An outer loop around an inner one; a rare path behind the end that goes back into the inner loop; a called function.
CODE = """
	.section	.text._Z4workPf,"ax",@progbits
_Z4workPf:
.text._Z4workPf:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R5, R4, R3, 1 ;
        /*0030*/                   MUFU.RCP R6, R5 ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FADD R7, R7, R6 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   BRA.U !UP0, `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
        /*00a0*/                   BRA `(.L_x_2) ;
$__internal_0_$slow:
        /*00b0*/                   STL [R1], R6 ;
        /*00c0*/                   RET.REL.NODEC R12 `(_Z4workPf) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;

	.section	.text._Z5otherv,"ax",@progbits
.text._Z5otherv:
        /*0000*/                   EXIT ;
"""
USAGE = """
 Function _Z5otherv:
  REG:8 STACK:0 SHARED:0 LOCAL:0
 Function _Z4workPf:
  REG:30 STACK:16 SHARED:1536 LOCAL:0 CONSTANT[0]:556
"""


def test_kernels_loops_and_resources_of_a_file() -> None:
    work, other = sass.parse(CODE, USAGE)
    assert (work.name, work.registers, work.stack, work.shared) == ("_Z4workPf", 30, 16, 1536)
    assert (other.name, other.registers, other.loops) == ("_Z5otherv", 8, [])
    outer, inner = sorted(work.loops, key=lambda loop: loop.start)
    assert (outer.inner, inner.inner) == (False, True)
    # The rare path is part of the loop although it stands behind the end; the called function is not.
    assert inner.slots == 7 and inner.count("CALL") == 1 and inner.local == 0
    assert (inner.special, inner.count("MUFU.RCP"), inner.arithmetic) == (1, 1, 2)
    assert outer.global_bytes == (16, 16) and inner.global_bytes == (0, 0)
    assert work.code.local == 1 and work.code.slots == 14


@pytest.mark.parametrize(
    ("name", "bytes"),
    [("LDG.E.CONSTANT", (0, 4)), ("LDG.E.128", (16, 16)), ("LDG.E.U8", (0, 1)), ("LDG.E.64", (0, 8)),
     ("LDGSTS.E.BYPASS.LTC128B.128", (16, 16)), ("LDS.128", (0, 0))],
)  # fmt: skip
def test_bytes_of_a_load(name: str, bytes: tuple[int, int]) -> None:
    assert sass.Code({name: 1}).global_bytes == bytes


def test_names() -> None:
    assert sass.demangle("_ZN4attn4cuda4manyILi3EEEvPKfS3_Pfi") == "attn::cuda::many<3>"
    assert sass.demangle("plain_name") == "plain_name"
    assert sass.template_arguments("f<g<int, 2>, (Kind)1, 8>") == ["g<int, 2>", "(Kind)1", "8"]
    assert sass.template_arguments("f") == []


@pytest.mark.parametrize(
    ("registers", "threads", "blocks"), [(168, 384, 1), (128, 256, 2), (32, 1024, 2), (255, 512, 0)]
)
def test_occupancy(registers: int, threads: int, blocks: int) -> None:
    assert sass.blocks_for_registers(registers, threads) == blocks


# Rules ----------------------------------------------------------------------------------------------------------------


def facts(loop: dict[str, int], **others: object) -> Facts:
    given = dict(
        name="many_queries_scores_kernel<float, 8, 4>", origin="x.cu", target="sm_90a", registers=100, stack=0,
        shared=0, threads=256, blocks=1, loops=[sass.Loop(loop)], code=sass.Code(loop), arguments=["float", "8", "4"],
    )  # fmt: skip
    return Facts(**(given | others))


# Of 8 x 4 pairs and three units: 39 numbers from shared memory, 32 reciprocals, nine slots for three units.
GOOD = {"LDS.128": 9, "LDS": 3, "FFMA": 160, "FADD": 32, "FMUL": 64, "MUFU.RCP": 32, "BRA": 1}


def test_a_loop_within_its_bounds() -> None:
    found = examine(facts(GOOD))
    assert found.problems == [] and found.regime == cuda_rules.MANY_FORWARD
    assert found.pairs == 96 and found.special_per_pair == pytest.approx(1 / 3)
    assert found.slots_per_pair == pytest.approx(301 / 96)


def test_pairs_of_relu_are_counted_by_its_maxima() -> None:
    relu = {"LDS.128": 6, "LDS.64": 1, "FADD": 64, "FMNMX.NAN": 64, "FFMA": 64}
    leaky = {"LDS.128": 6, "LDS.64": 1, "FADD": 64, "FSETP.GT.AND": 64, "FMUL": 64, "FFMA": 64}
    name = "many_queries_scores_kernel<float, 8, 4, 96, true, attn::ActivatedScores>"
    found = examine(facts(relu, name=name, loops=[sass.Loop(leaky), sass.Loop(relu)]))
    assert found.problems == [] and found.regime == cuda_rules.RELU_FORWARD
    assert found.pairs == 64 and found.slots_per_pair == pytest.approx(199 / 64)
    slower = examine(facts(relu | {"MOV": 64}, name=name))
    assert slower.problems == ["4.109 issue slots for a pair, at most 3.5"]
    assert "no loop with FMNMXs" in examine(facts(leaky, name=name)).problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"loop": GOOD | {"MOV": 40}}, "3.552 issue slots for a pair, at most 3.5"),
        ({"loop": GOOD | {"MUFU.RCP": 48}}, "2.00 units share a reciprocal, expected 3"),
        ({"loop": GOOD | {"MUFU.EX2": 32}}, "no loop with reciprocals and without exponentials"),
        ({"loop": GOOD | {"LDL": 2}, "stack": 8}, "local memory: 8 bytes, 2 loads and stores"),
        ({"registers": 200}, "leave room for 8 warps, fewer than 12"),
        ({"registers": 255, "threads": 384}, "leave room for 0 blocks of 384 threads, planned are 1"),
        ({"blocks": 3}, "room for 2 blocks of 256 threads, planned are 3"),
        ({"threads": 0, "registers": 64}, "no __launch_bounds__"),
    ],
)
def test_what_is_wrong_is_said(change: dict, problem: str) -> None:
    found = examine(facts(change.pop("loop", GOOD), **change))
    assert any(problem in text for text in found.problems), found.problems


def test_decode_wants_wide_loads() -> None:
    name = "few_queries_kernel<Form<true, float, float, true, true>, 1>"
    arguments = ["Form<true, float, float, true, true>", "1"]
    assert examine(facts({"LDG.E.128": 4, "LDG.E.U8": 4}, name=name, arguments=arguments)).problems == []
    narrow = examine(facts({"LDG.E.128": 1, "LDG.E": 8}, name=name, arguments=arguments))
    assert narrow.problems == ["33% of the bytes come by loads of 16 bytes, at least 90%"]
    unaligned = name.replace("true>, 1", "false>, 1")
    assert examine(facts({"LDG.E": 8}, name=unaligned, arguments=arguments)).problems == []


def test_rules_come_in_order_and_the_last_takes_the_rest() -> None:
    assert cuda_rules.rule_for(facts({}, name="widen_kernel<float>")).regime == cuda_rules.OTHER
    double = facts({}, arguments=["double", "4", "4"])
    assert cuda_rules.rule_for(double).regime == cuda_rules.OTHER and examine(double).problems == []
    own = (Rule(r"mine", cuda_rules.MANY_BACKWARD), Rule("", cuda_rules.OTHER))
    assert cuda_rules.rule_for(facts({}, name="is_mine"), own).regime == cuda_rules.MANY_BACKWARD


# Compiled kernels -----------------------------------------------------------------------------------------------------

SOURCE = """
namespace attn { namespace cuda {
__device__ float reciprocal(float x) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
template <int N>
__global__ void __launch_bounds__(128, 4) counted_kernel(const float4* k, float* out, int n) {
  float sum = 0, e = out[0];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const float4 x = k[i * 128 + threadIdx.x];
    sum += x.z + x.w + reciprocal(fmaf(e, x.x, 1.0f));
    if (N > 1) sum += reciprocal(fmaf(e, x.y, 1.0f));
    if (N > 2) sum += reciprocal(fmaf(e, x.z, 1.0f));
  }
  out[threadIdx.x] = sum;
}
template __global__ void counted_kernel<2>(const float4*, float*, int);
template __global__ void counted_kernel<3>(const float4*, float*, int);
__global__ void __launch_bounds__(64) spilling_kernel(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i];
  for (int i = 0; i < n; ++i) a[int(x[i]) & 63] += x[i];
  x[0] = a[n & 63];
}
__global__ void __launch_bounds__(64) tanh_kernel(const float* x, float* y, int n) {
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 64) sum += tanhf(x[i]);
  y[threadIdx.x] = sum;
}
}}
"""
RULES = (
    Rule("counted_kernel", cuda_rules.MANY_BACKWARD, sharing=1, special=1.0, slots=9.0, wide_loads=True),
    Rule("tanh_kernel", cuda_rules.MANY_FORWARD, sharing=3, special=0.34),
    Rule("", cuda_rules.OTHER),
)


@needs_nvcc
@pytest.mark.parametrize("target", cuda_rules.TARGETS)
def test_small_kernels(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "small.cu"
    source.write_text(SOURCE)
    monkeypatch.setattr(cuda_check, "examine", lambda facts: examine(facts, RULES))
    compiler = nvcc.find()
    version = nvcc.version(compiler)
    found = {
        f.name: f for f in cuda_check.examine_cuda(source, target, compiler, tmp_path / "cache", version)
    }  # fmt: skip
    for count in (2, 3):
        kernel = found[f"counted_kernel<{count}>"]
        assert kernel.problems == [] and kernel.threads == 128 and kernel.wide_share == 1.0
        assert kernel.pairs == count and kernel.special_per_pair == 1.0
        assert kernel.hot["global_bytes"] == 16 and kernel.hot["arithmetic"] == 2 * count + 2
    spills = found["spilling_kernel"]
    assert spills.stack == 256 and any("local memory: 256 bytes" in problem for problem in spills.problems)
    assert any("of them in a loop" in problem for problem in spills.problems)
    assert found["tanh_kernel"].problems == [
        "no loop with reciprocals and without exponentials: pairs take tanh itself"
    ]
    plans = nvcc.compile(source, target, compiler, tmp_path / "cache", version)
    assert plans.cached and nvcc.Plan(128, 4) in plans.plans.values()
    source.write_text(SOURCE.replace("n & 63", "n & 31"))
    assert nvcc.fingerprint(source, target, version) not in str(plans.cubin)


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.cuda_check", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.slow
def test_triton_kernels_are_compiled_outside_of_the_tests(tmp_path: Path) -> None:
    """In a process whose path has no tests, as ``make cuda-check`` is one."""
    pytest.importorskip("triton")
    program = (
        "import sys; from pathlib import Path; from tools.cuda_check import check; assert 'decode' in"
        " check.triton_cases(); print(*{f.name for f in check.examine_triton('dot-decode', ['sm_90a'],"
        " Path(sys.argv[1]))})"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert "decode_kernel" in process.stdout.split()


@needs_nvcc
def test_command_lists_all_problems_and_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text(SOURCE)
    (tmp_path / "broken.cu").write_text("__global__ void f() { nonsense; }")
    result = tmp_path / "result.json"
    process = check(
        str(tmp_path / "bad.cu"), str(tmp_path / "broken.cu"), "--target", "sm_90a", "--json", "--output", str(result),
        "--cache", str(tmp_path / "cache"),
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    told = json.loads(process.stdout)
    assert told == {key: value for key, value in json.loads(result.read_text()).items() if key != "schema"}
    assert {kernel["name"] for kernel in told["kernels"]} >= {"spilling_kernel", "counted_kernel<3>"}
    assert any("spilling_kernel" in problem for problem in told["problems"])
    assert any("broken.cu for sm_90a: nvcc failed" in problem for problem in told["problems"])


def test_without_nvcc_the_command_says_how_to_name_it() -> None:
    process = check(NVCC="/nowhere/nvcc")
    assert process.returncode == 2 and "NVCC=/nowhere/nvcc is not a program" in process.stderr
    with pytest.raises(nvcc.NoCompiler, match=r"make cuda-check NVCC=/path/to/bin/nvcc"):
        nvcc.find({"PATH": ""}, places=())


# Roofline -------------------------------------------------------------------------------------------------------------


def test_floors_are_what_the_numbers_of_an_h100_make() -> None:
    decode = roofline.floor(roofline.ADDITIVE, Shape(64, 1, 200, 1024, 1024), FORWARD, "float32")
    assert decode.floor_by == "memory"
    assert decode.floor_us == pytest.approx((64 * (201 * 2048) + 1024) * 4 / 3.35e12 * 1e6)
    many = roofline.floor(roofline.ADDITIVE, Shape(64, 100, 100, 512, 512), TRAINING, "bfloat16")
    pairs = 64 * 100 * 100 * 512
    assert many.floor_by == "special functions"
    assert many.floor_us == pytest.approx(pairs * (1 + 1 / 3) / (132 * 1.755e9 * 16) * 1e6)


def test_prediction_counts_whole_tiles_and_whole_rounds() -> None:
    kernel = examine(facts(GOOD, registers=168, threads=384))
    shape = Shape(132, 64, 32, 512, 512)  # one block of 64 threads for each multiprocessor, nothing left over
    even = roofline.predict(roofline.ADDITIVE, shape, FORWARD, "float32", {cuda_rules.MANY_FORWARD: kernel})
    assert even.padding == 1.0 and even.predicted_us > even.floor_us
    odd = roofline.predict(
        roofline.ADDITIVE, shape._replace(B=133, Tq=65), FORWARD, "float32", {cuda_rules.MANY_FORWARD: kernel}
    )
    assert odd.padding > 1.0 and odd.predicted_us > 1.01 * even.predicted_us
    assert roofline.predict(roofline.ADDITIVE, shape, TRAINING, "float32", {}).predicted_us is None
