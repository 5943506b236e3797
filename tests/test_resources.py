"""No kernel spills registers, by nvcc's own report; and the reading of that report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import resources

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8metafast4cuda18row_squares_kernelIfEEvNS0_8WideRowsIKT_EEPf' for 'sm_90'
ptxas info    : Function properties for _ZN8metafast4cuda18row_squares_kernelIfEEvNS0_8WideRowsIKT_EEPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 12288 bytes smem
ptxas info    : Compiling entry function '_ZN8metafast12_GLOBAL__N_112probe_kernelEPKfPf' for 'sm_80'
ptxas info    : Function properties for _ZN8metafast12_GLOBAL__N_112probe_kernelEPKfPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_a_log_is_read() -> None:
    spilling, probe = resources.read(LOG)
    assert spilling == ("row_squares_kernel<float>", "sm_90", 64, 12288, 16, 20)
    assert probe == ("probe_kernel", "sm_80", 8, 0, 0, 0)
    assert "row_squares_kernel<float>  sm_90         64   12288     16       20" in resources.table(
        resources.read(LOG)
    )


def test_another_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="not as expected"):
        resources.read(LOG.replace("Used", "Uses"))


@pytest.mark.parametrize(
    ("log", "said"), [(LOG, "1 with spills"), ("", "no kernel")], ids=["spills", "nothing"]
)
def test_the_command_fails(
    log: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "log").write_text(log)
    monkeypatch.setattr("sys.argv", ["resources", str(tmp_path / "log")])
    with pytest.raises(SystemExit) as ended:
        resources.main()
    assert said in capsys.readouterr().out + str(ended.value)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills(source: Path) -> None:
    log = ROOT / "build" / "cuda" / f"{source.stem}.log"
    newest = max(
        path.stat().st_mtime for folder in ("cuda", "math") for path in (ROOT / "csrc" / folder).iterdir()
    )
    if not log.exists() or log.stat().st_mtime < newest:
        pytest.skip("needs the log of 'make cuda' of these sources")
    kernels = resources.read(log.read_text())
    assert {k.architecture for k in kernels} == {"sm_80", "sm_90"}
    assert [k for k in kernels if k.spilled or k.stack] == []
