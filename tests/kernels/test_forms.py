"""Every form of the kernels computes the same bits: those of the definition. Each runs in a process of its own."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dairllm.errors import ConfigError
from dairllm.kernels import forms, processor
from dairllm.kernels.objects import targets
from dairllm.kernels.objects.cache import ObjectCodeCache
from dairllm.kernels.objects.loader import MACHINES
from dairllm.kernels.objects.targets import TARGETS
from tests.kernels import exact
from tests.kernels.form_digests import digests

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def defined():
    return digests(exact)


def digests_of(form, *options, **environment):
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.form_digests", form, *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def differing(found, defined):
    assert list(found) == list(defined)
    return [case for case in defined if found[case] != defined[case]]


RUNNING = [target for target in targets.of_this_machine() if target.needs <= processor.features()]


@pytest.mark.parametrize("target", RUNNING or [None], ids=str)
def test_each_form_has_the_defined_bits(target, defined):
    """In each build of it that runs here; where numba compiles in the process there is but the portable form."""
    if target is None:
        assert differing(digests_of("portable"), defined) == []
    else:
        hidden = {"NUMBA_CPU_NAME": target.level, "NUMBA_CPU_FEATURES": target.features}
        assert differing(digests_of(target.form, **hidden), defined) == []


@pytest.mark.parametrize("form", ["avxvnni", "avx512vnni"])
def test_vnni_forms_have_them_on_any_processor(form, defined):
    """All but one instruction of theirs runs wherever there is AVX2; that one is put together from others."""
    if form in forms.available():
        pytest.skip("it has been run as it is")
    if "avx2" not in forms.available():
        pytest.skip("this processor has no AVX2")
    found = digests_of(form, "--emulate", NUMBA_OPT="0")  # compiled in half the time
    assert len(found) > 200
    assert differing(found, {case: defined[case] for case in found}) == []


COMPILE = """
import sys
from numba import types
from dairllm.kernels import forms, matmul_steps
assert forms.current() == sys.argv[1]
matmul_steps.matmul.compile((types.int64,) * 7)
print(*matmul_steps.matmul.inspect_asm().values())
"""


SCALAR = r"(?:andn|bextr|bls|bzhi|crc32|mulx|pdep|rorx|sarx|shlx|shrx|lzcnt|tzcnt|popcnt|movbe|cmpxchg16|lahf|sahf|xsave)[a-z]?\s"
SSE4 = r"(?:pshufb|pmov[sz]x|palignr|pmaddubs|pextr[bdq]|pinsr[bdq]|pblend|blendv|ptest|round[ps]|pmulld|p(?:min|max)(?:s[bd]|u[wd]))"
AVX512 = r"\S+\s.*%(?:zmm|k[0-7]|[xy]mm(?:1[6-9]|[23]\d))"
VBMI_OR_DQ = r"v(?:permb|perm[it]2b|pmultishift|psh[lr]d|pcompress|pmullq|(?:insert|extract)[fi](?:32x8|64x2))"
INSTRUCTIONS = {
    ("avx512vnni", "x86-64-v3"): (r"vpdpbusd.*%zmm", rf"{SCALAR}|{VBMI_OR_DQ}"),
    ("avxvnni", "x86-64-v3"): (r"{vex}\tvpdpbusd.*%ymm", rf"{SCALAR}|{AVX512}"),
    ("avx2", "x86-64-v3"): (r"vpmaddubsw.*%ymm", rf"{SCALAR}|{AVX512}|vpdp"),
    ("portable", "x86-64-v2"): (r"pmovsx.*%xmm", rf"{SCALAR}|v"),
    ("portable", "x86-64"): (r"pmaddwd.*%xmm", rf"{SCALAR}|v|{SSE4}"),
}
"""What each target is there for; and what LLVM would use for later processors, but not for those that have no more than it needs."""


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="instructions of x86")
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_compile_to_their_instructions_and_no_others(target, request):
    """For a processor that this one need not be: compiled, not run. What a compilation gave is kept, as kernels are, by all that makes
    it."""
    kept = request.config.cache.mkdir("assembly") / f"{ObjectCodeCache(target).folder().name}.s"
    if not kept.exists():
        environment = os.environ | {"NUMBA_CPU_NAME": target.level, "NUMBA_CPU_FEATURES": target.features}
        command = [sys.executable, "-c", COMPILE, target.form]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        kept.with_suffix(f".{os.getpid()}").write_text(result.stdout)
        kept.with_suffix(f".{os.getpid()}").rename(kept)
    assembly = kept.read_text()
    present, absent = INSTRUCTIONS[target.form, target.level]
    assert len(re.findall(rf"^\t{present}", assembly, re.MULTILINE)) > 50
    assert re.findall(rf"^\t(?:{absent}).*", assembly, re.MULTILINE) == []


def test_a_process_takes_the_best_target_of_its_form(monkeypatch):
    assert targets.current() in TARGETS or platform.machine() not in MACHINES
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for target in TARGETS:
        monkeypatch.setenv("NUMBA_CPU_FEATURES", target.features)
        monkeypatch.setattr(forms, "_selected", None)
        assert targets.current() == target
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert targets.current() is None


def test_the_portable_form_runs_anywhere():
    assert forms.available()[-1] == "portable"


def test_a_form_is_chosen_once():
    chosen = forms.current()
    assert forms.select("auto") == forms.select(chosen) == chosen
    for other in set(forms.available()) - {chosen}:
        with pytest.raises(ConfigError, match=f"already runs {chosen} and cannot change to {other}"):
            forms.select(other)
    with pytest.raises(ConfigError, match="no form is called 'fast'; there are auto, avx512vnni"):
        forms.select("fast")


@pytest.mark.parametrize("missing", sorted(set(forms.FORMS) - set(forms.available())))
def test_a_form_without_its_instructions_is_refused_with_their_names(missing):
    with pytest.raises(ConfigError, match=f"cannot run {missing} .it lacks .*; it can run"):
        forms.select(missing)


@pytest.mark.parametrize(("hidden", "left"), [("+sse2", ("portable",)), ("+avx2,+fma,+f16c", ("avx2", "portable"))])
def test_features_hidden_from_numba_are_not_used(hidden, left):
    """How a form is tested on a processor that has more: what NUMBA_CPU_FEATURES leaves out does not exist."""
    program = "from dairllm.kernels import forms; print(*forms.available())"
    environment = os.environ | {"NUMBA_CPU_FEATURES": hidden, "NUMBA_CPU_NAME": "generic"}
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert tuple(found.stdout.split()) == left
