"""Configuration files: what is printed or written by a run is read again, everything else is refused by key and file."""

import dataclasses
import io
import json
import pathlib
import re
import shlex
import sys
import typing
from contextlib import redirect_stdout
from typing import Literal

import pytest

from jaxrlhf.commands import configuration
from jaxrlhf.commands.align import Align
from jaxrlhf.commands.configuration import config_text, config_values, parse
from jaxrlhf.commands.main import COMMANDS, main, run_command
from jaxrlhf.commands.options import MAIN, OTHER, Option, alternatives, groups_of, options_of
from jaxrlhf.commands.running import open_folder
from jaxrlhf.commands.supervised import Supervised

DOCS = pathlib.Path(__file__).parents[2] / "docs"
KINDS = {name: kind for name, (kind, _) in COMMANDS.items()}
GIVEN = ["--policy", "base", "--data", "pairs.jsonl"]
TEXTS = (
    "1e-4",
    "null",
    "no",
    "12:30",
    "a: b # c",
    "#",
    "'\"",
    "ü\u2028\x85\t",
    "~",
    "[",
    "0x10",
    "010",
    "2026-01-01",
    " x ",
    "",
)
"""Texts that YAML could take for something else."""


def other_value(option: Option, number: int):
    """Another value than the default of an option."""
    kind = next(each for each in alternatives(option.kind) if each is not type(None))
    if typing.get_origin(kind) is Literal:
        return next(choice for choice in reversed(typing.get_args(kind)) if choice != option.default)
    if typing.get_origin(kind) is tuple:
        some = {float: (0.5, 1e-7), int: (2, 64), pathlib.Path: (pathlib.Path("a"), pathlib.Path("b"))}
        return some.get(typing.get_args(kind)[0], ("module:one", "module:two"))
    text = TEXTS[number % len(TEXTS)]
    values = {bool: not option.default, int: 10**6 + number, float: 1e-5 * (number + 1), str: text}
    return values.get(kind, pathlib.Path(text or "a b"))


def required_of(kind):
    return [option for option in options_of(kind).values() if option.required]


def least_of(kind):
    """The arguments that a command requires, each "x"."""
    return [part for each in required_of(kind) for part in ([] if each.positional else [f"--{each.name}"]) + ["x"]]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_printed_is_read_again(tmp_path, capsys, monkeypatch, name):
    kind, options = KINDS[name], options_of(KINDS[name])
    required = least_of(kind)
    least = parse(kind, required, name)
    assert least == kind(**{each.name: "x" if each.kind is str else pathlib.Path("x") for each in required_of(kind)})
    full = kind(**{each: other_value(option, number) for number, (each, option) in enumerate(options.items())})
    # None is a value too where the default is another.
    nothing = {each: None for each, option in options.items() if type(None) in alternatives(option.kind)}
    for number, config in enumerate((least, full, dataclasses.replace(full, **nothing))):
        (tmp_path / f"{number}.yaml").write_text(config_text(config, name))
        (tmp_path / f"{number}.json").write_text(json.dumps(config_values(config, name)))
        for suffix in ("yaml", "json"):
            path = str(tmp_path / f"{number}.{suffix}")
            assert parse(kind, ["--config", path], name) == config
        with pytest.raises(SystemExit) as caught:
            monkeypatch.setattr(sys, "argv", ["jaxrlhf", name, "--print-config", f"--config={path}"])
            main()
        assert not caught.value.code
        assert capsys.readouterr().out == (tmp_path / f"{number}.yaml").read_text()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_printed_without_options_is_a_file_to_start_from(tmp_path, capsys, name):
    kind, path = KINDS[name], tmp_path / "start.yaml"
    with pytest.raises(SystemExit) as caught:
        parse(kind, ["--print-config"], name)
    assert not caught.value.code
    path.write_text(capsys.readouterr().out)
    required = least_of(kind)
    assert parse(kind, ["--config", str(path), *required], name) == parse(kind, required, name)
    if required:
        assert f"\n{required_of(kind)[0].name}: null\n" in path.read_text()
        with pytest.raises(SystemExit) as caught:
            parse(kind, ["--config", str(path)], name)
        assert caught.value.code == 2


def test_a_printed_configuration_says_what_each_option_does():
    lines = config_text(parse(Align, GIVEN, "align"), "align").splitlines()
    assert lines[:2] == ["command: align", "version: 0.1.0"]
    assert lines.index("# Main settings") < lines.index("policy: base") < lines.index("# Data")
    above, comments = {}, []
    for line in lines:
        comments = [*comments, line[2:]] if line.startswith("# ") else comments
        if re.match(r"\w+:", line):
            above[line.split(":")[0]] = " ".join(comments)
        if not line.startswith("# "):
            comments = []
    assert {name: option.help for name, option in options_of(Align).items()}.items() <= above.items()


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "data: d\nsteps: 7\nbeta: 1e-3\nrewards: [a:b, c:d]\nreward-weights: [1, .5]\nlearn_scale: true\nrun: null\n"
    )
    file = ["--config", str(path), "--policy", "p"]
    config = parse(Align, file, "align")
    assert (config.steps, config.beta, config.rewards, config.reward_weights) == (7, 1e-3, ("a:b", "c:d"), (1.0, 0.5))
    assert (config.data, config.policy, config.run) == ("d", pathlib.Path("p"), None)
    again = ["--steps", "9", "--no-learn-scale", "--rewards", "e:f", "--reward-weights", "2"]
    config = parse(Align, [*again, "--judge-temperature", "None", *file, "--data", "e"], "align")
    assert (config.steps, config.rewards, config.reward_weights, config.data) == (9, ("e:f",), (2.0,), "e")
    assert (config.learn_scale, config.judge_temperature, config.beta) == (False, None, 1e-3)
    # One value of several may stand alone.
    path.write_text("data: d\nrewards: a:b\nreward_weights: 2\n")
    config = parse(Align, file, "align")
    assert (config.rewards, config.reward_weights) == (("a:b",), (2.0,))


def test_a_run_is_repeated_by_naming_it(tmp_path):
    config = parse(Supervised, ["--data", "d", "--policy", "p", "--epochs", "3e-1", "--output", str(tmp_path)], "sft")
    folder = open_folder(config, "sft").path
    for named in (folder, folder / "config.json"):
        repeated = parse(Supervised, ["--config", str(named), "--output", "other"], "sft")
        assert repeated == dataclasses.replace(config, output=pathlib.Path("other"))


@pytest.mark.slow
def test_a_repeated_run_has_the_same_model(here, tmp_path):
    (tmp_path / "sft.yaml").write_text(
        "policy: base\ndata: pairs.jsonl\nsteps: 4\nbatch-size: 8\nmax_length: 24\nheld_out: 0.25\nseed: 3\n"
        f"learning_rate: 1e-2\nevaluations: 1\noutput: {tmp_path / 'one'}\n"
    )
    first = run_command("sft", ["--config", str(tmp_path / "sft.yaml")])
    again = run_command("sft", ["--config", str(first), "--output", str(tmp_path / "two")])
    assert again.parent == tmp_path / "two"
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


REFUSED = {
    "nearest": (
        "lerning_rate: 1",
        "gives lerning_rate (the nearest is learning_rate), which jaxrlhf sft does not have",
    ),
    "far": ("architectures: [x]\nsteps: 1", "gives architectures, which jaxrlhf sft does not have"),
    "many": ("a: 1\nb: 1\nsteps: 1\nc: 1\nd: 1\ne: 1", "gives a, b, c, 2 more, which jaxrlhf sft does not have"),
    "another-version": (
        "version: 0.0.9\nfoo: 1",
        "does not have (its settings: jaxrlhf sft --help); jaxrlhf 0.0.9 wrote it",
    ),
    "another-command": ("command: align\nbeta: 1", "has the settings of jaxrlhf align, not of jaxrlhf sft"),
    "text": ("steps: ten", "steps in FILE must be a whole number, got ten."),
    "fraction": ("steps: 1e3", "steps in FILE must be a whole number, got 1000.0."),
    "flag": ("steps: true", "steps in FILE must be a whole number, got true."),
    "quoted": ("steps: '3'", "steps in FILE must be a whole number, got 3 as text; leave out its quotes."),
    "octal": ("steps: 010", "steps in FILE must be a whole number, got 010."),
    "number": ("learning_rate: fast", "learning_rate in FILE must be a number, got fast."),
    "large": (f"learning_rate: 1{'0' * 400}", "learning_rate in FILE must be a number, got 1000"),
    "quotes": ("run: 12", "run in FILE must be text, got 12; put it in quotes."),
    "yes": ("packed: yes", "packed in FILE must be true or false, got yes."),
    "choice": ("dtype: float16", "dtype in FILE must be one of float32, bfloat16, got float16."),
    "path": ("policy: [a]", "policy in FILE must be a path, got ['a']."),
    "twice": ("steps: 1\nsteps: 2", "the key steps is given twice"),
    "two-spellings": ("batch-size: 1\nbatch_size: 2", "FILE gives batch_size twice."),
    "list": ("- steps: 1", "FILE must hold settings by name, such as steps: 100; it holds [{'steps': 1}]."),
    "word": ("steps", "FILE must hold settings by name"),
    "broken": ("steps: [1", "FILE is not YAML that can be read: "),
    "two-documents": ("steps: 1\n---\nsteps: 2", "FILE is not YAML that can be read: "),
    "object": ("steps: !!python/object:os.system x", "FILE is not YAML that can be read: "),
    "time": ("run: !!timestamp x", "FILE is not YAML that can be read: "),
    "key": ("? [a]\n: 1", "FILE is not YAML that can be read: "),
    "bytes": (b"steps: \xff", "FILE cannot be read"),
    "loop": ("data: &a [*a]", "data in FILE must be text, got "),
}
JSON = {
    "twice": ('{"steps": 1, "steps": 2}', "FILE is not JSON that can be read: the key steps is given twice."),
    "half": ('{"steps": 1', "FILE is not JSON that can be read: "),
    "deep": ("[" * 100_000, "FILE is not JSON that can be read: "),
    "member": ('{"command": "align", "rewards": ["a:b", 3]}', "value 2 of rewards in FILE must be text, got 3"),
    "scalar": ('{"command": "align", "rewards": 3}', "value 1 of rewards in FILE must be text, got 3"),
}
CASES = [(text, ".yaml", message) for text, message in REFUSED.values()] + [
    (text, ".json", message) for text, message in JSON.values()
]


@pytest.mark.parametrize("case", CASES, ids=[*REFUSED, *(f"json-{name}" for name in JSON)])
def test_a_file_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, case):
    text, suffix, message = case
    path = tmp_path / f"settings{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    name = "align" if "rewards" in str(text) else "sft"
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", name, *GIVEN, "--config", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1 and len(error) < 700
    assert message.replace("FILE", str(path)) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "There is no file none.yaml, which --config names"),
        (["--config"], "--config needs the name of a file"),
        (["--config", "a", "--config=b"], "--config is given twice; give one file"),
    ],
)
def test_the_option_itself_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(Supervised, arguments, "sft")


@pytest.mark.parametrize("name", KINDS)
def test_help_shows_every_option_once_the_main_ones_first(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    groups, output = groups_of(KINDS[name]), io.StringIO()
    assert next(iter(groups)) == MAIN and OTHER not in groups
    assert len(groups[MAIN]) <= 17
    shown = [option.name for options in groups.values() for option in options]
    assert sorted(shown) == sorted(options_of(KINDS[name]))
    assert all(option.help.endswith((".", "?")) for options in groups.values() for option in options)
    with redirect_stdout(output), pytest.raises(SystemExit) as caught:
        parse(KINDS[name], ["--help"], name)
    assert caught.value.code == 0
    places = "|".join(each.name.upper() for each in options_of(KINDS[name]).values() if each.positional)
    flags = re.findall(rf"^│ (?:--([a-z-]+)|({places or 'none'})  )", output.getvalue(), re.MULTILINE)
    flags = [flag or place.lower() for flag, place in flags if not flag.startswith("no-")]
    assert flags == [each.replace("_", "-") for each in shown] + ["config", "print-config"]


@pytest.mark.parametrize("name", KINDS)
def test_groups_name_options_that_exist(name):
    for kind in KINDS[name].__mro__:
        for names in vars(kind).get("GROUPS", {}).values():
            assert set(names) <= set(options_of(KINDS[name]))


def test_the_page_is_true(tmp_path, monkeypatch):
    text = (DOCS / "configuration.md").read_text()
    monkeypatch.chdir(tmp_path)
    files = re.findall(r"^# (\w+\.yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert files
    for name, content in files:
        pathlib.Path(name).write_text(content)
    open_folder(parse(Align, [*GIVEN, "--output", "runs", "--run", "first"], "align"), "align")
    shown = [line[4:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    jaxrlhf ")]
    assert len(shown) >= 4
    for line in shown:
        _, name, *arguments = shlex.split(line.split(" > ")[0], comments=True)
        if "--print-config" in arguments:
            with redirect_stdout(output := io.StringIO()), pytest.raises(SystemExit):
                parse(KINDS[name], arguments, name)
            pathlib.Path(line.split(" > ")[1].split()[0]).write_text(output.getvalue())
        else:
            assert isinstance(parse(KINDS[name], arguments, name), KINDS[name])
    assert configuration.NOTHING == "None" and "`None`" in text


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["sample", "--policy", "ü", "--print-config"]])
def test_a_terminal_that_lacks_letters_shows_what_it_can(tmp_path, monkeypatch, arguments):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", *arguments])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    with pytest.raises(SystemExit) as caught:
        main()
    sys.stdout.flush()
    assert not caught.value.code and output.getvalue().isascii()
    if "--print-config" in arguments:
        # No letter of a setting is lost.
        (tmp_path / "a.yaml").write_bytes(output.getvalue())
        assert parse(KINDS["sample"], ["--config", str(tmp_path / "a.yaml")], "sample").policy == pathlib.Path("ü")


def test_settings_that_cannot_be_printed_are_an_error_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "sample", "--policy", "p", "--print-config"])

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_tracker_that_is_not_installed_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = [*GIVEN, "--output", str(tmp_path / "runs"), "--run", "first", "--track", "wandb"]
    with pytest.raises(ValueError, match="Tracking needs the library wandb, which is not installed"):
        open_folder(parse(Align, arguments, "align"), "align")
    assert not (tmp_path / "runs").exists()
