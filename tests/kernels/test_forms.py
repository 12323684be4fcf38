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
from dairllm.kernels import forms
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


@pytest.mark.parametrize("form", forms.available())
def test_each_form_has_the_defined_bits(form, defined):
    assert differing(digests_of(form), defined) == []


@pytest.mark.parametrize("form", ["avxvnni", "avx512vnni"])
def test_vnni_forms_have_them_on_any_processor(form, defined, tmp_path):
    """All but one instruction of theirs runs wherever there is AVX2; that one is put together from others."""
    if form in forms.available():
        pytest.skip("it has been run as it is")
    if "avx2" not in forms.available():
        pytest.skip("this processor has no AVX2")
    # what is compiled here must not be taken for the real form later
    found = digests_of(form, "--emulate", XDG_CACHE_HOME=str(tmp_path))
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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.parametrize(
    ("form", "processor", "features", "instruction"),
    [
        ("avx512vnni", "sapphirerapids", "+avx512vnni,+avx512vl,+avx512bw,+avx512f,+avx2,+fma,+f16c", r"vpdpbusd.*%zmm"),
        ("avxvnni", "alderlake", "+avxvnni,+avx2,+fma,+f16c", r"vpdpbusd.*%ymm"),
        ("avx2", "haswell", "+avx2,+fma,+f16c", r"vpmaddubsw.*%ymm"),
    ],
)
def test_forms_compile_to_their_instruction(form, processor, features, instruction, tmp_path):
    """For a processor that this one need not be: compiled, not run."""
    environment = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE, form], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(re.findall(instruction, result.stdout)) > 50


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
