"""Programs compiled for TPUs that are not there, and what is read from their text."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from therapy_jax import aot, batching, gpt2, hlo, sft, sharding
from therapy_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    PPOConfig,
    PromptConfig,
    SamplingConfig,
    SFTConfig,
)

BESIDE = ROOT / ".venv" / "tpu"  # where scripts/test.sh --all puts libtpu: not in jax's way
INSTALLED = importlib.util.find_spec("libtpu") is not None
LIBTPU = INSTALLED or (BESIDE / "libtpu").is_dir()
TINY = Config(
    model=ModelConfig(n_layer=2, n_embd=64, n_head=4, n_positions=128),
    prompt=PromptConfig(max_tokens=32),
    sampling=SamplingConfig(max_new_tokens=16),
    sft=SFTConfig(batch_size=16),
    ppo=PPOConfig(batch_size=32, epochs=1, minibatches=2, value_head="separate"),
)
GIANT = "--model.name gpt2 --sft.row_tokens 1024 --sft.batch_size 4096"  # refused within seconds
SIZES = "--model.n_layer 2 --model.n_embd 64 --model.n_head 4 --model.n_positions 128 --prompt.max_tokens 32 --sft.batch_size 16"

# Four chips. The entry runs a loop of 6 trips (the body counts by 2 up to 12), a loop that may end early (at most 5 trips),
# one whose limit is computed, a chain of one all-gather in two fusions, and a TPU's reduce-scatter.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%counted.body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %next = s32[] add(%i, %two)
  %summed = f32[8,16]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %moved-start = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%summed), channel_id=2
  %moved = f32[8,16]{1,0} collective-permute-done(%moved-start)
  ROOT %out = (s32[], f32[8,16]) tuple(%next, %moved)
}

%counted.condition (p: (s32[], f32[8,16])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %twelve), direction=LT
}

%early.body (p: (s32[], bf16[64])) -> (s32[], bf16[64]) {
  %p = (s32[], bf16[64]) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[16] slice(%p)
  %next = s32[] add(%i, %one)
  %whole = bf16[64]{0} all-gather(%x), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %out = (s32[], bf16[64]) tuple(%next, %whole)
}

%early.condition (p: (s32[], bf16[64])) -> pred[] {
  %five = s32[] constant(5)
  %p = (s32[], bf16[64]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %less = pred[] compare(%i, %five), direction=LT
  %alive = pred[] constant(true)
  ROOT %both = pred[] and(%less, %alive)
}

%open.body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]) parameter(0)
  %x = f32[100] get-tuple-element(%p), index=1
  %turned = f32[100]{0} all-to-all(%x), channel_id=4, replica_groups={}, dimensions={0}
  ROOT %out = (s32[], f32[100]) tuple(%p, %turned)
}

%open.condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%chain.1 (x: f32[5]) -> f32[20] {
  %x = f32[5] parameter(0)
  %g = f32[20]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="0"}
}

%chain.2 (x: f32[5]) -> f32[20] {
  %x = f32[5] parameter(0)
  %g = f32[20]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.7 (x: f32[400]) -> f32[100] {
  %x = f32[400] parameter(0)
  %whole = f32[400]{0} all-reduce(%x), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %mine = f32[100] dynamic-slice(%whole)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w1 = (s32[], /*index=1*/f32[8,16]{1,0:T(8,128)}) while(%x), condition=%counted.condition, body=%counted.body
  %w2 = (s32[], bf16[64]) while(%x), condition=%early.condition, body=%early.body
  %w3 = (s32[], f32[100]) while(%x), condition=%open.condition, body=%open.body
  %f1 = f32[20] fusion(%x), kind=kOutput, calls=%chain.1
  %f2 = f32[20] fusion(%f1), kind=kOutput, calls=%chain.2
  %f3 = f32[100] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %out = f32[8,16] get-tuple-element(%w1), index=1
}
"""


def test_collectives_by_hand():
    # bytes one chip sends in a ring of n: (n-1)/n of the whole, twice that for an all-reduce, all of it for a permute
    assert sorted(hlo.collectives(TEXT)) == [
        ("all-gather", 60.0, 1, True),  # 20 f32 among 4, written down twice
        ("all-gather", 64.0, 5, False),  # 64 bf16 in pairs: 128 bytes, half of them sent
        ("all-reduce", 768.0, 6, True),  # 128 f32 among 4: 2 * 3/4 * 512
        ("all-to-all", 300.0, 1, False),  # 100 f32 among all 4; nothing is known of the loop
        ("collective-permute", 512.0, 6, True),
        ("reduce-scatter", 1200.0, 1, True),  # 400 f32 among 4
    ]


def test_a_step_compiled_from_shapes_takes_the_state_of_a_run():
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    program = aot.programs(TINY, mesh)["sft"]
    assert (program.batch_size, program.multiple) == (16, 8)
    config, tx = aot.gpt2_config(TINY, mesh), sft.optimizer(TINY.sft, 1000)
    params = gpt2.init(config, jax.random.key(0))
    state = sharding.make_state(mesh, functools.partial(sft.init_state, tx=tx), sharding.place(mesh, params))
    batch = batching.without_mask(batching.unsupervised(np.ones((16, 64), np.int32)))  # as training gives it
    batch = sharding.split_batch(mesh, batch)
    key = jax.device_put(jax.random.key(1), jax.NamedSharding(mesh, jax.P()))
    _, metrics = program.lower(16).compile()(state, batch, key)  # refuses other shapes, dtypes and places
    assert metrics["tokens"] == 16 * 63 and np.isfinite(metrics["loss"])


def test_fsdp_gathers_a_block_again_for_its_gradient_instead_of_keeping_the_whole_model():
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    report, _ = aot.compile_program(aot.programs(TINY, mesh)["sft"], 16, mesh)
    assert report.fits and report.aliased > 0.9 * report.outputs  # the donated state is written in place
    assert report.count["all-gather"] >= 2 * 4 * 2 + 2  # 4 kernels of 2 blocks, forward and back; wte and wpe


@pytest.mark.parametrize(
    "message, bytes_needed",
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5 * 2**30),
        ("... required for HLO temporaries (512.00M) exceeds available HBM (31.25G).", 512 * 2**20),
        ("something else", 0),
    ],
)
def test_what_a_program_would_have_needed_is_read_from_the_refusal(message, bytes_needed):
    assert aot.needed(message) == bytes_needed


def test_the_largest_batch_lies_on_the_line():
    def report(batch, total):
        return aot.Report("sft", batch, True, 0.0, total, 0, 0, 0, 0, {}, {}, 0.0, 0.0)

    assert aot.line(report(8, 1000), report(16, 1800), 4000) == 38  # 200 + 100 a row


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"model": ModelConfig(n_embd=60, n_head=4)}, "mesh.fsdp 8 does not divide n_embd"),
        ({"model": ModelConfig(name="someone/else")}, "only the sizes of gpt2, "),
    ],
)
def test_sizes_that_cannot_be_are_named(overrides, sentence):
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(ConfigError, match=sentence):
        aot.programs(Config(**overrides), mesh)


def check(*arguments, beside=True):
    """scripts/aot_check.py in a process of its own -> (exit code, output)."""
    environment = {**os.environ, "COLUMNS": "200"}
    if beside:
        environment["PYTHONPATH"] = os.pathsep.join([str(BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, str(ROOT / "scripts" / "aot_check.py"), *SIZES.split(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT)
    return done.returncode, done.stdout


@pytest.mark.skipif(INSTALLED, reason="libtpu is installed: nothing is missing")
def test_without_the_extra_one_sentence_says_so():
    code, told = check(beside=False)
    assert code == 2 and "therapy_jax[tpu]" in told and "Traceback" not in told


@pytest.mark.skipif(not LIBTPU, reason="needs the extra tpu: pip install 'therapy_jax[tpu]'")
def test_an_unknown_topology_and_sizes_that_do_not_divide_are_one_sentence():
    code, told = check("--topology", "v5e:3x7")
    assert code == 2 and "'v5e:3x7'" in told
    code, told = check("--mesh.data", "1", "--mesh.fsdp", "3", "--mesh.tensor", "-1")
    assert code == 2 and "the 8 device(s) here are no multiple of 3" in told
    code, told = check("--sft.batch_size", "12", "--programs", "sft")
    assert code == 2 and "(12)" in told and "8 or 16 would do" in told


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs the extra tpu: pip install 'therapy_jax[tpu]'")
def test_a_tiny_model_fits_a_tpu_and_a_giant_batch_does_not(tmp_path):
    out = tmp_path / "aot.jsonl"
    code, told = check("--topology", "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "-1", "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0, told
    assert [line["program"] for line in lines] == ["sft", "sampler", "ppo"]
    for line in lines:
        assert line["fits"] and 0 < line["total"] < 15.75 * 2**30 and line["sent"]["all-gather"] > 0
    code, told = check("--topology", "v5e:2x2", "--programs", "sft", "--out", str(out), *GIANT.split())
    assert code == 1 and not json.loads(out.read_text().splitlines()[-1])["fits"]
