"""What a result says of where it comes from."""

import contextlib
import dataclasses
import io
import shlex
import subprocess

import pytest
from hypothesis import HealthCheck, assume, given, settings

from bench import provenance
from bench.config import Config, UserError, parser, resolve
from bench.provenance import NO_PART_OF_A_RUN, command, commit, cpu_name, uncommitted
from tests.bench.test_fuzz_flags import lines


def resolved(argv):
    given_flags = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
    return resolve(given_flags)


def again(line):
    """The config that a shell line gives."""
    words = shlex.split(line)
    assert words[:2] == ["python", "bench/run.py"]
    return resolved(words[2:])


def run_of(config):
    """What of a config is in its command."""
    free = {f.name: f.default for f in dataclasses.fields(Config) if f.name in NO_PART_OF_A_RUN}
    return dataclasses.replace(config, **free)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--preset seed",
        "--preset small --no-interleave",
        "--task finetune",
        "--task finetune --steps 250 --preset small --json-out x.json --resume y --allow-previous",
        "--task teacher --dtype bfloat16 --n-layers 18 --lr-decay constant",
        "--data 'a folder/$HOME' --lr 1e-05 --time-budget-ms 100",
        "--data=-x --static-active-layers=-3",
    ],
)
def test_the_command_gives_the_same_run(line):
    config = resolved(shlex.split(line))
    assert again(command(config)) == run_of(config)
    assert not {"--resume", "--json-out", "--allow-previous"} & {*command(config).split()}


def test_a_command_is_short_where_the_preset_is_named():
    assert command(resolved(["--preset", "small", "--lr", "0.1"])) == (
        "python bench/run.py --preset small --lr-decay linear --lr 0.1"
    )


def test_it_repeats_a_run_where_auto_is_another_preset():
    on_a_gpu = dataclasses.replace(Config(), lr_decay="linear")
    assert again(command(on_a_gpu)) == on_a_gpu


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=HealthCheck)
@given(lines())
def test_any_run_is_repeated(line):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            assume([] not in vars(parser().parse_args(line)).values())
            config = resolved(line)
    except (UserError, SystemExit):
        assume(False)
    assert again(command(config)) == run_of(config)


def test_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    started = command(resolved(["--preset", "small"])).split(" --preset")[0]
    assert started == "torchrun --nnodes=2 --nproc-per-node=4 bench/run.py"


@pytest.fixture
def commit_of(tmp_path, monkeypatch):
    """A function: the commit of code in a folder that git has been told to do this in."""

    def found(*lines):
        for line in lines:
            subprocess.run(["git", *line.split()], cwd=tmp_path, check=True, capture_output=True)
        commit.cache_clear()
        return commit()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    (tmp_path / "code.py").write_text("1")
    yield found
    commit.cache_clear()


def test_the_commit(commit_of, tmp_path, monkeypatch):
    assert commit_of() is None
    clean = commit_of("init", "add code.py", "commit -m one", "tag v1")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
    assert clean == head.stdout.strip()
    (tmp_path / "new.py").write_text("2")
    assert commit_of() == clean
    (tmp_path / "code.py").write_text("3")
    assert commit() == clean  # what was asked first is what runs
    assert commit_of() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    assert commit() is None


def test_what_is_not_committed(commit_of, tmp_path, monkeypatch):
    study, code = tmp_path / "study.toml", tmp_path / "bench" / "deep" / "code.py"
    code.parent.mkdir(parents=True)
    for path in (study, code, code.with_suffix(".json")):
        path.write_text("1")
    assert uncommitted(study) is None  # git knows nothing of it
    commit_of("init", "add code.py", "commit -m one")
    assert uncommitted(study) == ["study.toml", "bench/deep/code.py"]
    commit_of("add .", "commit -m two")
    code.with_suffix(".json").write_text("2")  # no source
    assert uncommitted(study) == []
    code.write_text("2")
    assert uncommitted(study) == ["bench/deep/code.py"]
    (tmp_path / ".gitignore").write_text("*.toml")
    commit_of("rm -q --cached study.toml", "commit -qam three")
    assert uncommitted(study) == ["study.toml"]  # which is ignored
    monkeypatch.setenv("PATH", "")
    assert uncommitted(study) is None


def test_the_cpu_has_a_name_or_none():
    assert cpu_name() is None or cpu_name().strip()
