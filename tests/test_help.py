"""`--help` of every command: few lines of usage, an example that the command takes, each flag in one group, defaults
where they are informative, and no flags without effect."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairseq import options
from fairseq.flag_help import COMPATIBILITY, HelpFormatter, Layout, default_text, sections
from fairseq.flag_types import Parser
from fairseq.flags.layouts import DOCTOR, EVALUATION, INTERACTIVE, PREPROCESSING, TRAINING
from fairseq.registry import REGISTRIES
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq_cli.entry import log_start

ROOT = Path(__file__).resolve().parent.parent
OWN = ("build_dstore", "kmeans", "greedy_merge", "adaptret", "sweep")  # commands whose flags stand in one place
LM_COMMANDS = {
    "preprocess": PREPROCESSING,
    "train": TRAINING,
    "eval_lm": EVALUATION,
    "doctor": DOCTOR,
    "interactive": INTERACTIVE,
}
MODEL = "--path checkpoints/checkpoint_best.pt --max-tokens 128 --sample-break-mode none"
RETRIEVAL = (
    f"data-bin {MODEL} --gen-subset valid --no-progress-bar --dstore-filename d --indexfile i --k 16 --lmbda 0.25 "
    "--knn-sim-func do_not_recomp_l2 --min-knns 4"
)


def completed(command: str, words: list[str] | None = None) -> Parser:
    """A command's parser with what the choices among `words` add."""
    if command in OWN:
        return importlib.import_module(f"fairseq_cli.{command}").get_parser()
    parser: Any
    if command == "preprocess":
        parser = options.get_preprocessing_parser()
        options._add_flags_of_choices(parser, parser.parse_known_args(words or [])[0], ("tokenizer", "bpe"))
        return parser
    if command == "train":
        parser = options.get_training_parser("language_modeling")
    elif command == "interactive":
        parser = options.get_interactive_parser()
    else:
        parser = options.get_eval_lm_parser()
        parser.layout = LM_COMMANDS[command]
    options.parse_args_and_arch(parser, ["data", *(words or [])])
    return parser


def names_of(action: argparse.Action) -> set[str]:
    return set(action.option_strings) or {action.dest}


def every_choice(command: str) -> list[list[str]]:
    """Words that make each registered class add its flags, one registry after the other."""
    words = [[registry.flag, name] for registry in REGISTRIES.values() for name in registry.classes]
    if command == "preprocess":
        return [word for word in words if word[0] in ("--tokenizer", "--bpe")]
    if command in ("eval_lm", "doctor", "interactive"):
        words += [["--strategy", name] for name in RETRIEVER_REGISTRY]
    return words


@pytest.mark.parametrize("command", [*LM_COMMANDS, *OWN])
def test_each_flag_that_does_something_is_in_one_group(command: str) -> None:
    for words in [[], *(every_choice(command) if command in LM_COMMANDS else [])]:
        parser = completed(command, words)
        layout = parser.layout
        hidden = set(layout.hidden.split())
        shown = [action for _, actions in sections(parser, layout) for action in actions]
        assert len(set(map(id, shown))) == len(shown)
        for action in parser._actions:
            declared = next((g.title for g in parser._action_groups if action in g._group_actions), "") or ""
            flag_of_class = next((flag for flag in hidden if declared.startswith(f"Flags of {flag} ")), None)
            left_out = action.help is argparse.SUPPRESS or names_of(action) & hidden or flag_of_class
            assert (action in shown) is not bool(left_out), (words, action.option_strings)
        if command in LM_COMMANDS:
            titles = {title for title, _ in sections(parser, layout)} - set(layout.groups) - {COMPATIBILITY}
            expected = {f"Flags of {' '.join(words)}"} if words and words[0] not in hidden else set()
            assert {title for title in titles if not title.startswith("Flags of --")} == set()
            assert command == "train" or titles <= expected, titles


@pytest.mark.parametrize("command", [*LM_COMMANDS, "adaptret"])
def test_the_tables_name_flags_that_exist_once_each(command: str) -> None:
    parser = completed(command)
    layout = parser.layout
    named = Counter(" ".join([*layout.titles().values(), layout.hidden]).split())
    known = set().union(*map(names_of, parser._actions))
    assert set(named) <= known, "named, but not declared"
    assert [name for name, times in named.items() if times > 1] == []
    assert {*layout.texts, *layout.needs.split()} <= known


def test_what_an_evaluation_ignores_is_not_shown() -> None:
    words = ["--optimizer", "adam", "--criterion", "label_smoothed_cross_entropy", "--lr-scheduler", "tri_stage"]
    text = completed("eval_lm", words).format_help()
    ignored = "--optimizer --adam-betas --label-smoothing --warmup-steps --momentum --fp16-init-scale"
    for flag in ignored.split():
        assert flag not in text
    text = completed("train", words).format_help()
    assert "--adam-betas" in text and "--label-smoothing" in text and "--lmbda" not in text
    assert "Flags of --optimizer adam:" in text
    assert "--momentum" not in completed("preprocess").format_help()


@pytest.mark.parametrize("command", [*LM_COMMANDS, *OWN])
def test_defaults_are_told_once_where_they_tell_something(command: str) -> None:
    for words in [[], *(every_choice(command) if command in LM_COMMANDS else [])]:
        parser = completed(command, words)
        formatter: Any = HelpFormatter("x")
        formatter.layout = parser.layout
        for title, actions in sections(parser, parser.layout):
            for action in actions:
                text = formatter._expand_help(action)
                assert "%" not in text and not re.search("default: (None|False|True|)[).]", text), text
                said = len(re.findall(r"\bdefaults?\b", text))
                number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
                if title == COMPATIBILITY:
                    assert said == 0 and len(text) < 80
                elif number or (isinstance(action.default, list | str) and action.default not in ([], "", "{}")):
                    assert said == 1 or action.default == argparse.SUPPRESS or "translation" in text, text
                else:
                    assert said <= 1, text


@pytest.mark.parametrize(
    "text, values, shown",
    [
        ("a", {"default": 8}, " (default: 8)"),
        ("a", {"default": 1.0}, " (default: 1)"),
        ("a", {"default": 1e-4}, " (default: 0.0001)"),
        ("a", {"default": [0.25]}, " (default: 0.25)"),
        ("a", {"default": ["x", "y"], "nargs": "+"}, " (default: x y)"),
        ("a", {"default": "l2"}, " (default: l2)"),
        ("a", {"default": "50%"}, " (default: 50%%)"),
        ("a", {"default": None}, ""),
        ("a", {"default": ""}, ""),
        ("a (default: none)", {"default": -1}, ""),
        ("a; default: all", {"default": 0}, ""),
        ("a", {"action": "store_true"}, ""),
    ],
)
def test_the_rule_of_defaults(text: str, values: dict[str, Any], shown: str) -> None:
    action = argparse.ArgumentParser().add_argument("--a", help=text, **values)
    assert default_text(action, text) == shown


@pytest.mark.parametrize("command", [*LM_COMMANDS, *OWN])
def test_usage_is_short_and_the_example_is_a_command(
    command: str, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run_cli(command, ["--help"])
    assert done.status == 0 and done.stderr == ""
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith("usage: ") and len(usage.splitlines()) <= 2 and "[-h]" not in usage
    assert max(map(len, done.stdout.splitlines())) <= 90
    (example,) = re.findall(r"^Example:\n((?:  .*\n)+)", rest, re.MULTILINE)
    words = shlex.split(example.replace("\\\n", ""))
    words = words[1:] if words[0] == "python" else words
    assert words[0].removesuffix(".py").replace("-", "_").removeprefix("fairseq_") == command
    if command in ("eval_lm", "doctor"):
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), words[1:])
    elif command == "train":
        args = options.parse_args_and_arch(options.get_training_parser(), words[1:])
    else:
        args = completed(command).parse_args(words[1:])
    flags = {word for word in re.split(r"[ \n]", re.sub(r'"[^"]*"', "", example)) if re.fullmatch("--[a-z-]+", word)}
    assert vars(args) and flags and flags <= set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", rest, re.MULTILINE))


def test_help_of_a_wrong_command_line_is_short(run_cli: Any) -> None:
    assert "see eval_lm.py --help" in run_cli("eval_lm", ["data", "--no-such-flag"]).error


def test_flags_of_extensions_are_shown_where_they_were_declared() -> None:
    parser = Parser(prog="x", layout=Layout({"Known": "--known"}, hidden="--nothing"))
    for flag in ("--of-an-extension", "--known", "--nothing"):
        parser.add_argument(flag)
    parser.add_argument_group("Its own").add_argument("--grouped")
    groups = sections(parser, parser.layout)
    found = {title: [action.option_strings[-1] for action in actions] for title, actions in groups}
    assert found == {"Known": ["--known"], "Its own": ["--grouped"], "Other flags": ["--help", "--of-an-extension"]}


OF_OTHER_PROGRAMS = "--editable --model --model_args --tasks --batch_size"  # of pip and lm-evaluation-harness


def test_documents_name_flags_that_exist() -> None:
    known: set[str] = set(OF_OTHER_PROGRAMS.split())
    for command in (*LM_COMMANDS, *OWN):
        for words in [[], *(every_choice(command) if command in LM_COMMANDS else [])]:
            known.update(*(action.option_strings for action in completed(command, words)._actions))
    for source in (*ROOT.glob("examples/**/*"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/conftest.py")):
        if source.suffix in (".py", ".sh"):
            known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", source.read_text(encoding="utf-8")))
    unknown: set[tuple[str, str]] = set()
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text(encoding="utf-8")
        declared = set(re.findall(r"add(?:_argument)?\(\"(--[\w-]+)", text))  # by examples of extensions
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        unknown |= {(document.name, flag) for flag in named - known - declared}
    assert unknown == set()


# ---------------------------------------------------------------------------------------------------------------------
# What is hidden has no effect


ONLY = {  # values that are not refused
    "--alignfile": None, "--character-embeddings": None, "--tokenizer": None, "--all-gather-list-size": "7",
    "--distributed-world-size": "1", "--distributed-rank": "0", "--dstore-mmap": "x", "--knn-keytype": "last_ffn_input",
    "--check": None, "--save-knnlm-dstore": None, "--task": None, "--bpe": None, "--remove-bpe": None,
    "--results-path": None, "--help": None, "--tokens-per-sample": "100", "--save-scores": "x",
    "--lr-scheduler": "fixed", "--self-target": None, "--past-target": None,
}  # fmt: skip


def typed(parser: argparse.ArgumentParser, flags: str) -> list[str]:
    """Each of these flags with a value that is not its default."""
    words: list[str] = []
    for flag in flags.split():
        action = next(action for action in parser._actions if flag in action.option_strings)
        value = ONLY.get(flag, "")
        if value is None:
            continue
        words.append(flag)
        if action.nargs == 0:
            continue
        if not value and action.choices:
            value = next(str(choice) for choice in action.choices if choice != action.default)
        if not value:
            kind = getattr(action.type, "__name__", "")
            value = "0.5" if "float" in kind else "3" if "int" in kind or "count" in kind else "other"
        words.append(value)
    return words


@pytest.fixture(scope="module")
def stores(golden: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: Any) -> Path:
    """A folder with model and text, and a datastore with its index."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("data-bin", "checkpoints"):
        (folder / name).symlink_to(golden / name)
    save = f"data-bin {MODEL} --gen-subset test --save-knnlm-dstore --dstore-mmap d --dstore-fp16 --no-progress-bar"
    build = "--dstore-mmap d --faiss-index i --ncentroids 16 --code-size 8 --no-progress-bar --recall-queries 0"
    for command, words in (("eval_lm", save), ("build_dstore", build)):
        done = run_cli(command, words.split(), cwd=folder)
        assert done.status == 0, done.stderr
    return folder


def test_hidden_flags_change_no_evaluation(stores: Path, tmp_path: Path, run_cli: Any) -> None:
    parser = completed("eval_lm")
    ignored = typed(parser, f"{EVALUATION.hidden} {EVALUATION.accepted} --momentum --lr-shrink --warmup-updates")
    assert {"--optimizer", "--criterion", "--quiet", "--log-format", "--add-bos-token", "--lr-shrink"} < set(ignored)
    figures = []
    for number, more in enumerate(([], ["--optimizer", "nag", *ignored, "--optimizer", "nag"])):
        path = tmp_path / f"{number}.json"
        done = run_cli("eval_lm", [*RETRIEVAL.split(), "--knnlm", "--results-json", path, *more], cwd=stores)
        assert done.status == 0, done.stderr
        found = json.loads(path.read_text())
        figures.append([found[name] for name in ("loss_base2", "count", "scored_tokens", "searches")])
    assert figures[0] == figures[1] and figures[0][3] > 0


def test_hidden_flags_change_no_training(golden: Path, tmp_path: Path, run_cli: Any) -> None:
    tiny = (
        "--task language_modeling --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 --decoder-layers 1 "
        "--decoder-attention-heads 2 --optimizer adam --lr 0.01 --tokens-per-sample 64 --max-tokens 512 --max-update 3 "
        "--no-save --cpu --num-workers 0 --no-progress-bar"
    ).split()
    ignored = typed(completed("train"), f"{TRAINING.hidden} {TRAINING.accepted}")
    assert {"--lmbda", "--dstore-filename", "--ddp-backend", "--bucket-cap-mb"} < set(ignored)
    losses = []
    for number, more in enumerate(([], ignored)):
        path = tmp_path / f"{number}.json"
        done = run_cli("train", [golden / "data-bin", *tiny, "--results-json", path, *more])
        assert done.status == 0, done.stderr + done.stdout
        found = json.loads(path.read_text())
        losses.append([found["train"]["loss"], found["valid"]["valid"]["loss"]])
    assert losses[0] == losses[1]


def test_hidden_flags_change_no_preprocessing(tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "t").write_text("a b a\nc\n")
    ignored = typed(completed("preprocess"), f"{PREPROCESSING.hidden} {PREPROCESSING.accepted}")
    assert {"--optimizer", "--seed", "--fp16"} < set(ignored)
    written = []
    for number, more in enumerate(([], ignored)):
        folder = tmp_path / str(number)
        done = run_cli("preprocess", ["--only-source", "--trainpref", tmp_path / "t", "--destdir", folder, *more])
        assert done.status == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".txt")})
    assert written[0] == written[1] and "train.bin" in written[0]


def test_hidden_flags_change_nothing_that_the_doctor_finds(stores: Path, tmp_path: Path, run_cli: Any) -> None:
    ignored = typed(completed("doctor"), DOCTOR.hidden)
    assert {"--save-searches", "--output-word-probs", "--knnlm-gpu", "--lockstep-tokens"} < set(ignored)
    found = []
    for number, more in enumerate(([], ignored)):
        path = tmp_path / f"{number}.json"
        run_cli("doctor", [*RETRIEVAL.split(), "--results-json", path, *more], cwd=stores)
        found.append(json.loads(path.read_text())["findings"])
    assert found[0] == found[1] and len(found[0]) > 5


# ---------------------------------------------------------------------------------------------------------------------
# The first line of a log


def first_lines(text: str, name: str) -> list[str]:
    lines = [line.split(" | ", 3) for line in text.splitlines()]
    return [parts[3] for parts in lines if len(parts) == 4 and parts[2] == f"fairseq_cli.{name}"]


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_a_log_begins_with_what_was_typed(
    golden: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("LOGLEVEL", level)
    words = ["data-bin", *MODEL.split(), "--gen-subset", "no\nsuch \udcff'"]
    done = run_cli("eval_lm", words, cwd=golden)
    lines = first_lines(done.stderr, "eval_lm")
    typed_words = MODEL + " --gen-subset 'no\\nsuch \\udcff'\"'\"''"
    assert re.fullmatch(r"eval_lm \d[\w.+]*: data-bin " + re.escape(typed_words), lines[0]), lines[0]
    assert ("Namespace(" in done.stderr) is (level == "DEBUG")


def test_every_log_begins_so(golden: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    flags = "--task language_modeling --max-tokens 1 --no-save --cpu"
    done = run_cli("train", [golden / "data-bin", *flags.split()])
    (first, *_) = first_lines(done.stdout, "train")
    assert first.endswith(flags) and "Namespace" not in done.stdout
    (tmp_path / "t").write_text("a b a\nc\n")
    done = run_cli("preprocess", ["--only-source", "--trainpref", tmp_path / "t", "--destdir", tmp_path / "d"])
    (first, *_) = first_lines(done.stdout, "preprocess")
    assert first.endswith(f"--destdir {tmp_path / 'd'}") and "Namespace" not in done.stdout
    assert (tmp_path / "d" / "preprocess.log").read_text().startswith("Namespace(")  # from which a second run goes on


def test_settings_that_nobody_typed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another program's words are not taken for flags of the command whose main it calls."""
    monkeypatch.setattr("sys.argv", ["notebook", "--secret"])
    with caplog.at_level("INFO", logger="fairseq_cli.train"):
        log_start(logging.getLogger("fairseq_cli.train"), argparse.Namespace(lr=1))
    (message,) = caplog.messages
    assert message.startswith("train ") and message.endswith(": called from Python")
