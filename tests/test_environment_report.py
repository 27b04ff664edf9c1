"""python -m attn_kernels: as text and as JSON, with and without the compiled module and Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attn_kernels
from attn_kernels.__main__ import _without_folders, main, render, report
from matrix import slow_if

COMPILED, TRITON = "attn_kernels._C", "triton"


def run(*arguments: str, absent: tuple[str, ...] = ()) -> str:
    """What ``python -m attn_kernels`` prints where the modules ``absent`` cannot be imported."""
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None: importing it fails
        f"sys.argv = ['attn_kernels', *{arguments!r}]\n"
        "runpy.run_module('attn_kernels', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@slow_if(lambda absent: absent == (COMPILED,))
@pytest.mark.parametrize("absent", [(), (COMPILED,), (TRITON,)], ids=str)
def test_json(absent):
    found = json.loads(run("--json", absent=absent))
    assert found["attn_kernels"] == attn_kernels.__version__
    assert found["torch"] == torch.__version__
    assert found["cpu"]["threads"] >= 1
    assert found["cpu"]["cores"] >= 1
    assert list(found["backends"]) == list(attn_kernels.backends())
    assert found["backends"]["reference"]["available"]
    assert all(backend["detail"] for backend in found["backends"].values())
    if COMPILED in absent:
        assert found["build"] is None
        assert found["cpu"]["simd"] is None
        assert not found["backends"]["cpu"]["available"]
    if TRITON in absent:
        assert found["triton"] is None
        assert "not installed" in found["backends"]["triton"]["detail"]


def test_text():
    lines = run(absent=(COMPILED, TRITON)).splitlines()
    for name in ("attn_kernels", "python", "torch", "triton", "os", "cpu", "simd", "allocator", "gpu"):
        assert any(line.startswith(name) for line in lines), name
    for name in attn_kernels.backends():
        assert any(line.startswith(f"backend {name}") for line in lines), name


def test_the_report_says_what_backends_says():
    found = report()["backends"]
    assert {name: backend["available"] for name, backend in found.items()} == {
        name: backend.available for name, backend in attn_kernels.backends().items()
    }


def test_settings_are_named(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert report()["settings"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "glibc.malloc.hugetlb=1" in render(report())


def test_gpus_are_shown():
    found = report()
    found["gpus"] = [{"name": "Some GPU", "architecture": "compute capability 9.0", "memory_gib": 79.6}]
    assert "Some GPU, compute capability 9.0, 79.6 GiB" in render(found)


def test_no_folders():
    told = render(report()) + json.dumps(report())
    home = os.path.expanduser("~")  # "~" for a user without one
    assert home in ("~", "/") or f"{home}/" not in told
    assert str(Path(attn_kernels.__file__).parent.parent) not in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/lib/attn_kernels/_C.so: undefined symbol: f", "_C.so: undefined symbol: f"),
        ("cannot open '/opt/x y/lib.so'", "cannot open 'x y/lib.so'"),
        ("~/lib/a.so", "a.so"),
        ("Debian GNU/Linux 12, 1/2", "Debian GNU/Linux 12, 1/2"),
    ],
)
def test_folders_are_left_out(text, expected):
    assert _without_folders(text) == expected


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attn_kernels", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "--json" in capsys.readouterr().out
